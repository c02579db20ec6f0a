"""The attention seam: the model's rotary modules emit the identity, and our attention function does all the rest.

Plan first, touch second. What a model does with its queries and keys is seen, not known: see `_probe`. Before a method
is put in force the seam is run with the model's own rotation, and must give the model's own outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ropepatch.attention import interface
from ropepatch.attention.scheme import Rotary
from ropepatch.errors import OptionError, UnsupportedModelError
from ropepatch.families._rotary import owner_of
from ropepatch.families._site import Site, dtype_name
from ropepatch.methods._attention import AttentionMethod, LayerGeometry
from ropepatch.methods._base import MethodOptions
from ropepatch.surgery._changes import AttributeChange, Change, revert_all
from ropepatch.surgery._choose import choose, taken
from ropepatch.surgery._effect import without_effect
from ropepatch.surgery._neutral import check_finite, check_neutral, outputs
from ropepatch.surgery._probe import FoundLayer, compare, record
from ropepatch.surgery._seam import Seam
from ropepatch.surgery._start import Start
from ropepatch.surgery._takeover import learn, refuse, silence, take_over, tell_config, watch

_TOKENS = 6


@dataclass(frozen=True)
class Patched:
    """What was done: the changes in order, the layers as plain dicts, and the lengths."""

    changes: list[Change]
    layers: list[dict[str, Any]]
    original_length: int
    target_length: int


def apply(
    host: nn.Module,
    found: Sequence[Start],
    method: AttentionMethod,
    options: MethodOptions,
    *,
    layers: Sequence[int] | None,
    layer_types: Sequence[str] | None,
    verify: bool,
) -> Patched:
    """Put a method of the attention seam in force. On any failure the model is as before.

    Raises:
        UnsupportedModelError: the model's attention cannot be taken over; the message says why.
        OptionError: options that do not fit a layer, or layers that do not exist.
        VerificationError: with its own rotation inside the seam the model does not give its own outputs.
    """
    place = _owner(host, found)
    owner = host.get_submodule(place)
    refuse(owner)
    changes: list[Change] = []
    try:
        seen = _look(host, place, found)
        first = host.get_submodule(seen[0].path)
        wanted = outputs(owner, first, _TOKENS) if verify else None
        take_over(host, place, changes)
        chosen = choose(seen, found, layers, layer_types, method)
        silenced = taken(found, seen, chosen)
        silence(host, [found[index] for index in sorted(silenced)], changes)
        watch(host, place, interface.before_call, changes)
        neutral = [_neutral(number, layer, found, layer.site in silenced) for number, layer in enumerate(seen)]
        # First with the model's own frequencies and nothing else: it must be the same model.
        for layer, seam in zip(seen, neutral, strict=True):
            changes.append(AttributeChange.apply(host, layer.path, interface.SEAM, seam))
        if wanted is not None:
            check_neutral(owner, outputs(owner, first, _TOKENS), wanted, "rotation")
        final = {number: _changed(neutral[number], seen[number], found, method, options) for number in sorted(chosen)}
        if all(without_effect(seam, seen[number]) for number, seam in final.items()):
            raise OptionError(
                f"{method.name!r} would have no effect: every layer that it changes sees a short window only, and "
                "within it these options leave all distances as they are",
                given=options.model_dump(exclude_none=True),
                allowed=f"options that change distances below {min(seen[n].reach or 0 for n in chosen)}",
            )
        for number, seam in final.items():
            path = seen[number].path
            if method.learned is not None:
                learn(host, path, method.learned(seam.geometry, options), changes)
            setattr(host.get_submodule(path), interface.SEAM, seam)
        keeps = {seam.scheme.keep for seam in final.values()}
        if len(keeps) == 1 and len(final) == len(seen):
            owner.__dict__[interface.OWNER].keep = keeps.pop()
        lengths = [method.target(seam.geometry, options) for seam in final.values()]
        start = final[min(final)].geometry.length
        target = max([start, *(length for length in lengths if length is not None)])
        tell_config(host, place, target, changes)
        if verify:
            check_finite(outputs(owner, first, _TOKENS))
        described = [_describe(layer, found, number in final) for number, layer in enumerate(seen)]
        return Patched(changes, described, found[0].trained_length, target)
    except BaseException:
        revert_all(host, changes)
        raise


def _owner(host: nn.Module, found: Sequence[Start]) -> str:
    places = {owner_of(host, start.site.path) for start in found}
    if len(places) != 1:
        raise UnsupportedModelError("its rotary modules belong to several models", given=sorted(places))
    return places.pop()


def _look(host: nn.Module, place: str, found: Sequence[Start]) -> list[FoundLayer]:
    owner = host.get_submodule(place)
    borrowed: list[Change] = []
    try:
        take_over(host, place, borrowed)
        turned = record(owner)
        silence(host, found, borrowed, gain_too=False)
        still = record(owner)
    finally:
        revert_all(host, borrowed)
    return compare(host, turned, still, [start.site.path for start in found], [start.own for start in found])


def _neutral(number: int, layer: FoundLayer, found: Sequence[Start], silenced: bool) -> Seam:
    """The seam of a layer that goes on turning by its own frequencies."""
    own = found[layer.site].own if layer.site is not None else None
    geometry = _geometry(layer, found, own)
    return Seam(number, geometry, layer.layout if silenced else None)


def _changed(
    seam: Seam, layer: FoundLayer, found: Sequence[Start], method: AttentionMethod, options: MethodOptions
) -> Seam:
    """The seam of the same layer under the method, which starts from the base's frequencies where there is one.

    Raises:
        OptionError: options that do not fit the layer.
    """
    base = found[layer.site].rotary if layer.site is not None else None
    seam = replace(seam, geometry=_geometry(layer, found, base), method=method.name, options=options.model_dump())
    seam.scheme  # noqa: B018 - built now, so that what does not fit is refused before anything is written
    return seam


def _geometry(layer: FoundLayer, found: Sequence[Start], rotary: Rotary | None) -> LayerGeometry:
    start = found[layer.site or 0].geometry
    if rotary is None:
        return LayerGeometry(start.original_length, layer.heads, layer.head_dim)
    turned = replace(start, inv_freq=rotary.inv_freq)
    return LayerGeometry(start.original_length, layer.heads, layer.head_dim, turned, rotary.gain)


def _describe(layer: FoundLayer, found: Sequence[Start], chosen: bool) -> dict[str, Any]:
    return {
        "path": layer.path,
        "changed": chosen,
        "local": layer.local,
        "heads": layer.heads,
        "head_dim": layer.head_dim,
        "rotary_dim": layer.layout.dims if layer.layout else 0,
        "interleaved": bool(layer.layout and layer.layout.interleaved),
        "site": found[layer.site].site.where if layer.site is not None else None,
    }


def learned_sites(host: nn.Module) -> Iterator[Site]:
    """Where a patch keeps what it learns, one site a parameter."""
    for path, module in host.named_modules():
        learned = module._modules.get(interface.LEARNED)
        for name, parameter in learned.named_parameters() if learned is not None else ():
            yield Site(
                path=f"{path}.{interface.LEARNED}",
                name=name,
                mechanism="relative_bias",
                kind="bias",
                dtype=dtype_name(parameter),
                note=f"learned, {parameter.numel()} numbers",
            )


def retire(host: nn.Module) -> None:
    """Before undoing: caches that are alive must not be used by the unpatched model."""
    for module in host.modules():
        owner = module.__dict__.get(interface.OWNER)
        if isinstance(owner, interface.Owner):
            owner.retire()

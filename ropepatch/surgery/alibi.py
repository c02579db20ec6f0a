"""Models with ALiBi of their own on the attention seam: their slopes rescaled, or their bias swapped for another.

The forward of each attention module is replaced by one that projects, asks our attention function, and projects back:
no bias of [heads, L, L] is made, and memory is linear in length. The only rotation on offer is a new one, `rope`:
methods that remap or stretch a rotation have none to start from.

Limits: what wraps `forward` of an attention module itself *after* the patch (an offloading hook put exactly there)
goes with it on unpatching; hooks that were there before, and all hooks on its projections, stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ropepatch.attention import interface
from ropepatch.attention.scheme import Scheme, unrotated
from ropepatch.errors import OptionError, UnsupportedModelError
from ropepatch.families._alibi_core import CORES, AlibiCore, attention_paths
from ropepatch.families._rotary import owner_of
from ropepatch.families._site import Site
from ropepatch.methods._attention import AttentionMethod, LayerGeometry, logn_scale
from ropepatch.methods._base import FrequencyMethod, MethodOptions
from ropepatch.methods.alibi import AlibiBias
from ropepatch.surgery._changes import AttributeChange, Change, revert_all
from ropepatch.surgery._choose import numbered
from ropepatch.surgery._lengths import stated_length
from ropepatch.surgery._neutral import check_finite, check_neutral, outputs
from ropepatch.surgery._seam import Seam, own_layout
from ropepatch.surgery._takeover import learn, project, refuse, select, tell_config, watch

SWAPPED = "Replaces the ALiBi bias that the weights were trained with: finetune the model after this swap."

# Both divide the model's own slopes by `factor`.
_RESCALES = ("alibi", "linear")
# What these compute does not depend on the trained length, unless log-n is asked for.
_WITHOUT_LENGTH = (*_RESCALES, "nope", "kerple", "t5_bias", "sandwich", "rope")
# Short enough for every way of building the bias to be exact, even in bfloat16.
_TOKENS = 3


@dataclass
class AlibiSeam(Seam):
    """The seam of an attention module whose model has slopes of its own.

    Attributes:
        slopes: the model's, one a head, scores per token of distance.
    """

    slopes: tuple[float, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> AlibiSeam:
        return AlibiSeam(**vars(super().__deepcopy__(memo)), slopes=self.slopes)

    def _make(self) -> Scheme:
        if self.method is not None and self.method not in _RESCALES:
            return super()._make()
        options = self.options or {}
        return _sloped(self.slopes, options.get("factor", 1.0), self.geometry.length if options.get("logn") else None)


@lru_cache(maxsize=64)
def _sloped(slopes: tuple[float, ...], factor: float, logn: int | None) -> Scheme:
    # One scheme for all layers: they share the planning of a call.
    bias = AlibiBias(torch.tensor(slopes, dtype=torch.float32) / factor)
    return unrotated(bias, None if logn is None else logn_scale(logn))


@dataclass(frozen=True)
class Patched:
    """What was done.

    Attributes:
        changes: in the order they were made.
        layers: the attention modules as plain dicts.
        original_length, target_length: in tokens; None where nothing states the trained length and nothing needs it.
        warnings: what the user should know.
    """

    changes: list[Change]
    layers: list[dict[str, Any]]
    original_length: int | None
    target_length: int | None
    warnings: list[str]


def takes(sites: Sequence[Site], method: FrequencyMethod | AttentionMethod) -> bool:
    """Whether the model's text part has slopes, and `method` is one that changes them."""
    sloped = any(site.kind == "slopes" and site.part == "text" for site in sites)
    return sloped and "alibi" in method.mechanisms


def apply(
    host: nn.Module,
    method: FrequencyMethod | AttentionMethod,
    options: MethodOptions,
    *,
    original_length: int | None,
    layers: Sequence[int] | None,
    verify: bool,
) -> Patched:
    """Put a method in force on a model with ALiBi of its own. On any failure the model is as before.

    `alibi` and `linear` divide the model's slopes by `factor` (arXiv 2310.13017: slope x L / L'); every other method
    puts its own bias, a rotation, or nothing in the place of the model's. Slopes are float32 where the model may round
    its bias to its own dtype; Falcon loaded with the eager attention, which adds its bias twice, follows its sdpa
    attention.

    Args:
        layers: numbers of the attention modules to change; the others keep the model's own slopes.
        verify: hold the seam with the model's own slopes against the model's own outputs on a few tokens first.

    Raises:
        UnsupportedModelError: the attention is not built as transformers builds it, or cannot be taken over.
        OptionError: options that do not fit, layers that do not exist, or a trained length that is needed and unknown.
        VerificationError: with its own slopes inside the seam the model does not give its own outputs.
    """
    core, place, paths = _find(host)
    owner: Any = host.get_submodule(place)
    refuse(owner)
    slopes = core.slopes(owner)
    _refuse_parts(owner, slopes, [host.get_submodule(path) for path in paths])
    length = original_length or stated_length(owner.config)
    if length is None and (method.name not in _WITHOUT_LENGTH or getattr(options, "logn", False)):
        raise OptionError("the config does not state a trained length", hint="pass original_length=... (tokens)")
    chosen = numbered(layers if layers is not None else range(len(paths)), len(paths))
    settings = options.model_dump()
    first = host.get_submodule(paths[0])
    changes: list[Change] = []
    try:
        wanted = outputs(owner, first, _TOKENS, core.way) if verify else None
        select(host, place, changes)
        changes.append(AttributeChange.apply(host, place, *core.quiet))
        watch(host, place, _before_call, changes)
        described = []
        for number, path in enumerate(paths):
            project(host, path, owner.config.model_type, changes)
            module: Any = host.get_submodule(path)
            geometry = LayerGeometry(length or 1, slopes.numel(), int(module.head_dim))
            # First with the model's own slopes and nothing else: it must be the same model.
            seam = AlibiSeam(number, geometry, None, slopes=tuple(slopes.tolist()))
            changes.append(AttributeChange.apply(host, path, interface.SEAM, seam))
            described.append(_describe(path, geometry, number in chosen))
        if wanted is not None:
            check_neutral(owner, outputs(owner, first, _TOKENS), wanted, "slopes")
        for number in sorted(chosen):
            module = host.get_submodule(paths[number])
            seam = replace(getattr(module, interface.SEAM), method=method.name, options=settings)
            # Options that do not fit are refused here.
            seam = replace(seam, layout=own_layout(seam.scheme, seam.geometry.length))
            if isinstance(method, AttentionMethod) and method.learned is not None:
                learn(host, paths[number], method.learned(seam.geometry, options), changes)
            setattr(module, interface.SEAM, seam)
        target = _target(length, method, settings)
        if target is not None:
            tell_config(host, place, target, changes)
        if verify:
            check_finite(outputs(owner, first, _TOKENS))
    except BaseException:
        revert_all(host, changes)
        raise
    return Patched(changes, described, length, target, [] if method.name in _RESCALES else [SWAPPED])


def _find(host: nn.Module) -> tuple[AlibiCore, str, list[str]]:
    """How the model is built, the model that runs the layers, and the attention modules."""
    config: Any = host.config
    core = CORES.get(config.get_text_config().model_type)
    paths = list(attention_paths(host, core)) if core is not None else []
    places = {owner_of(host, path) for path in paths}
    if core is None or len(places) != 1 or not hasattr(host.get_submodule(next(iter(places))), core.quiet[0]):
        raise UnsupportedModelError(
            f"the ALiBi attention of this {config.model_type} model is not built as transformers builds it",
            allowed=sorted(CORES),
        )
    return core, places.pop(), paths


def _refuse_parts(owner: Any, slopes: Tensor, modules: Sequence[Any]) -> None:
    if any(getattr(module, "pretraining_tp", 1) > 1 and getattr(module, "slow_but_exact", False) for module in modules):
        raise UnsupportedModelError(
            "the model projects its attention's output slice by slice (slow_but_exact)",
            hint="load it with slow_but_exact=False",
        )
    if not bool(torch.isfinite(slopes).all()) or slopes.dim() != 1:
        raise UnsupportedModelError("the model's slopes cannot be read", given=type(owner).__name__)


def _before_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """`interface.before_call` for a model that takes its positions from the attention mask, whatever it is told."""
    given = interface.arguments(module, args, kwargs)
    cache: Any = given.get("past_key_values")
    past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    config: Any = module.config
    places = None if CORES[config.model_type].counts_gaps else _places(given, past)
    notes = getattr(cache, "ropepatch_notes", None)
    if places is not None and notes is not None and past:
        # The mask tells of the past as well, also where beams have moved its rows since.
        notes.note(cache, places[:, :past])
    stated = places[:, past:] if places is not None else None
    result = interface.before_call(module, args, {**kwargs, "position_ids": stated})
    if result is None:
        return None
    # What was stated was for the seam: the model itself is called with what it was given.
    new_args, new_kwargs = result
    own = {"position_ids": kwargs["position_ids"]} if "position_ids" in kwargs else {}
    return new_args, {**{name: value for name, value in new_kwargs.items() if name != "position_ids"}, **own}


def _places(given: dict[str, Any], past: int) -> Tensor | None:
    """Positions of all tokens so far, int64 [B, past + T], where padding lies between them, which takes no distance.

    None: they are slots counted from the first token, as the seam counts by itself.
    """
    mask = given.get("attention_mask")
    # A mask that was finished before the call still knows what it was made from.
    mask = (getattr(mask, "made_from", None) or {}).get("attention_mask", mask)
    new = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if not isinstance(mask, Tensor) or not isinstance(new, Tensor) or mask.dim() != 2 or new.dim() < 2:
        return None
    total = past + new.shape[1]
    if mask.shape[1] < total or bool((mask > 1).any()):
        return None
    real = (mask[:, :total] != 0).long()
    if bool((real[:, 1:] >= real[:, :-1]).all()):
        return None
    return (real.cumsum(1) - 1).clamp(min=0)


def _describe(path: str, geometry: LayerGeometry, changed: bool) -> dict[str, Any]:
    return {"path": path, "changed": changed, "heads": geometry.heads, "head_dim": geometry.head_dim}


def _target(length: int | None, method: FrequencyMethod | AttentionMethod, settings: dict[str, Any]) -> int | None:
    if length is None:
        return None
    return round(length * settings["factor"]) if method.name in _RESCALES else length

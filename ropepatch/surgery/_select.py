"""Which of a model's sites a method acts on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ropepatch.errors import OptionError, UnsupportedModelError, did_you_mean
from ropepatch.families._site import Site
from ropepatch.methods._attention import AttentionMethod
from ropepatch.methods._base import FrequencyMethod

_LOCAL = ("sliding", "chunked", "local")
_CHANGEABLE = ("frequencies", "sincos_table")


def select_sites(
    sites: Sequence[Site],
    method: FrequencyMethod | AttentionMethod,
    layer_types: Sequence[str] | None,
    model_type: str,
    *,
    local_too: bool = False,
) -> list[Site]:
    """The sites of the text part that `method` changes.

    Raises:
        UnsupportedModelError: there is none; the message says what the model has instead.
        OptionError: a layer type that the model does not have.
    """
    text = [site for site in sites if site.part == "text"]
    usable = [site for site in text if site.mechanism in method.mechanisms and site.kind in _CHANGEABLE]
    fixed = [site for site in text if site.kind == "fixed"]
    if fixed and not usable:
        raise UnsupportedModelError(
            f"the {fixed[0].mechanism} positions of {model_type} cannot be changed: {fixed[0].note}",
            hint="images of any size need no patch; one of the language model makes room for more text"
            if "patches" in fixed[0].note
            else None,
        )
    if not usable:
        rotary = isinstance(method, AttentionMethod) and method.becomes == "rotary"
        if rotary and any(site.mechanism == "rotary" for site in text):
            raise UnsupportedModelError(
                f"{method.name!r} makes a model rotary, and this {model_type} model is rotary already",
                hint="use 'abf' to change its rope_theta",
            )
        whose = "this" if len(text) == len(sites) else "the text part of this"
        raise UnsupportedModelError(
            f"{method.name!r} changes {' or '.join(method.mechanisms)} positions, and {whose} "
            f"{model_type} model has {_what_it_has(text)}{_elsewhere(sites, method)}",
            hint="ropepatch.inspect(model) shows where the model carries positions",
        )
    if layer_types is not None:
        check_layer_types(usable, layer_types)
        return [site for site in usable if site.layer_type in layer_types]
    if local_too:
        return usable
    # A local layer never sees a distance beyond its window, so stretching it only costs resolution.
    far = [site for site in usable if not any(word in (site.layer_type or "") for word in _LOCAL)]
    return far or usable


def check_layer_types(sites: Iterable[Site], layer_types: Iterable[str]) -> None:
    """Refuse layer types that no site has.

    Raises:
        OptionError: names the first of them.
    """
    labels = sorted({site.layer_type for site in sites if site.layer_type})
    for name in layer_types:
        if name not in labels:
            raise OptionError(
                f"unknown layer type {name!r}",
                allowed=labels or "none: this model keeps one set of frequencies for all layers",
                hint=did_you_mean(name, labels),
            )


def _what_it_has(text: Sequence[Site]) -> str:
    mechanisms = sorted({site.mechanism for site in text} - {"none"})
    return f"{' and '.join(mechanisms)} ones" if mechanisms else "none"


def _elsewhere(sites: Sequence[Site], method: FrequencyMethod | AttentionMethod) -> str:
    """Where another part has such positions, and what to do about it; else nothing."""
    other = next((site for site in sites if site.part != "text" and site.mechanism in method.mechanisms), None)
    if other is None:
        return ""
    where = f"; its {other.part} part has {other.mechanism} ones, at {other.where}"
    return f"{where}: {other.note}" if other.kind == "fixed" else f"{where}: pass that part by itself to patch it"

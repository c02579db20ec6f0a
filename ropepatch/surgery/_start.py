"""What each rotary site of a model turns by before a method of the attention seam is put in force."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ropepatch.attention.scheme import Rotary
from ropepatch.errors import OptionError, UnsupportedModelError
from ropepatch.families._native import PER_CALL_TYPES, native_scaling
from ropepatch.families._site import Site
from ropepatch.methods._attention import AttentionMethod
from ropepatch.methods._base import METHODS, FrequencyMethod, MethodOptions, RotaryGeometry
from ropepatch.methods._options import parse_options
from ropepatch.surgery import frequencies


@dataclass(frozen=True)
class Start:
    """What one rotary site turns by before the method: its own frequencies, or those of the base.

    Attributes:
        site: the place.
        own: the frequencies and gain in force in the model.
        rotary: those that the method starts from.
        geometry: the same as a method reads it; `original_length` is the length it starts from.
        trained_length: of the model, in tokens.
        on_scaled: what becomes of a native scaling: "replace", "multiply" (kept), or None where there is none.
    """

    site: Site
    own: Rotary
    rotary: Rotary
    geometry: RotaryGeometry
    trained_length: int
    on_scaled: str | None


def starts(
    host: nn.Module,
    sites: Sequence[Site],
    method: AttentionMethod,
    base: Mapping[str, Any] | str | None,
    *,
    original_length: int | None,
    on_scaled: str | None,
) -> list[Start]:
    """What each site starts from. Changes nothing.

    Raises:
        AlreadyScaledError: the method, or its base, computes frequencies, the checkpoint carries a native scaling, and
            `on_scaled` is None.
        UnsupportedModelError: a native scaling that is computed anew in every call.
    """
    entry, options = _base(base)
    return [_start(host, site, method, entry, options, original_length, on_scaled) for site in sites]


def _base(base: Mapping[str, Any] | str | None) -> tuple[FrequencyMethod | None, MethodOptions | None]:
    if base is None:
        return None, None
    if isinstance(base, str):
        base = {"method": base}
    if not isinstance(base, Mapping) or not isinstance(base.get("method"), str):
        raise OptionError(
            "base names a method of the frequencies seam with its options",
            given=base,
            allowed='for example base={"method": "yarn", "factor": 2}',
        )
    entry = METHODS.get(base["method"])
    if not isinstance(entry, FrequencyMethod):
        raise OptionError(
            f"{entry.name!r} cannot be a base: it is a method of the {entry.seam} seam",
            allowed=[item.name for item in METHODS if isinstance(item, FrequencyMethod)],
        )
    return entry, parse_options(entry, {name: value for name, value in base.items() if name != "method"})


def _start(
    host: nn.Module,
    site: Site,
    method: AttentionMethod,
    base: FrequencyMethod | None,
    options: MethodOptions | None,
    original_length: int | None,
    on_scaled: str | None,
) -> Start:
    if base is not None and method.rewrites:
        raise OptionError(f"{method.name!r} computes its own frequencies and takes no base", given=base.name)
    identity = METHODS.get("linear")
    assert isinstance(identity, FrequencyMethod)
    scaling = native_scaling(host, site)
    # A method that leaves frequencies alone keeps a native scaling; one that computes them must be told what to do.
    computes = base is not None or method.rewrites
    how = on_scaled if computes or on_scaled else "multiply"
    if scaling and how == "multiply" and scaling["rope_type"] in PER_CALL_TYPES:
        raise UnsupportedModelError(
            f"the native {scaling['rope_type']!r} scaling at {site.where} recomputes its frequencies in every call, so "
            "there is nothing fixed to build on",
            hint="use on_scaled='replace'",
        )
    (item,) = frequencies.plan(
        host,
        [site],
        # Under its own name an error tells of the method that was asked for.
        base or replace(identity, name=method.name),
        options if options is not None else parse_options(identity, {"factor": 1.0}),
        original_length=original_length,
        on_scaled=how if scaling else None,
    )
    result = item.result
    length = result.target_length if base is not None else item.geometry.original_length
    return Start(
        site,
        Rotary(item.base, item.base_gain),
        Rotary(result.inv_freq, result.attention_scaling),
        replace(item.geometry, inv_freq=result.inv_freq, original_length=length),
        item.geometry.original_length,
        how if scaling else None,
    )

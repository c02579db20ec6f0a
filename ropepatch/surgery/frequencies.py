"""The frequencies seam: new values for the rotary frequencies that a model already uses.

Plan first, touch second: everything that can be refused is refused before the model changes, and a failure on
the way undoes what was done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ropepatch.errors import AlreadyScaledError, OptionError, UnsupportedModelError
from ropepatch.families._native import (
    PER_CALL_TYPES,
    current_frequencies,
    current_gain,
    default_frequencies,
    native_scaling,
    softmax_scale_paths,
)
from ropepatch.families._rotary import config_of, gain_name
from ropepatch.families._site import Site
from ropepatch.methods._base import Frequencies, FrequencyMethod, MethodOptions, RotaryGeometry
from ropepatch.surgery import _table
from ropepatch.surgery._changes import AttributeChange, BufferChange, Change, ConfigChange, revert_all
from ropepatch.surgery._lengths import length_name, trained_length
from ropepatch.surgery._truth import as_longrope, merged, settled, words_for

ON_SCALED = ("replace", "multiply")


@dataclass(frozen=True)
class SitePlan:
    """What one site is and what it will be.

    Attributes:
        site: the place.
        base: the frequencies in force before the patch, float32, CPU, [rotary_dim / 2].
        base_gain: the gain on cos and sin in force before the patch.
        geometry: what the method computed from.
        result: what it computed, as the config can say it; the gain includes that of a multiplied native scaling.
        scaling: the native scaling that was there, or None.
        replaces: whether that scaling is dropped rather than built upon.
    """

    site: Site
    base: Tensor
    base_gain: float
    geometry: RotaryGeometry
    result: Frequencies
    scaling: dict[str, Any] | None
    replaces: bool


def plan(
    host: nn.Module,
    sites: Sequence[Site],
    method: FrequencyMethod,
    options: MethodOptions,
    *,
    original_length: int | None,
    on_scaled: str | None,
) -> list[SitePlan]:
    """Compute what `method` makes of each site. Changes nothing.

    Raises:
        AlreadyScaledError: a site carries a native scaling and `on_scaled` is None.
        OptionError: the options do not fit a site, or its trained length is unknown.
        UnsupportedModelError: a site cannot be read.
    """
    return [_plan_site(host, site, method, options, original_length, on_scaled) for site in sites]


def _plan_site(
    host: nn.Module,
    site: Site,
    method: FrequencyMethod,
    options: MethodOptions,
    original_length: int | None,
    on_scaled: str | None,
) -> SitePlan:
    config = config_of(host, host.get_submodule(site.path))
    scaling = native_scaling(host, site)
    if scaling and on_scaled is None:
        raise AlreadyScaledError(
            f"the checkpoint carries a native {scaling['rope_type']!r} scaling at {site.where}, and {method.name!r} "
            "would come on top of it",
            given={key: value for key, value in scaling.items() if not isinstance(value, list)},
            hint="say on_scaled='replace' to start from the pretrained frequencies and length, or "
            "on_scaled='multiply' to scale further what is there",
        )
    if scaling and on_scaled == "multiply" and scaling["rope_type"] in PER_CALL_TYPES:
        raise UnsupportedModelError(
            f"the native {scaling['rope_type']!r} scaling at {site.where} recomputes its frequencies in every call, so "
            "nothing can be multiplied onto them",
            hint="use on_scaled='replace'",
        )
    length = original_length or trained_length(config, scaling, on_scaled)
    if site.kind == "sincos_table":
        start, gain = _table.frequencies_of(host, site), 1.0
        base, base_gain = start, gain
    else:
        base, base_gain = current_frequencies(host, site), current_gain(host, site)
        start, gain = (
            (default_frequencies(host, site), 1.0) if scaling and on_scaled == "replace" else (base, base_gain)
        )
    geometry = RotaryGeometry(
        inv_freq=start,
        rope_theta=site.rope_theta or _theta_of(start),
        rotary_dim=int(site.rotary_dim or 0),
        head_dim=int(site.head_dim or site.rotary_dim or 0),
        original_length=length,
    )
    result = method.compute(geometry, options)
    result = replace(result, attention_scaling=result.attention_scaling * gain)
    if scaling and on_scaled == "multiply":
        # No single word of transformers says "this scaling on top of that one".
        result = replace(
            result,
            rope_parameters=as_longrope(geometry, result.inv_freq, result.attention_scaling, result.target_length),
        )
    result = settled(geometry, result, site, config)
    return SitePlan(site, base, base_gain, geometry, result, scaling, on_scaled == "replace")


def _theta_of(inv_freq: Tensor) -> float:
    """rope_theta read off the frequencies: f_1 = theta^(-2/d)."""
    if inv_freq.numel() < 2:
        raise UnsupportedModelError("the model does not state its rope_theta, and one plane does not tell it")
    return float(inv_freq[1].double() ** -inv_freq.numel())


def apply(host: nn.Module, plans: Sequence[SitePlan]) -> list[Change]:
    """Carry the plans out and make the config tell the truth. On any failure the model is as before.

    Returns:
        The changes in the order they were made, for `revert_all`.
    """
    changes: list[Change] = []
    try:
        for item in plans:
            _apply_site(host, item, changes)
        _apply_softmax_scale(host, plans, changes)
        _apply_config(host, plans, changes)
    except BaseException:
        revert_all(host, changes)
        raise
    return changes


def _apply_site(host: nn.Module, item: SitePlan, changes: list[Change]) -> None:
    site, result = item.site, item.result
    module = host.get_submodule(site.path)
    if site.kind == "sincos_table":
        _table.apply(host, site, item.base, result, changes)
        return
    # A float32 value also where a cast had rounded the buffer: angles are float32 whatever the model's dtype.
    changes.append(BufferChange.apply(host, site.path, site.name, result.inv_freq))
    gain = gain_name(site.name)
    if hasattr(module, gain):
        changes.append(AttributeChange.apply(host, site.path, gain, result.attention_scaling))
    elif result.attention_scaling != 1.0:
        raise UnsupportedModelError(
            f"{site.where} has no gain on cos and sin, which this method needs",
            hint="use ntk_by_parts, or attention_factor=1",
        )
    if item.scaling and item.scaling["rope_type"] in PER_CALL_TYPES:
        # Otherwise the module's own forward would write its frequencies back.
        types: Any = module.rope_type
        types = {**types, site.layer_type: "default"} if isinstance(types, dict) else "default"
        changes.append(AttributeChange.apply(host, site.path, "rope_type", types))


def _apply_softmax_scale(host: nn.Module, plans: Sequence[SitePlan], changes: list[Change]) -> None:
    gains = {_softmax_change(item) for item in plans}
    if gains == {1.0}:
        return
    if len(gains) > 1:
        raise OptionError(
            "the model's layer types would need different softmax scales", hint="leave mscale_all_dim out"
        )
    gain = gains.pop()
    for path in softmax_scale_paths(host):
        scale: Any = host.get_submodule(path).scaling
        changes.append(AttributeChange.apply(host, path, "scaling", scale * gain))


def _softmax_change(item: SitePlan) -> float:
    """The new softmax gain over the one that a replaced native scaling had put into the attention modules."""
    old = 1.0
    if item.scaling and item.replaces:
        all_dim, factor = item.scaling.get("mscale_all_dim") or 0, float(item.scaling.get("factor") or 1.0)
        old = (0.1 * all_dim * math.log(factor) + 1.0) ** 2 if all_dim and factor > 1 else 1.0
    return item.result.softmax_gain / old


def _apply_config(host: nn.Module, plans: Sequence[SitePlan], changes: list[Change]) -> None:
    """Write what was done into every config that a changed module holds, and into the model's own."""
    places = {item.site.path for item in plans if hasattr(host.get_submodule(item.site.path), "config")}
    for item in plans:
        _write_config(host, item.site.path if item.site.path in places else "", item, plans, changes)
    root: Any = host.config
    if root.get_text_config(decoder=True) is root and all(
        host.get_submodule(path).config is not root for path in places
    ):
        # The modules hold copies of the config: the model's own is what gets saved.
        _write_config(host, "", plans[0], plans, changes)


def _write_config(host: nn.Module, path: str, item: SitePlan, plans: Sequence[SitePlan], changes: list[Change]) -> None:
    config: Any = host.get_submodule(path).config
    parameters = getattr(config, "rope_parameters", None)
    if parameters:
        new = merged(parameters, item.site.layer_type, words_for(item.geometry, item.result, item.site, config))
        if new != parameters:
            changes.append(ConfigChange.apply(host, path, "rope_parameters", new))
    name = length_name(config)
    target_length = max(other.result.target_length for other in plans)
    if name and getattr(config, name) != target_length:
        changes.append(ConfigChange.apply(host, path, name, target_length))

"""The config after a patch: what transformers would have to read to arrive at the same frequencies."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ropepatch.families._site import Site
from ropepatch.methods._base import Frequencies, RotaryGeometry, divided, plain_periods

_SCALING_KEYS = frozenset(
    (
        *("rope_type", "type", "factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        *("short_factor", "long_factor", "low_freq_factor", "high_freq_factor"),
    )
)
_NEEDS_ORIGINAL = ("yarn", "longrope", "llama3")
# JSON has no infinity. Times a period above 1 this one is infinite in float32: the plane stands still.
_STILL = torch.finfo(torch.float32).max


def settled(geometry: RotaryGeometry, result: Frequencies, site: Site, config: Any) -> Frequencies:
    """`result` as plain transformers will read it: what only `longrope` divisors can say takes their values.

    Not every float32 is the reciprocal of one, so a frequency may move by its last bit. Without this a saved model
    and the patched one would differ by that bit.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return result
    words = words_for(geometry, result, site, config)
    if words["rope_type"] != "longrope":
        return result
    inv_freq = divided(plain_periods(geometry), words["long_factor"])
    return replace(result, inv_freq=inv_freq, rope_parameters=words)


def words_for(geometry: RotaryGeometry, result: Frequencies, site: Site, config: Any) -> dict[str, Any]:
    """What to write into the `rope_parameters` of `config`, which has some, at this place."""
    words = _spelled(geometry, result, site, config)
    if _is_refused(config, merged(config.rope_parameters, site.layer_type, words)):
        words = as_longrope(geometry, result.inv_freq, result.attention_scaling, result.target_length)
    return words


def _spelled(geometry: RotaryGeometry, result: Frequencies, site: Site, config: Any) -> dict[str, Any]:
    """`result` in the words that transformers reads at this place: the method's own, else `longrope` factors."""
    words = result.rope_parameters

    def general() -> dict[str, Any]:
        return as_longrope(geometry, result.inv_freq, result.attention_scaling, result.target_length)

    if site.rope_type == "proportional":
        # Trained with planes that stand still: "linear" would set them turning, and only longrope can name them.
        linear = words is not None and words["rope_type"] == "linear"
        words = (
            {**words, "rope_type": "proportional"} if words and linear else {**general(), "partial_rotary_factor": 1.0}
        )
    elif words is None or _goes_unread(words, site.layer_type, config):
        words = general()
    if words["rope_type"] in _NEEDS_ORIGINAL:
        words = {"original_max_position_embeddings": geometry.original_length, **words}
    return dict(words)


def _goes_unread(words: dict[str, Any], label: str | None, config: Any) -> bool:
    # yarn's `truncate` is looked for at the top of the dict only, not under a label.
    unread_truncate = label is not None and words.get("truncate") is False
    # A model with one theta a layer uses it as a name: it must stay.
    unread_theta = "rope_theta" in words and hasattr(config, "layer_rope_theta")
    return unread_truncate or unread_theta


def as_longrope(geometry: RotaryGeometry, inv_freq: Tensor, gain: float, target_length: int) -> dict[str, Any]:
    """Any frequencies as `longrope` with one list for short and long: rope_theta^(-2i/d) / factor_i.

    In float32 these divisors give the very frequencies wherever any do, else their neighbours.
    """
    divisors = _divisors(plain_periods(geometry), inv_freq).tolist()
    return {
        "rope_type": "longrope",
        "factor": target_length / geometry.original_length,
        "short_factor": divisors,
        "long_factor": list(divisors),
        "attention_factor": gain,
        "original_max_position_embeddings": geometry.original_length,
    }


def _divisors(period: Tensor, inv_freq: Tensor) -> Tensor:
    nearest = (1 / (period.double() * inv_freq.double())).float().clamp(max=_STILL)
    up, down = (torch.nextafter(nearest, torch.full_like(nearest, end)) for end in (torch.inf, 0.0))
    # 1 first: a plane that the method leaves alone says so.
    candidates = torch.stack([torch.ones_like(nearest), nearest, up.clamp(max=_STILL), down])
    misses = (1 / (candidates * period) - inv_freq).abs().tolist()
    best = [min(range(len(candidates)), key=lambda row: misses[row][plane]) for plane in range(len(period))]
    return candidates[best, torch.arange(len(period))]


def merged(parameters: dict[str, Any], label: str | None, words: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config's `rope_parameters` with `words` in force at `label`; what is not scaling is kept."""
    parameters = copy.deepcopy(parameters)
    nested = parameters.get(label) if label is not None else None
    old = nested if isinstance(nested, dict) else parameters
    new = {**{key: value for key, value in old.items() if key not in _SCALING_KEYS}, **words}
    if "llama_4_scaling_beta" in old:
        # The attention modules of such a model scale queries by the position over this length, scaled rotary or not.
        new.setdefault("original_max_position_embeddings", old["original_max_position_embeddings"])
    return {**parameters, label: new} if isinstance(nested, dict) and label is not None else new


def _is_refused(config: Any, parameters: dict[str, Any]) -> bool:
    """Whether the config's own class allows other scalings only (Phi-3: longrope), so that it could not be saved."""
    from transformers import PreTrainedConfig

    if type(config).validate_rope is PreTrainedConfig.validate_rope:
        return False
    candidate = copy.copy(config)
    vars(candidate)["rope_parameters"] = parameters
    try:
        candidate.validate_rope()
    except ValueError:
        return True
    return False

"""Frequencies and gain in the words of a GGUF file: keys that llama.cpp scales by, or divisors one a plane."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rounding of a base or a factor to float32, which is how a file keeps them.
_TOLERANCE = 1e-6
# A plane that stands still, as a divisor: it turns less than 1e-20 rad over any context. No infinity, for not every
# backend of llama.cpp promises to compute with it.
_STILL = 1e30
# llama.cpp's own, fixed in the architectures that we write: only others read `rope.scaling.yarn_beta_fast` and so on.
_BETA_FAST, _BETA_SLOW = 32.0, 1.0


@dataclass(frozen=True)
class Rotation:
    """What a file says of positions.

    Attributes:
        base: `rope.freq_base`.
        scaling: `rope.scaling.type`: "none", "linear" or "yarn".
        factor: `rope.scaling.factor`.
        original_length: `rope.scaling.original_context_length`, tokens; yarn's ramp hangs on it.
        attn_factor: `rope.scaling.attn_factor`; llama.cpp multiplies its own gain on cos and sin by it, whatever the
            type (src/llama-context.cpp).
        divisors: `rope_freqs.weight`, float32 [d/2], or None.
    """

    base: float
    scaling: str
    factor: float
    original_length: int
    attn_factor: float = 1.0
    divisors: Tensor | None = None


def frequencies_of(rotation: Rotation, dims: int) -> Tensor:
    """The frequencies that llama.cpp turns `dims` dimensions by, float64 [dims/2] (ggml's rope_yarn).

    base^(-2i/d) over the plane's divisor; over the factor too for "linear"; for "yarn" a mix of both by a ramp over the
    index of the plane, whose ends are whole indices.
    """
    base, factor = _float32(rotation.base), _float32(rotation.factor)
    plane = torch.arange(dims // 2, dtype=torch.float64)
    kept = base ** (-2 * plane / dims)
    if rotation.divisors is not None:
        kept = kept / rotation.divisors.double()
    if rotation.scaling == "none":
        return kept
    if rotation.scaling == "linear":
        return kept / factor
    low = max(0, math.floor(_corner(rotation, dims, base, _BETA_FAST)))
    high = min(dims - 1, math.ceil(_corner(rotation, dims, base, _BETA_SLOW)))
    ramp = ((plane - low) / max(0.001, high - low)).clamp(0, 1)
    return kept * (1 - ramp) + kept / factor * ramp


def _corner(rotation: Rotation, dims: int, base: float, turns: float) -> float:
    """The plane, as a real number, that makes so many turns within the trained length."""
    return dims * math.log(rotation.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))


def gain_of(rotation: Rotation) -> float:
    """The gain that llama.cpp puts on cos and sin: for "yarn" 0.1 ln(factor) + 1 of its own."""
    own = 1 + 0.1 * math.log(_float32(rotation.factor)) if rotation.scaling == "yarn" else 1.0
    return own * _float32(rotation.attn_factor)


def spell(
    inv_freq: Tensor, gain: float, *, theta: float, original_length: int, yarn: dict[str, Any] | None, divisors: bool
) -> Rotation | None:
    """The plainest words for frequencies and gain, or None where llama.cpp has none.

    Args:
        inv_freq: [d/2].
        gain: on cos and sin.
        theta: base of the model's own frequencies.
        original_length: trained length, tokens.
        yarn: transformers' parameters, where they say "yarn".
        divisors: whether the architecture reads one divisor a plane.
    """
    for candidate in _candidates(inv_freq.double(), theta, original_length, yarn, divisors):
        found = frequencies_of(candidate, 2 * inv_freq.numel())
        if torch.allclose(found, inv_freq.double(), rtol=_TOLERANCE, atol=1e-20):
            own = gain_of(candidate)
            return Rotation(**{**vars(candidate), "attn_factor": gain / own})
    return None


def _candidates(
    inv_freq: Tensor, theta: float, length: int, yarn: dict[str, Any] | None, divisors: bool
) -> Iterator[Rotation]:
    yield Rotation(theta, "none", 1.0, length)
    first, last = float(inv_freq[0]), float(inv_freq[-1])
    if first > 0:
        yield Rotation(theta, "linear", 1 / first, length)
    planes = inv_freq.numel()
    if first > 0 and last > 0 and planes > 1:
        # Another base: the last plane turns by base^(-(d - 2) / d).
        base = (first / last) ** (planes / (planes - 1))
        if math.isclose(first, 1, rel_tol=_TOLERANCE):
            yield Rotation(base, "none", 1.0, length)
        yield Rotation(base, "linear", 1 / first, length)
    if yarn is not None:
        yield Rotation(
            theta, "yarn", float(yarn["factor"]), int(yarn.get("original_max_position_embeddings") or length)
        )
    if divisors:
        # float32(theta): the divisors take up what its rounding leaves.
        series = _float32(theta) ** (-torch.arange(planes, dtype=torch.float64) / planes)
        quotients = (series / inv_freq).clamp(max=_STILL).float()
        yield Rotation(theta, "none", 1.0, length, divisors=quotients)


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))

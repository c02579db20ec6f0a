"""KERPLE: a penalty by a conditionally positive definite kernel of the distance, two learned numbers a head."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ropepatch.attention.scheme import Scheme, unrotated
from ropepatch.methods._attention import LayerGeometry, attention_method
from ropepatch.methods._bias import FINETUNE, LearnedBias, distances
from ropepatch.methods._swap import SwapOptions, swap_rule

# Where the published code (chijames/KERPLE) clamps its parameters, at every step and so at the start.
SMALLEST = 0.01


class KerpleOptions(SwapOptions):
    """Options of `kerple`."""

    form: Literal["log", "power"] = Field(
        default="log", description="kernel: -p log(1 + a distance), the paper's best, or -a distance^p"
    )


class KerpleLog(nn.Module):
    """-p_h log(1 + a_h |i - j|), p = exp(log_p), a = exp(log_a): positive whatever training does.

    Starts in the ranges of the published code, p in (0, 2) and a in (0, 1), but spread evenly over the heads instead
    of drawn at random.

    Attributes:
        log_p, log_a: parameters, [heads], float32 when made.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        p, a = _spread(heads)
        self.log_p = nn.Parameter(p.log())
        self.log_a = nn.Parameter(a.log())

    def forward(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """float32 [B, heads, T, N] from int64 [B, T] and [B, N]."""
        distance = distances(q_positions, k_positions).abs().float()
        return log_kernel(distance, self.log_p.float().exp(), self.log_a.float().exp())


class KerplePower(nn.Module):
    """-a_h |i - j|^p_h, a = exp(log_a) > 0, p = 2 sigmoid(logit_p) in (0, 2), beyond which the kernel is none.

    Starts as `KerpleLog` does.

    Attributes:
        log_a, logit_p: parameters, [heads], float32 when made.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        p, a = _spread(heads)
        self.log_a = nn.Parameter(a.log())
        self.logit_p = nn.Parameter((p / 2).logit())

    def forward(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """float32 [B, heads, T, N] from int64 [B, T] and [B, N]."""
        distance = distances(q_positions, k_positions).abs().float()
        return power_kernel(distance, 2 * self.logit_p.float().sigmoid(), self.log_a.float().exp())


def log_kernel(distance_BTN: Tensor, p_H: Tensor, a_H: Tensor) -> Tensor:
    """-p log(1 + a distance), [B, H, T, N]."""
    return -p_H[:, None, None] * torch.log1p(a_H[:, None, None] * distance_BTN[:, None])


def power_kernel(distance_BTN: Tensor, p_H: Tensor, a_H: Tensor) -> Tensor:
    """-a distance^p, [B, H, T, N]."""
    return -a_H[:, None, None] * distance_BTN[:, None].pow(p_H[:, None, None])


def _spread(heads: int) -> tuple[Tensor, Tensor]:
    """Initial (p, a), each [heads], float32: even over (0, 2) and (0, 1), and unrelated to each other."""
    index = torch.arange(heads, dtype=torch.float64)
    p = 2 * (index + 0.5) / heads
    # Multiples of the golden section fill the interval evenly in an order that p does not follow.
    a = (0.5 + index * (math.sqrt(5) - 1) / 2) % 1
    return p.clamp(min=SMALLEST).float(), a.clamp(min=SMALLEST).float()


def _learned(layer: LayerGeometry, options: KerpleOptions) -> nn.Module:
    return KerpleLog(layer.heads) if options.form == "log" else KerplePower(layer.heads)


@attention_method(
    "kerple",
    options=KerpleOptions,
    paper="arXiv 2205.09921",
    summary="no rotation; scores fall with the logarithm or a power of the distance, learned per head",
    learned=_learned,
    finetune=FINETUNE,
    becomes="relative_bias",
    mechanisms=("rotary", "alibi", "learned", "sinusoidal"),
    table=swap_rule("factor"),
)
def kerple(layer: LayerGeometry, options: KerpleOptions) -> Scheme:  # noqa: ARG001
    """bias_h(i, j) = -p_h log(1 + a_h |i - j|) or -a_h |i - j|^p_h, computed by the learned part."""
    return unrotated(LearnedBias(), both_ways=layer.both_ways)

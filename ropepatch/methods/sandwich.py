"""Sandwich: the inner product of two sinusoidal embeddings as a bias, without parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ropepatch.attention.scheme import Scheme, unrotated
from ropepatch.methods._attention import LayerGeometry, attention_method
from ropepatch.methods._bias import FINETUNE, without_autocast
from ropepatch.methods._swap import SwapOptions, swap_rule

BASE = 1e4


class SandwichOptions(SwapOptions):
    """Options of `sandwich`, named as in the paper."""

    bar_d: int = Field(default=128, ge=2, le=65536, description="dimensions of the sinusoidal embeddings, even")

    @model_validator(mode="after")
    def _even(self) -> Self:
        if self.bar_d % 2:
            raise ValueError(f"bar_d={self.bar_d} must be even")
        return self


@dataclass(frozen=True, eq=False)
class SandwichBias:
    """(sum_k cos((i - j) w_k) - d/2) / ratio_h.

    Attributes:
        inv_freq: w_k, float64, CPU, [d / 2], radians per token.
        ratios: float32, CPU, [heads].
    """

    inv_freq: Tensor
    ratios: Tensor
    slopes: ClassVar[Tensor | None] = None

    def __call__(self, q_positions: Tensor, k_positions: Tensor, module: Any = None) -> Tensor:  # noqa: ARG002
        with without_autocast(q_positions.device):
            # A product of two thin matrices; d/2 cosines of every pair would cost that many times more.
            products = self._embed(q_positions) @ self._embed(k_positions).transpose(1, 2)
        centred = products - self.inv_freq.numel()
        return centred[:, None] / self.ratios.to(centred.device)[:, None, None]

    def _embed(self, positions_BL: Tensor) -> Tensor:
        """float32 [B, L, d]. The angles are float64 where the device has it: products must not feel the position."""
        dtype = torch.float32 if positions_BL.device.type == "mps" else torch.float64
        angles = positions_BL[..., None].to(dtype) * self.inv_freq.to(positions_BL.device, dtype)
        return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


@attention_method(
    "sandwich",
    options=SandwichOptions,
    paper="arXiv 2212.10356",
    summary="no rotation; the inner product of sinusoidal embeddings is added to the scores, no parameters",
    finetune=FINETUNE,
    becomes="relative_bias",
    mechanisms=("rotary", "alibi", "learned", "sinusoidal"),
    table=swap_rule("factor"),
)
def sandwich(layer: LayerGeometry, options: SandwichOptions) -> Scheme:
    """bias_h(i, j) = (sum_{k < d/2} cos((i - j) / 10000^(2k/d)) - d/2) / ratio_h, ratio_h = 8 h / H, h = 1..H.

    Established from two public implementations that agree (NeMo's and the attention-gym's): the sum, the base, the
    ratios, and d = 128 of its own rather than the model's width. Not settled: k runs from 0 here and in
    attention-gym, as in the sinusoidal embeddings, but from 1 in NeMo, which makes every wave 10000^(2/d) times
    longer. The d/2 is NeMo's: distance 0 gets no bias, and a softmax does not feel it (attention sinks would).
    """
    exponents = torch.arange(0, options.bar_d, 2, dtype=torch.float64) / options.bar_d
    ratios = torch.arange(1, layer.heads + 1, dtype=torch.float32) * (8 / layer.heads)
    return unrotated(SandwichBias(BASE**-exponents, ratios), both_ways=layer.both_ways)

"""ALiBi: a penalty linear in the distance, steeper in some heads than in others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ropepatch.attention.scheme import Scheme, unrotated
from ropepatch.errors import OptionError
from ropepatch.methods._attention import LayerGeometry, SchemeOptions, attention_method
from ropepatch.methods._base import MAX_FACTOR
from ropepatch.methods._bias import FINETUNE, distances
from ropepatch.methods._swap import swap_rule


class AlibiOptions(SchemeOptions):
    """Options of `alibi`."""

    factor: float = Field(
        default=1.0,
        ge=1.0,
        le=MAX_FACTOR,
        description="target length / trained length: every slope is divided by it (arXiv 2310.13017)",
    )
    interpolate: bool | None = Field(
        default=None,
        description="of a model with a position table: divide the slopes by the factor there too; by default the "
        "factor only says how far it reaches, and the slopes are the paper's",
    )


@dataclass(frozen=True, eq=False)
class AlibiBias:
    """-slope x (i - j), float32, from int64 distances.

    Attributes:
        slopes: [heads], float32, CPU, scores per token of distance.
    """

    slopes: Tensor

    def __call__(self, q_positions: Tensor, k_positions: Tensor, module: Any = None) -> Tensor:  # noqa: ARG002
        # The difference before the product: slope x absolute position would lose neighbours far from the start.
        distance = distances(q_positions, k_positions).float()
        return -self.slopes.to(distance.device)[:, None, None] * distance[:, None]


@dataclass(frozen=True, eq=False)
class SymmetricBias:
    """-slope x |i - j|, float32: ALiBi for encoders, which see later tokens too.

    The simplest of the forms that the authors name for encoders (issue 5 of ofirpress/attention_with_linear_biases). It
    does not tell left from right.

    Attributes:
        per_head: [heads], float32, CPU, scores per token of distance.
    """

    per_head: Tensor
    # Linear on either side of the query only, so not the fast form.
    slopes: ClassVar[Tensor | None] = None

    def __call__(self, q_positions: Tensor, k_positions: Tensor, module: Any = None) -> Tensor:  # noqa: ARG002
        distance = distances(q_positions, k_positions).abs().float()
        return -self.per_head.to(distance.device)[:, None, None] * distance[:, None]


def alibi_slopes(heads: int, bias_max: float = 8.0) -> Tensor:
    """The slopes of the paper, for any number of heads.

    2^(-bias_max h / H), h = 1..H, for H a power of two; else the slopes of the power of two below H, followed by every
    other slope (the first, the third, ...) of the power above. Rounded once from float64.

    Args:
        heads: H, at least 1.
        bias_max: the exponent of the last head; 8 in the paper, `alibi_bias_max` in MPT.

    Returns:
        [heads], float32, CPU.

    Raises:
        OptionError: no heads.
    """
    if heads < 1:
        raise OptionError("ALiBi needs heads", given=heads, allowed=">= 1")
    below = 1 << (heads.bit_length() - 1)
    exponents = [bias_max * h / below for h in range(1, below + 1)]
    exponents += [bias_max * h / (2 * below) for h in range(1, 2 * (heads - below), 2)]
    return torch.tensor([math.pow(2.0, -exponent) for exponent in exponents], dtype=torch.float32)


@attention_method(
    "alibi",
    options=AlibiOptions,
    paper="arXiv 2108.12409; factor: arXiv 2310.13017",
    summary="no rotation; scores fall linearly with the distance, one slope a head",
    finetune=FINETUNE,
    becomes="alibi",
    mechanisms=("rotary", "alibi", "learned", "sinusoidal"),
    table=swap_rule("interpolate", interpolate=False),
)
def alibi(layer: LayerGeometry, options: AlibiOptions) -> Scheme:
    """bias_h(i, j) = -m_h / s |i - j|, m_h from `alibi_slopes`, s the factor, or 1 where `interpolate` is False.

    In the place of a table slopes are new to the weights: those of the paper, trained at the old length, extrapolate.
    """
    slopes = alibi_slopes(layer.heads) / (1.0 if options.interpolate is False else options.factor)
    return unrotated(SymmetricBias(slopes), both_ways=True) if layer.both_ways else unrotated(AlibiBias(slopes))

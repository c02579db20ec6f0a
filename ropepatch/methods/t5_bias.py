"""T5's relative bias: one learned number for each head and each bucket of distances."""

from __future__ import annotations

import math
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ropepatch.attention.scheme import Scheme, unrotated
from ropepatch.errors import OptionError
from ropepatch.methods._attention import LayerGeometry, attention_method
from ropepatch.methods._bias import FINETUNE, SEED, LearnedBias, distances
from ropepatch.methods._swap import SwapOptions, swap_rule

INITIAL_STD = 0.02


class T5BiasOptions(SwapOptions):
    """Options of `t5_bias`, `relative_attention_num_buckets` and `relative_attention_max_distance` in transformers."""

    buckets: int = Field(
        default=32, ge=2, le=65536, description="rows of the table: one a distance up to half of them, the rest wider"
    )
    max_distance: int = Field(
        default=128, ge=2, le=2**31, description="distances from here on, in tokens, share the last bucket"
    )

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.max_distance <= self.buckets // 2:
            raise ValueError(f"max_distance={self.max_distance} must be above buckets // 2 = {self.buckets // 2}")
        return self


class T5Bias(nn.Module):
    """table[bucket(i - j), h].

    The table starts as a small normal draw (0.02), the same in every layer of a model. T5 itself draws with
    1 / sqrt(model width), which for most models is about that, and shares one table between its layers.

    Attributes:
        table: parameter, [buckets, heads], float32 when made.
        both_ways: half of the buckets are for keys after the query, as in T5's encoder.
    """

    def __init__(self, heads: int, buckets: int, max_distance: int, both_ways: bool = False) -> None:
        super().__init__()
        self.max_distance, self.both_ways = max_distance, both_ways
        generator = torch.Generator().manual_seed(SEED)
        # Not an Embedding: adapters and initialisers that collect those must not find it.
        draw = torch.randn(buckets, heads, generator=generator, dtype=torch.float32, device="cpu")
        self.table = nn.Parameter(INITIAL_STD * draw)

    def forward(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """float32 [B, heads, T, N] from int64 [B, T] and [B, N]."""
        distance, buckets = distances(q_positions, k_positions), self.table.shape[0]
        if self.both_ways:
            half = buckets // 2
            rows = bucket(distance.abs(), half, self.max_distance) + half * (distance < 0)
        else:
            rows = bucket(distance, buckets, self.max_distance)
        return nn.functional.embedding(rows, self.table.float()).permute(0, 3, 1, 2)


def bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance, as T5's decoder counts: below half of `buckets` a distance is its own bucket, the
    other half is logarithmic up to `max_distance`, and whatever lies beyond falls in the last.

    Operation for operation what transformers computes with bidirectional=False, so that borders round alike.

    Args:
        distance: i - j, int64, any shape; negative counts as 0.
        buckets, max_distance: as in `T5BiasOptions`.

    Returns:
        int64 in [0, buckets), of the same shape.
    """
    distance = distance.clamp(min=0)
    exact = buckets // 2
    # Clamped for distances that are not taken from here: log 0 has no integer.
    steps = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    wide = (exact + steps.long()).clamp(max=buckets - 1)
    return torch.where(distance < exact, distance, wide)


@attention_method(
    "t5_bias",
    options=T5BiasOptions,
    paper="arXiv 1910.10683",
    summary="no rotation; a learned number for each head and bucket of distances is added to the scores",
    learned=lambda layer, options: T5Bias(layer.heads, options.buckets, options.max_distance, layer.both_ways),
    finetune=FINETUNE,
    becomes="relative_bias",
    mechanisms=("rotary", "alibi", "learned", "sinusoidal"),
    table=swap_rule("factor"),
)
def t5_bias(layer: LayerGeometry, options: T5BiasOptions) -> Scheme:
    """bias_h(i, j) = table[bucket(i - j), h], computed by the learned part.

    T5 does not divide its scores by sqrt(head_dim); the model that is patched keeps its own scaling.

    Raises:
        OptionError: in an encoder, too few buckets to count either way.
    """
    if layer.both_ways and options.buckets < 4:
        raise OptionError("an encoder needs buckets for either way", given=options.buckets, allowed="at least 4")
    return unrotated(LearnedBias(), both_ways=layer.both_ways)

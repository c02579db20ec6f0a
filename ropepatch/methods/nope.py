"""NoPE: no position at all; order is left to the causal mask."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from ropepatch.attention.scheme import Map, Scheme, unrotated
from ropepatch.methods._attention import LayerGeometry, SchemeOptions, attention_method, logn_scale
from ropepatch.methods._base import MAX_FACTOR
from ropepatch.methods._tables import TableRule, zeros


class NopeOptions(SchemeOptions):
    """Options of `nope`."""

    scale: float = Field(
        default=1.0, gt=0, le=1e6, description="factor on the scores; above 1 sharpens attention at length"
    )
    factor: float = Field(
        default=1.0,
        ge=1.0,
        le=MAX_FACTOR,
        description="target length / trained length, of a model with a position table; nothing limits others",
    )


def _grid(rows: Tensor, size: tuple[int, int], options: NopeOptions) -> Tensor:
    del options
    return torch.zeros(*size, rows.shape[-1])


@attention_method(
    "nope",
    aliases=("drope",),
    options=NopeOptions,
    paper="arXiv 2404.12224; arXiv 2512.12167",
    summary="no rotation, no bias, no position table: nothing but the causal mask knows of position",
    finetune="Takes the positions away that the weights were trained with: useless untuned, it needs a short "
    "recalibration run.",
    becomes="none",
    mechanisms=("rotary", "alibi", "learned", "sinusoidal"),
    table=TableRule(zeros, grid=_grid, only=("factor",), without=("scale", "logn"), becomes="none"),
)
def nope(layer: LayerGeometry, options: NopeOptions) -> Scheme:
    """score(i, j) = scale <q_i, k_j>, times the log-n factor of i where `logn` asks for it.

    arXiv 2404.12224 also searches a scale for each head; this one is the same for all.

    Raises:
        OptionError: `logn` with a trained length below 2.
    """
    return unrotated(scale=None if options.scale == 1 else _scale(layer, options))


def _scale(layer: LayerGeometry, options: NopeOptions) -> Map:
    # The registry adds log-n only where a scheme has no scale of its own.
    logn = logn_scale(layer.length) if options.logn else None

    def scale(positions: Tensor) -> Tensor:
        factors = torch.ones_like(positions, dtype=torch.float32) if logn is None else logn(positions)
        return factors * options.scale

    return scale

"""The oracle: a scheme computed pair by pair, quadratic in memory, in float64. Every other path is held against it."""

from __future__ import annotations

import torch
from torch import Tensor

from ropepatch.attention.rotation import Layout
from ropepatch.attention.scheme import Rotary, Scheme


def attend(
    q_HTD: Tensor,
    k_HND: Tensor,
    v_HND: Tensor,
    scheme: Scheme,
    *,
    q_positions: Tensor,
    k_positions: Tensor,
    rotary: Rotary | None = None,
    layout: Layout | None = None,
    visible: Tensor | None = None,
    causal: bool = True,
    scaling: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    module: object = None,
) -> Tensor:
    """Attention of one sequence, float64.

    Args:
        q_HTD, k_HND, v_HND: queries, keys and values of one row of the batch, with as many key heads as query heads.
        scheme: what to compute.
        q_positions, k_positions: int64, [T] and [N].
        rotary, layout: the layer's own frequencies and where they sit in a head; None without rotation.
        visible: bool [T, N], pairs that may see each other besides the scheme's own rule; all with k <= q by default.
        causal: keys after the query do not count; False as in encoders.
        scaling: factor on the products; 1 / sqrt(D) by default.
        softcap: scores become softcap * tanh(score / softcap).
        sinks: [H], logits that join the softmax and carry no value.
        module: the learned part of the bias.

    Returns:
        [H, T, D], float64; zero where a query sees nothing.
    """
    heads, rows, dim = q_HTD.shape
    columns = k_HND.shape[1]
    q, k, v = q_HTD.double(), k_HND.double(), v_HND.double()
    scores = torch.full((heads, rows, columns), -torch.inf, dtype=torch.float64)
    low, high = int(q_positions.min()), int(q_positions.max()) + 1
    allowed = (k_positions[None, :] <= q_positions[:, None]) | (not causal)
    allowed = allowed if visible is None else allowed & visible
    held = torch.zeros(rows, columns, dtype=torch.int64)
    for segment in scheme.segments(low, high):
        inside = allowed & (k_positions[None, :] >= segment.first(q_positions)[:, None])
        inside &= k_positions[None, :] <= segment.last(q_positions)[:, None]
        held += inside
        turned_q, turned_k = q, k
        if segment.query is not None:
            used = segment.rotary or rotary
            assert used is not None and layout is not None
            turned_q = _turn(q, segment.query(q_positions), used, layout)
            key_map = segment.key
            turned_k = _turn(k, key_map(k_positions) if key_map else torch.zeros_like(k_positions), used, layout)
        products = turned_q @ turned_k.transpose(1, 2)
        scores = torch.where(inside, products, scores)
    assert int(held.max()) <= 1, "segments overlap"
    scores = scores * (dim**-0.5 if scaling is None else scaling)
    if scheme.scale is not None:
        scores = scores * scheme.scale(q_positions).double()[:, None]
    if softcap:
        scores = torch.where(torch.isfinite(scores), softcap * torch.tanh(scores / softcap), scores)
    if scheme.bias is not None:
        scores = scores + scheme.bias(q_positions[None], k_positions[None], module)[0].double()
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(heads, rows, 1)), dim=-1)
    blind = scores.amax(-1, keepdim=True) == -torch.inf
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return weights[..., :columns] @ v


def _turn(x: Tensor, positions: Tensor, rotary: Rotary, layout: Layout) -> Tensor:
    """Rotation by 2 x 2 matrices, one plane after the other."""
    out = x.clone()
    half = layout.dims // 2
    for plane in range(half):
        if layout.interleaved:
            a, b = layout.start + 2 * plane, layout.start + 2 * plane + 1
        else:
            a, b = layout.start + plane, layout.start + plane + half
        # The angle is float32 by contract; all that follows is float64.
        angle = (positions.float() * rotary.inv_freq[plane]).double() * (-1 if layout.backward else 1)
        cos, sin = angle.cos() * rotary.gain, angle.sin() * rotary.gain
        out[..., a] = x[..., a] * cos - x[..., b] * sin
        out[..., b] = x[..., b] * cos + x[..., a] * sin
    return out

"""The general path: softcap, dropout, any bias and additive masks. Scores of one block of queries at a time.

Differentiable by autograd; under autograd a block's scores are made again on the way back, so memory stays linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ropepatch.attention.forms import key_form, query_form
from ropepatch.attention.layer import Layer
from ropepatch.attention.plan import Block, make_plan
from ropepatch.attention.visibility import Visibility

BLOCK = 128


def attend(q_BHTD: Tensor, k_BKND: Tensor, v_BKNV: Tensor, layer: Layer, visibility: Visibility) -> Tensor:
    """Attention by any scheme. Arguments and result as in `chunked.attend`."""
    plan = make_plan(visibility, layer.scheme, BLOCK, whole=False)
    forms = _forms(plan, k_BKND, layer, visibility)
    tracked = torch.is_grad_enabled()
    outputs = []
    for block in plan:
        arguments = (q_BHTD[:, :, block.start : block.stop], v_BKNV, layer, visibility, block, forms)
        if tracked and len(plan) > 1:
            outputs.append(checkpoint(_block, *arguments, use_reentrant=False))
        else:
            outputs.append(_block(*arguments))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def weights(
    q_BHTD: Tensor, k_BKND: Tensor, layer: Layer, visibility: Visibility, block_size: int
) -> Iterator[tuple[Block, slice, Tensor]]:
    """The attention weights themselves, to look at: `block_size` queries at a time.

    Yields:
        A block of queries, the keys that any of them sees, and the weights on these, float32 [B, H, t, n]. What is
        missing to a sum of 1 lies on learned sinks. Blocks that see nothing are left out.
    """
    plan = make_plan(visibility, layer.scheme, block_size, whole=False)
    forms = _forms(plan, k_BKND, layer, visibility)
    for block in plan:
        keys = _keys(block)
        if keys.stop > keys.start:
            q = q_BHTD[:, :, block.start : block.stop]
            yield block, keys, _weights(q, k_BKND.shape[1], layer, visibility, block, keys, forms)


def _forms(plan: Sequence[Block], k_BKND: Tensor, layer: Layer, visibility: Visibility) -> dict[str, Tensor]:
    """The keys in every form that some segment wants."""
    forms: dict[str, Tensor] = {}
    for block in plan:
        for task in block.tasks:
            if task.segment.form not in forms:
                forms[task.segment.form] = key_form(k_BKND, task.segment, layer, visibility.k_positions)
    return forms


def _keys(block: Block) -> slice:
    """The keys that a block sees: from the first of all tasks to the last."""
    return slice(min((task.start for task in block.tasks), default=0), max((t.stop for t in block.tasks), default=0))


def _block(
    q_BHtD: Tensor, v_BKNV: Tensor, layer: Layer, seen: Visibility, block: Block, forms: dict[str, Tensor]
) -> Tensor:
    batch, heads, rows, _ = q_BHtD.shape
    key_heads = v_BKNV.shape[1]
    keys = _keys(block)
    if keys.stop <= keys.start:
        return q_BHtD.new_zeros(batch, heads, rows, v_BKNV.shape[-1])
    weights = _weights(q_BHtD, key_heads, layer, seen, block, keys, forms)
    weights = nn.functional.dropout(weights, layer.dropout, training=layer.dropout > 0)
    values = v_BKNV[:, :, keys].float()
    out = torch.einsum("bkgtn,bknv->bkgtv", weights.unflatten(1, (key_heads, -1)), values)
    return out.flatten(1, 2).to(v_BKNV.dtype)


def _weights(
    q_BHtD: Tensor,
    key_heads: int,
    layer: Layer,
    seen: Visibility,
    block: Block,
    keys: slice,
    forms: dict[str, Tensor],
) -> Tensor:
    batch, heads, rows, _ = q_BHtD.shape
    queries = slice(block.start, block.stop)
    scores: Tensor | None = None
    for segment in {id(task.segment): task.segment for task in block.tasks}.values():
        turned = query_form(q_BHtD, segment, layer, seen.q_positions[:, queries]).float()
        part = torch.einsum(
            "bkgtd,bknd->bkgtn",
            turned.unflatten(1, (key_heads, heads // key_heads)),
            forms[segment.form][:, :, keys].float(),
        ).flatten(1, 2)
        inside = seen.pairs(segment, queries, keys)
        part = part.masked_fill(~inside, -torch.inf)
        scores = part if scores is None else torch.where(inside, part, scores)
    assert scores is not None
    scores = scores * layer.scaling
    if layer.softcap:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
        scores = scores.masked_fill(~_seen(block, seen, queries, keys), -torch.inf)
    if layer.scheme.bias is not None:
        bias = layer.scheme.bias(seen.q_positions[:, queries], seen.k_positions[:, keys], layer.learned)
        scores = scores + bias
    if seen.extra is not None and seen.extra.dtype != torch.bool:
        scores = scores + seen.extra[:, :, queries, keys].float()
    if layer.sinks is not None:
        sinks = layer.sinks.float()[None, :, None, None].expand(batch, heads, rows, 1)
        scores = torch.cat((scores, sinks), dim=-1)
    # A query that sees nothing: a softmax over nothing but -inf is no number.
    blind = scores.amax(-1, keepdim=True) == -torch.inf
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return weights[..., : keys.stop - keys.start]


def _seen(block: Block, seen: Visibility, queries: slice, keys: slice) -> Tensor:
    masks = [seen.pairs(task.segment, queries, keys) for task in block.tasks]
    union = masks[0]
    for mask in masks[1:]:
        union = union | mask
    return union

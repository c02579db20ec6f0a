"""Differentiable collectives over the slices of a sequence.

PyTorch's own autograd collectives are private, and names have changed there; these stand on public ones that have not.
Every process of the group must call them in the same order, forward and backward.

Shapes: B batch, H heads, n processes, t tokens of a slice, S = n t tokens in all, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_slices(x_BHtD: Tensor, slots: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
    """The whole sequence in its order, [B, H, S, D]; the gradient of a slice is summed over all processes.

    Args:
        slots: int64 [t] for each process: where its tokens stand in the sequence.
        group: of the processes that share the sequence.
    """
    out: Tensor = _Gather.apply(x_BHtD, slots, group)
    return out


def heads_for_slices(x_BHtD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A slice of all heads for the whole sequence of this process's heads, [B, H / n, S, D]; slices are contiguous."""
    out: Tensor = _HeadsForSlices.apply(x_BHtD, group)
    return out


def slices_for_heads(x_BhSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The way back: the whole sequence of some heads for a slice of all heads, [B, n h, S / n, D]."""
    out: Tensor = _SlicesForHeads.apply(x_BhSD, group)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Sequence[Tensor], group: dist.ProcessGroup) -> Tensor:
        ctx.slots, ctx.group = slots, group
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in slots]
        dist.all_gather(parts, x.contiguous(), group=group)
        whole = x.new_empty(*x.shape[:2], len(slots) * x.shape[2], x.shape[3])
        for part, places in zip(parts, slots, strict=True):
            whole[:, :, places] = part
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Indexing by a tensor copies, so every part is contiguous.
        parts = [grad[:, :, places] for places in ctx.slots]
        mine = torch.empty_like(parts[0])
        dist.reduce_scatter(mine, parts, group=ctx.group)
        return mine, None, None


class _HeadsForSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _to_heads(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_slices(grad, ctx.group), None


class _SlicesForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _to_slices(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_heads(grad, ctx.group), None


def _to_heads(x_BHtD: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = x_BHtD.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    # [n, B, h, t, D]: the first axis is the order of slices.
    return got.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _to_slices(x_BhSD: Tensor, group: dist.ProcessGroup) -> Tensor:
    sent = x_BhSD.unflatten(2, (group.size(), -1)).permute(2, 0, 1, 3, 4).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    # [n, B, h, t, D]: the first axis is the order of heads.
    return got.transpose(0, 1).flatten(1, 2)

"""The fast path: rectangle by rectangle, memory linear in length, forward and backward.

Shapes: B batch, H query heads, K key heads, T queries, N keys, D head_dim, V value dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ropepatch.attention import partial
from ropepatch.attention.forms import (
    base_of,
    key_columns,
    key_form,
    query_columns,
    query_form,
    slope_columns,
)
from ropepatch.attention.layer import Layer
from ropepatch.attention.plan import Block, Task, make_plan
from ropepatch.attention.scheme import Segment
from ropepatch.attention.visibility import Visibility

# Queries in a block: small ones waste less on the edges of segments; slopes have only the diagonal for an edge, and pay
# for each block.
BLOCK = 256
SLOPED_BLOCK = 1024


def attend(
    q_BHTD: Tensor, k_BKND: Tensor, v_BKNV: Tensor, layer: Layer, visibility: Visibility, memo: Any = None
) -> Tensor:
    """Attention by a scheme without softcap, dropout or a general bias.

    Args:
        memo: keeps rotated keys from one call to the next (`memo.Memo`), or None.

    Returns:
        [B, H, T, V], q's dtype; zero where a query sees nothing.
    """
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHTD, k_BKND, v_BKNV))
    if layer.sinks is not None and torch.is_grad_enabled():
        needs_grad = needs_grad or layer.sinks.requires_grad
    if needs_grad:
        attended: Tensor = _Attend.apply(q_BHTD, k_BKND, v_BKNV, layer.sinks, layer, visibility)
        return attended
    run = _Run(q_BHTD, k_BKND, v_BKNV, layer, visibility, memo)
    out = run.forward()[0]
    if memo is not None:
        memo.keep(run.last_use)
    return out


class _Attend(torch.autograd.Function):
    """Keeps q, k, v, the output and one number a query; rotated forms are made again on the way back."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, layer: Layer, seen: Visibility
    ) -> Tensor:
        del sinks  # the layer holds them too; autograd wants to see them
        out, lse = _Run(q, k, v, layer, seen, None).forward()
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layer, ctx.seen = layer, seen
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        run = _Run(q, k, v, ctx.layer, ctx.seen, None)
        dq, dk, dv = run.backward(grad, out, lse)
        dsinks = None
        if ctx.layer.sinks is not None:
            share = torch.cat([torch.exp(run.sink_logits(b) - lse[:, :, b.start : b.stop]) for b in run.plan], dim=2)
            dsinks = -(share * (grad.float() * out.float()).sum(-1)).sum((0, 2)).to(ctx.layer.sinks.dtype)
        return dq, dk, dv, dsinks, None, None


class _Run:
    def __init__(self, q: Tensor, k: Tensor, v: Tensor, layer: Layer, seen: Visibility, memo: Any) -> None:
        self.layer, self.seen, self.memo = layer, seen, memo
        self.q, self.k = q, k
        self.value_dim, self.dim = v.shape[-1], q.shape[-1]
        bias = layer.scheme.bias
        self.slopes = bias.slopes if bias is not None else None
        self.extra = slope_columns(q.dtype) if self.slopes is not None else 0
        # One width for queries, keys and values is what the kernel takes; zeros change nothing.
        self.width = max(self.dim + self.extra, self.value_dim)
        if self.extra:
            # Measured: the CPU kernel is slower at widths between these steps.
            step = 4 if q.dtype == torch.float32 else 8
            self.width = -(-self.width // step) * step
        self.v = _widen(v, self.width)
        self.plan: list[Block] = make_plan(seen, layer.scheme, BLOCK if self.slopes is None else SLOPED_BLOCK)
        self.last_use = {task.segment.form: number for number, block in enumerate(self.plan) for task in block.tasks}
        self.forms: dict[str, Tensor] = {}

    # -- forward

    def forward(self) -> tuple[Tensor, Tensor]:
        batch, heads, rows, _ = self.q.shape
        sinks = self.layer.sinks
        if len(self.plan) == 1 and len(self.plan[0].tasks) == 1 and sinks is None:
            # One rectangle: nothing to join.
            block = self.plan[0]
            out, lse = self._task(block, block.tasks[0])
            return out[..., : self.value_dim], lse
        result = self.q.new_empty(batch, rows, heads, self.value_dim).transpose(1, 2)
        lses = torch.empty(batch, heads, rows, device=self.q.device)
        for number, block in enumerate(self.plan):
            out, lse = self._block(block)
            if sinks is not None:
                lse_all = torch.logaddexp(lse, self.sink_logits(block))
                out = out * torch.exp(lse - lse_all)[..., None]
                lse = lse_all
            result[:, :, block.start : block.stop] = out[..., : self.value_dim]
            lses[:, :, block.start : block.stop] = lse
            self._forget(number)
        return result, lses

    def _block(self, block: Block) -> tuple[Tensor, Tensor]:
        out: Tensor | None = None
        lse: Tensor | None = None
        queries: dict[int, Tensor] = {}
        for task in block.tasks:
            part, part_lse = self._task(block, task, queries)
            if out is None or lse is None:
                out, lse = part if len(block.tasks) == 1 else part.float(), part_lse
            else:
                out, lse = partial.merge(out, lse, part, part_lse)
        if out is None or lse is None:
            batch, heads = self.q.shape[:2]
            out = self.q.new_zeros(batch, heads, block.stop - block.start, self.width)
            lse = torch.full(out.shape[:3], -torch.inf, device=out.device)
        return out, lse

    def _task(self, block: Block, task: Task, queries: dict[int, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        q = self._query(block, task.segment, {} if queries is None else queries)
        k, v = self._keys(block, task)
        return partial.forward(q, k, v, self._mask(block, task), task.causal, self.layer.scaling)

    def sink_logits(self, block: Block) -> Tensor:
        assert self.layer.sinks is not None
        logits = self.layer.sinks.float()[None, :, None]
        if self.slopes is not None:
            # Distances are counted from the block's base: the same shift for the sink.
            positions = self.seen.q_positions[:, block.start : block.stop]
            shift = (positions - base_of(self.seen, block.start))[:, None].float()
            logits = logits + shift * self.slopes.to(shift.device)[None, :, None]
        return logits

    # -- backward

    def backward(self, grad: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dq = torch.zeros(self.q.shape, device=self.q.device)
        dk = torch.zeros(self.k.shape, device=self.k.device)
        dv = torch.zeros(*self.v.shape[:3], self.value_dim, device=self.v.device)
        pending: dict[str, tuple[Segment, Tensor]] = {}
        # A row that sees nothing has weights exp(-inf - 0) = 0.
        lse = lse.nan_to_num(neginf=0.0)
        for number, block in enumerate(self.plan):
            rows = slice(block.start, block.stop)
            block_grad, block_out = _widen(grad[:, :, rows], self.width), _widen(out[:, :, rows], self.width)
            queries: dict[int, Tensor] = {}
            for task in block.tasks:
                keys = slice(task.start, task.stop)
                q = self._query(block, task.segment, queries)
                k, v = self._keys(block, task)
                part_q, part_k, part_v = partial.backward(
                    block_grad.to(q.dtype),
                    q,
                    k,
                    v,
                    block_out.to(q.dtype),
                    lse[:, :, rows].contiguous(),
                    self._mask(block, task),
                    task.causal,
                    self.layer.scaling,
                )
                positions = self.seen.q_positions[:, rows]
                part_q = part_q[..., : self.dim].float()
                dq[:, :, rows] += query_form(part_q, task.segment, self.layer, positions, inverse=True)
                dv[:, :, keys] += part_v[..., : self.value_dim]
                form = task.segment.form
                if form not in pending:
                    pending[form] = (task.segment, torch.zeros_like(dk))
                pending[form][1][:, :, keys] += part_k[..., : self.dim]
            for form in self._forget(number):
                segment, gathered = pending.pop(form)
                dk += key_form(gathered, segment, self.layer, self.seen.k_positions, inverse=True)
        return dq.to(self.q.dtype), dk.to(self.k.dtype), dv.to(self.v.dtype)

    # -- forms

    def _query(self, block: Block, segment: Segment, made: dict[int, Tensor]) -> Tensor:
        found = made.get(id(segment))
        if found is None:
            rows = slice(block.start, block.stop)
            found = query_form(self.q[:, :, rows], segment, self.layer, self.seen.q_positions[:, rows])
            if self.slopes is not None:
                columns = query_columns(self.slopes, self.layer.scaling, found)
                found = torch.cat((found, columns.expand(*found.shape[:3], -1)), dim=-1)
            found = made[id(segment)] = _widen(found, self.width)
        return found

    def _keys(self, block: Block, task: Task) -> tuple[Tensor, Tensor]:
        keys = slice(task.start, task.stop)
        k = self._key_form(task.segment)
        if self.slopes is not None:
            # Counted from the block's own position: near keys, the ones that weigh, are exact in any dtype.
            columns = key_columns(self.seen.k_positions[:, keys], base_of(self.seen, block.start), k.dtype)
            k[:, :, keys, self.dim : self.dim + self.extra] = columns
        return k[:, :, keys], self.v[:, :, keys]

    def _key_form(self, segment: Segment) -> Tensor:
        found = self.forms.get(segment.form)
        if found is None:
            if self.memo is not None:
                made = self.memo.form(segment, self.k, self.layer, self.seen)
            else:
                made = key_form(self.k, segment, self.layer, self.seen.k_positions)
            if self.width > self.dim:
                made = _widen(made, self.width)
            found = self.forms[segment.form] = made
        return found

    def _mask(self, block: Block, task: Task) -> Tensor | None:
        if task.irregular:
            return self.seen.pairs(task.segment, slice(block.start, block.stop), slice(task.start, task.stop))
        if task.lows is None or task.highs is None:
            return None
        slots = torch.arange(task.start, task.stop, device=self.q.device)
        lows, highs = task.lows.to(slots.device), task.highs.to(slots.device)
        return ((slots >= lows[..., None]) & (slots < highs[..., None]))[:, None]

    def _forget(self, number: int) -> Iterable[str]:
        """Drop the forms that no later block uses; returns their names."""
        done = [form for form, last in self.last_use.items() if last == number]
        for form in done:
            self.forms.pop(form, None)
        return done


def _widen(x: Tensor, width: int) -> Tensor:
    missing = width - x.shape[-1]
    return torch.nn.functional.pad(x, (0, missing)) if missing else x

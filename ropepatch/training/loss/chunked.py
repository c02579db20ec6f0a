"""Cross entropy of a linear head, a chunk of tokens at a time, with its gradients computed on the way forward.

The gradient of a cross entropy is known as soon as its value is: softmax(z) - onehot(label). So each chunk is projected
once, its logits are overwritten by their gradient, and that is carried back to the hidden states and to whatever of
the head is trained. Backward only multiplies by the incoming gradient: no logits are kept, and none are made twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ropepatch.errors import OptionError

IGNORED = -100
"""The label of tokens that do not count."""

Project = Callable[[Tensor], Tensor]

# Elements of a block that the CPU works through in one go, so that its passes stay in the cache: 1 MiB of float32.
_BLOCK_ELEMENTS = 2**18


@dataclass(frozen=True)
class LogitRule:
    """What a model does to the output z of its head: `scale * z`, or `softcap * tanh(scale * z / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, values: Tensor) -> Tensor:
        scaled = values * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int = 1024,
) -> Tensor:
    """Sum of the cross entropies of `hidden @ weight.T + bias` with `labels`, in nats; differentiable once.

    Statistics are float32 (float64 where the logits are), whatever the dtype of the logits.

    Args:
        hidden: [N, D], already aligned with its labels.
        weight: [V, D].
        labels: int64 [N]; rows labelled -100 are dropped first.
        bias: [V].
        softcap, scale: see `LogitRule`.
        chunk: rows whose logits exist at one time.

    Returns:
        A scalar. Without any label it is 0, with gradients of 0.

    Raises:
        OptionError: a chunk below 1.
    """
    trained = [leaf for leaf in (weight, bias) if leaf is not None and leaf.requires_grad]
    return _apply(
        hidden, lambda rows: functional.linear(rows, weight, bias), labels, LogitRule(scale, softcap), chunk, trained
    )


def projected_cross_entropy(hidden: Tensor, project: Project, labels: Tensor, *, rule: LogitRule, chunk: int) -> Tensor:
    """As `chunked_cross_entropy`, for a head that is a function of its own, `project`: [n, D] -> [n, V].

    `project` may hold an adapter, a quantised weight or anything else that treats each row by itself.
    """
    trained = _trained_leaves(project, hidden) if torch.is_grad_enabled() else []
    return _apply(hidden, project, labels, rule, chunk, trained)


def _apply(
    hidden: Tensor, project: Project, labels: Tensor, rule: LogitRule, chunk: int, trained: list[Tensor]
) -> Tensor:
    if chunk < 1:
        raise OptionError("a chunk of the loss holds at least one token", given=chunk, allowed=">= 1")
    kept = labels != IGNORED
    loss: Tensor = _ChunkedLoss.apply(hidden[kept], labels[kept], project, rule, chunk, *trained)
    return loss


def _trained_leaves(project: Project, hidden: Tensor) -> list[Tensor]:
    """The tensors that `project` takes gradients for: the leaves of the graph that one row makes.

    Asking the graph finds adapters and tied weights wherever they are kept; a list of parameters would not.
    """
    one = project(hidden.new_zeros(1, hidden.shape[-1]))
    leaves: list[Tensor] = []
    seen, waiting = set(), [one.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting.extend(following for following, _ in node.next_functions)
    return leaves


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, project: Project, rule: LogitRule, chunk: int, *trained: Tensor
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        hidden_gradient = torch.empty_like(hidden) if wanted else None
        # Sums over chunks: float32 at least, where the weights are bfloat16.
        gradients = [torch.zeros_like(leaf, dtype=_statistics(leaf.dtype)) for leaf in trained]
        # In the dtype of the statistics, once it is known.
        total: Tensor | None = None
        for rows in _slices(len(hidden), chunk):
            part = hidden[rows].detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted or bool(trained)):
                logits = project(part)
            values = logits.detach()
            loss = _consume(values, labels[rows], rule, gradient=wanted or bool(trained))
            total = loss if total is None else total + loss
            inputs = ([part] if wanted else []) + list(trained)
            if not inputs:
                continue
            found = list(torch.autograd.grad(logits, inputs, values, allow_unused=True))
            del logits, values
            if hidden_gradient is not None:
                hidden_gradient[rows] = found.pop(0)
            for sum_, new in zip(gradients, found, strict=True):
                if new is not None:
                    sum_.add_(new)
        ctx.save_for_backward(hidden_gradient, *gradients)
        ctx.dtypes = [leaf.dtype for leaf in trained]
        return hidden.new_zeros((), dtype=_statistics(hidden.dtype)) if total is None else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, *gradients = ctx.saved_tensors
        first = None if hidden_gradient is None else hidden_gradient * incoming.to(hidden_gradient.dtype)
        rest = [(sum_ * incoming).to(dtype) for sum_, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return first, None, None, None, None, *rest


def _consume(logits: Tensor, labels: Tensor, rule: LogitRule, *, gradient: bool) -> Tensor:
    """The summed loss of some rows; their logits are overwritten by its gradient with respect to them.

    Args:
        logits: [n, V], the head's output; spent afterwards.
        labels: [n], none ignored.
        gradient: False leaves rubbish in `logits`.
    """
    on_cpu = logits.device.type == "cpu"
    block = max(1, _BLOCK_ELEMENTS // logits.shape[-1]) if on_cpu else len(logits)
    total = logits.new_zeros((), dtype=_statistics(logits.dtype))
    for rows in _slices(len(logits), block):
        stored, target = logits[rows], labels[rows, None]
        z = stored.to(total.dtype)
        if rule.scale != 1.0:
            z = z.mul_(rule.scale)
        slope = None
        if rule.softcap is not None:
            capped = torch.tanh_(z.div_(rule.softcap))
            slope = 1 - capped * capped if gradient else None
            z = capped.mul_(rule.softcap)
        top = z.amax(-1, keepdim=True)
        right = z.gather(-1, target)
        z.sub_(top).exp_()
        mass = z.sum(-1, keepdim=True)
        total += (top + mass.log() - right).sum()
        if not gradient:
            continue
        # d loss / d z = softmax - onehot, then through the cap and the scale.
        z.mul_(rule.scale / mass)
        z.scatter_add_(-1, target, z.new_full((1, 1), -rule.scale).expand_as(target))
        if slope is not None:
            z.mul_(slope)
        if z.dtype != stored.dtype:
            stored.copy_(z)
    return total


def _statistics(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))

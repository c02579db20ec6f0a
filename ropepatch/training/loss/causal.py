"""The loss of a training batch: next-token cross entropies over a global number of tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ropepatch.errors import OptionError, PromptError
from ropepatch.families._unwrap import host_of
from ropepatch.training.loss.backends import BACKENDS, fused_kernel
from ropepatch.training.loss.chunked import IGNORED, projected_cross_entropy
from ropepatch.training.loss.head import forward_to_head, logit_rule, output_head, without_cache


def causal_loss(
    model: nn.Module, batch: dict[str, Tensor], *, tokens: Tensor | int, chunk: int = 1024, backend: str = "chunked"
) -> Tensor:
    """Sum of the next-token losses of `batch` over `tokens`, a float32 scalar, differentiable.

    With `tokens` the number of labels in a whole optimizer step, over all micro-batches and processes, the sum of these
    values is the mean loss of the step, however it was cut. An auxiliary loss (mixtures of experts whose config asks
    for `output_router_logits`) is weighted by this batch's share of the tokens.

    The model is called as it is, wrappers included, and with the backend "chunked" makes the logits of `chunk` tokens
    at a time.

    Args:
        model: a causal model, adapted, wrapped or sharded; called once.
        batch: `input_ids` [B, L] and `labels` (not shifted) or `shifted_labels`, -100 where nothing counts; whatever
            else is in it is passed to the model.
        tokens: labels that count, in all, after the shift.
        chunk: tokens whose logits exist at one time.
        backend: "chunked", "plain", "liger" or "cce"; see `choose_backend`.

    Raises:
        PromptError: `tokens` is zero.
        OptionError: an unknown backend, or a batch without labels or with both kinds of them.
        VerificationError: the model does not use its head as causal models do.
    """
    if backend not in BACKENDS or backend == "auto":
        raise OptionError("unknown loss", given=backend, allowed=BACKENDS[1:])
    if int(tokens) < 1:
        raise PromptError(
            "no token of this step has a label, so there is nothing to learn from",
            hint="check that conversations hold assistant turns and that answers are not cut off by data.length",
        )
    inputs, shifted = _split(batch)
    if backend == "plain":
        return _plain(model, inputs, batch, shifted, tokens)
    rule, head = logit_rule(model), output_head(model)

    def loss_at_head(hidden: Tensor) -> Tensor:
        rows, labels = hidden.flatten(0, -2), shifted.flatten().to(hidden.device)
        if backend == "chunked":
            # Not `head(...)`: its hooks, ours among them, have run.
            return projected_cross_entropy(rows, head.forward, labels, rule=rule, chunk=chunk)
        kept = labels != IGNORED
        return fused_kernel(backend, head, rule)(rows[kept], labels[kept])

    outcome = forward_to_head(model, inputs, loss_at_head)
    loss = outcome.loss / tokens
    if outcome.auxiliary is not None:
        loss = loss + outcome.auxiliary.to(loss.device) * (_counted(shifted) / tokens)
    return loss


def shift(labels: Tensor) -> Tensor:
    """Labels of the next token in place of the token's own; the last has none. [B, L] -> [B, L]."""
    return functional.pad(labels[..., 1:], (0, 1), value=IGNORED)


def _split(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """Arguments of the model, and shifted labels."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "shifted_labels")}
    given = [name for name in ("labels", "shifted_labels") if name in batch]
    if len(given) != 1:
        raise OptionError("a batch holds one kind of labels", given=sorted(batch), allowed="labels or shifted_labels")
    return inputs, shift(batch["labels"]) if given == ["labels"] else batch["shifted_labels"]


def _counted(shifted: Tensor) -> int:
    return int((shifted != IGNORED).sum())


def _plain(
    model: nn.Module, inputs: dict[str, Tensor], batch: dict[str, Tensor], shifted: Tensor, tokens: Tensor | int
) -> Tensor:
    """The model's own loss, a mean over the labels of this batch, by the batch's share of the tokens."""
    arguments: dict[str, Any] = {**inputs, **without_cache(host_of(model))}
    counted = _counted(shifted)
    if counted == 0:
        # A mean over nothing is no number. The graph stays, since other processes wait for this one's gradients.
        return model(**arguments).logits[:, :1, :1].sum().float() * 0.0
    labels = {"labels": batch["labels"]} if "labels" in batch else {"labels": shifted, "shift_labels": shifted}
    loss: Tensor = model(**arguments, **labels).loss
    return loss * (counted / tokens)

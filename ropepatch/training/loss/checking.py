"""Whether the lean loss is the model's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ropepatch.errors import VerificationError, first_line
from ropepatch.families._unwrap import host_of
from ropepatch.training.loss.causal import causal_loss, shift
from ropepatch.training.loss.chunked import IGNORED
from ropepatch.training.loss.head import evaluating, input_device, output_head, without_cache

_ROWS, _LENGTH = 2, 12


def check(model: nn.Module, *, chunk: int = 8, backend: str = "chunked") -> None:
    """Hold `causal_loss` against the loss that the model computes itself, on a few random tokens.

    Call it once before training, on the model as it is trained, in every process. No random numbers are drawn and no
    gradients are left behind. "plain" is the model's own loss: nothing is to be checked then.

    Raises:
        VerificationError: the two differ, or the model does not use its head as causal models do.
        UnsupportedModelError: the model does not say which module makes its logits.
    """
    if backend == "plain":
        return
    host = host_of(model)
    batch = _few_tokens(host)
    tokens = int((shift(batch["labels"]) != IGNORED).sum())
    dtypes: list[torch.dtype] = []
    hook = output_head(model).register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    with evaluating(model), torch.no_grad():
        try:
            own = float(model(**batch, **without_cache(host)).loss)
        except Exception as error:  # what a model refuses differs from class to class
            raise VerificationError(
                f"the model computes no loss for text alone: {first_line(error)}", given=type(host).__name__
            ) from error
        finally:
            hook.remove()
        ours = float(causal_loss(model, batch, tokens=tokens, chunk=chunk, backend=backend))
    exact = bool(dtypes) and dtypes[0] in (torch.float32, torch.float64)
    if not abs(own - ours) <= (1e-5 if exact else 1e-2) * abs(own):
        raise VerificationError(
            f"the {backend} loss is not the loss that the model computes itself",
            given=f"{ours:.6f} instead of {own:.6f}",
            hint="train with `loss: plain`",
        )


def _few_tokens(host: nn.Module) -> dict[str, Tensor]:
    size = host.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, size, (_ROWS, _LENGTH), generator=generator).to(input_device(host))
    labels = ids.clone()
    labels[0, :5] = IGNORED
    labels[1, 7] = IGNORED
    return {"input_ids": ids, "labels": labels}

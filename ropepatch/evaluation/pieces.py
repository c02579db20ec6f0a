"""Reading a text in pieces: whether a model allows it, and the fastest attention that does so rightly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import nn

from ropepatch.evaluation.cache import NoReuseError
from ropepatch.evaluation.chunked_attention import chunked_attention
from ropepatch.evaluation.plain import full_logits
from ropepatch.evaluation.prompt import Ids

PROBE = 48
"""Tokens of a text on which the ways are tried."""

# What models raise when a text is handed to them in pieces and they do not support it.
_REFUSALS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def fastest_way(model: nn.Module, ids: Ids, read: Callable[[bool], torch.Tensor], stack: ExitStack) -> str | None:
    """Select the fastest attention with which reading in pieces agrees with a plain forward.

    Args:
        model: in eval mode; gradients are off.
        ids: the tokens to try it on.
        read: reads them in pieces, and gives the logits of the last of them, as many as it likes; it is told whether
            the attention needs no mask over the cache.
        stack: takes over the attention that was selected, until it is closed.

    Returns:
        None when a way was found, the last one that `read` was called for; else why none was.
    """
    wanted = full_logits(model, ids).float()
    reason = None
    for fast in (True, False):
        with ExitStack() as attempt:
            unmasked = attempt.enter_context(chunked_attention(model)) if fast else False
            if fast and not unmasked:
                continue
            try:
                found = read(unmasked).float()
            except NoReuseError as error:
                return str(error)
            except _REFUSALS as error:
                reason = f"it cannot be read in pieces: {type(error).__name__}: {error}"
                continue
            if _agree(found, wanted[-len(found) :], model):
                stack.push(attempt.pop_all())
                return None
            reason = "its logits change when it reads a text in pieces"
    return reason


def _agree(found: torch.Tensor, wanted: torch.Tensor, model: nn.Module) -> bool:
    """Whether two sets of logits differ by rounding only: relative to how much the logits vary."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    tolerance = 1e-3 if dtype in (torch.float32, torch.float64) else 0.1
    spread = (wanted - wanted.mean(-1, keepdim=True)).norm()
    return bool((found - wanted).norm() <= tolerance * spread)

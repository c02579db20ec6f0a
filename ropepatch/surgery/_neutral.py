"""Is it the same model with the seam in place? A few tokens through it, before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ropepatch.errors import RopepatchError, UnsupportedModelError, VerificationError
from ropepatch.surgery._changes import Change, ConfigChange, revert_all
from ropepatch.surgery._probe import run, tokens


@dataclass(frozen=True)
class Outputs:
    """What a few tokens come to, float32, CPU: after one attention module, and after all layers."""

    attention: Tensor
    hidden: Tensor


def outputs(owner: nn.Module, attention: nn.Module, count: int, way: str | None = None) -> Outputs:
    """Run `count` tokens through the model.

    Args:
        owner: the model that runs the layers.
        attention: one of its attention modules.
        way: the attention implementation to run by; None is the one selected.

    Raises:
        UnsupportedModelError: the model does not run on them.
    """
    caught: list[Tensor] = []
    changes: list[Change] = []

    def catch(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        caught.append(_tensor(output))

    handle = attention.register_forward_hook(catch)
    try:
        if way is not None:
            changes.append(ConfigChange.apply(owner, "", "_attn_implementation_internal", way))
        hidden = _tensor(run(owner, tokens(owner, count)))
    except RopepatchError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"its text part does not run on a few tokens ({type(error).__name__}: {error})"
        ) from error
    finally:
        revert_all(owner, changes)
        handle.remove()
    return Outputs(caught[0], hidden)


def _tensor(output: Any) -> Tensor:
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first.detach().float().cpu()


def check_neutral(owner: nn.Module, got: Outputs, wanted: Outputs, own: str) -> None:
    """Hold the outputs through the seam against the model's own.

    Args:
        own: what the seam was given of the model: "rotation", "slopes".

    Raises:
        VerificationError: they differ by more than rounding.
    """
    pairs = [(got.attention, wanted.attention)]
    # In a half precision the layers of a real model amplify rounding without bound: there the first one must do.
    first = next(owner.parameters())
    kind = first.device.type
    lowered = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    exact = first.dtype in (torch.float32, torch.float64) and not lowered
    if exact:
        pairs.append((got.hidden, wanted.hidden))
    tolerance = 1e-4 if exact else 5e-2
    apart = max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-12)) for x, y in pairs)
    if not apart <= tolerance:
        raise VerificationError(
            f"with its own {own} inside the attention seam this model does not give its own outputs",
            given=f"relative difference {apart:.2g}",
            allowed=f"up to {tolerance:g}",
        )


def check_finite(got: Outputs) -> None:
    """Refuse a patched model that gives infinities or what is no number.

    Raises:
        VerificationError: it does.
    """
    if not all(bool(torch.isfinite(part).all()) for part in (got.attention, got.hidden)):
        raise VerificationError("the patched model's outputs are not finite")

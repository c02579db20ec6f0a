"""Give freed memory back to the system while a step runs on the CPU.

glibc keeps freed blocks of some megabytes in its heap. In a forward with activation checkpointing, the one tensor that
stays of each layer comes to lie among those that are freed, and the process grows by several times what is in use.
Trimming the heap every few layers gives the pages in between back.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

# Layers. Pages that were given back must be had again: oftener costs time, more seldom costs memory.
_EVERY = 10


@contextmanager
def trimmed(model: nn.Module) -> Iterator[None]:
    """Trim the heap after every tenth layer's forward and before its backward, for the length of a with block.

    Elsewhere than with glibc and on the CPU nothing is done.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    trim = _trim() if next(model.parameters()).device.type == "cpu" else None

    def now(*_: object) -> None:
        assert trim is not None
        trim(0)

    def after(_: nn.Module, __: object, output: Tensor | tuple[Any, ...]) -> None:
        now()
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:
            # Reached when the next layer's backward is done.
            hidden.register_hook(now)

    layers = [] if trim is None else [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    hooks = [layer.register_forward_hook(after) for layer in layers[_EVERY - 1 :: _EVERY]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _trim() -> Callable[[int], int] | None:
    try:
        function = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return None
    found: Callable[[int], int] = function
    return found

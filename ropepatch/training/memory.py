"""Give freed memory back to the system while a step runs on the CPU.

glibc keeps freed blocks of some megabytes in its heap. In a forward with activation checkpointing, the one tensor that
stays of each layer comes to lie among those that are freed, so that the free space cannot be merged, and the process
grows by several times what is in use. Trimming the heap after each layer frees the pages in between, and costs about
one per cent of a step; making every block a mapping of its own costs ten.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def trimmed(model: nn.Module) -> Iterator[None]:
    """Trim the heap after each layer that is checkpointed, for the length of a with block; elsewhere than with glibc
    and on the CPU nothing is done."""
    trim = _trim() if next(model.parameters()).device.type == "cpu" else None
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing") and _is_layer(module)]
    hooks = [] if trim is None else [layer.register_forward_hook(lambda *_: trim(0) and None) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_layer(module: nn.Module) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


def _trim() -> Callable[[int], int] | None:
    try:
        function = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, another system
        return None
    found: Callable[[int], int] = function
    return found

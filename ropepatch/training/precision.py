"""Looking at a model in its own precision, from within a forward that runs in another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def own_precision(model: nn.Module) -> Iterator[None]:
    """Without autocast, for checks that know float32 from a half precision by the model's weights.

    Weights of several dtypes (a bfloat16 base and float32 adapters) run under autocast only: there nothing changes.
    """
    import torch

    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    kind = next(model.parameters()).device.type
    on = torch.is_autocast_enabled(kind) if torch.amp.is_autocast_available(kind) else False
    if len(dtypes) > 1 or not on:
        yield
        return
    with torch.autocast(kind, enabled=False):
        yield

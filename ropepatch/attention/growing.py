"""A cache layer that writes into memory it has ahead, where transformers' own copies all it holds for every token."""

from __future__ import annotations

from functools import cache as once
from typing import Any

from torch import Tensor

# Slots that are had ahead: at least so many, and this share of those that are filled.
_LEAST_AHEAD = 256
_SHARE_AHEAD = 8


def growing_layer() -> Any:
    """An empty layer for a transformers cache that is read into piece by piece, cut back and read on.

    `keys` and `values` are views of the slots that are filled, and what follows a cut is written over what was cut off:
    so it is for a reader that owns its cache, not for views that somebody keeps.
    """
    return growing_type()()


@once
def growing_type() -> Any:
    """The class of these layers; made when it is first asked for, as transformers takes long to import."""
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        """Keys and values [B, K, n, D], the first n slots of larger buffers."""

        keys: Tensor
        values: Tensor

        def __init__(self) -> None:
            super().__init__()
            self._buffers: tuple[Tensor, Tensor] | None = None

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            filled = self.get_seq_length()
            end = filled + key_states.shape[-2]
            buffers = self._buffers
            if buffers is None or buffers[0].shape[-2] < end or not self._owns(buffers):
                buffers = self._grown(key_states, value_states, filled, end)
            for buffer, new in zip(buffers, (key_states, value_states), strict=True):
                buffer[..., filled:end, :] = new
            self._buffers = buffers
            self.keys, self.values = (buffer[..., :end, :] for buffer in buffers)
            return self.keys, self.values

        def reset(self) -> None:
            super().reset()
            self._buffers = None

        def _owns(self, buffers: tuple[Tensor, Tensor]) -> bool:
            """Whether what the layer holds are views of its buffers: moving rows or devices makes new tensors."""
            held = (self.keys, self.values)
            return all(
                a.data_ptr() == b.data_ptr() and a.stride() == b.stride() for a, b in zip(held, buffers, strict=True)
            )

        def _grown(self, keys: Tensor, values: Tensor, filled: int, end: int) -> tuple[Tensor, Tensor]:
            room = end + max(_LEAST_AHEAD, end // _SHARE_AHEAD)
            made = tuple(new.new_empty(*new.shape[:-2], room, new.shape[-1]) for new in (keys, values))
            if filled:
                for buffer, held in zip(made, (self.keys, self.values), strict=True):
                    buffer[..., :filled, :] = held
            return made[0], made[1]

    return GrowingLayer

"""A model together with what it has read so far: extend it, cut it back, extend it again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ropepatch.attention.growing import growing_layer
from ropepatch.attention.interface import OWNER
from ropepatch.evaluation.prompt import Ids
from ropepatch.families import host_of

_MASK_ELEMENTS = 2**24
_LOGIT_ELEMENTS = 2**25
SMALLEST_CHUNK = 16


class NoReuseError(Exception):
    """The model has no cache that can be cut back. Internal: the engine takes another way and says so."""


class Reader:
    """One sequence being read by a model, with its keys and values kept.

    Sliding-window layers keep their whole past here, so that they can be cut back too; their masks stay what they are.

    Args:
        model: a causal language model.
        chunk_size: most tokens in one forward.
        unmasked: the model's attention needs no mask over the cache, so chunks may be long whatever the length.

    Attributes:
        length: tokens read and kept.
        on_tokens: called with (start, end) for every block of positions computed.

    Raises:
        NoReuseError: the model's forward takes no `past_key_values`, or keeps a state that cannot be cut back.
    """

    def __init__(self, model: nn.Module, *, chunk_size: int, unmasked: bool) -> None:
        parameters = forward_parameters(model)
        if "past_key_values" not in parameters:
            raise NoReuseError("its forward takes no past_key_values")
        self.model = model
        self.chunk_size = chunk_size
        self.length = 0
        self._unmasked = unmasked
        self.on_tokens: Callable[[int, int], None] = unheard
        self._last_rows_only = "logits_to_keep" in parameters
        if lets_go(model):
            raise NoReuseError(
                "its patch lets the cache go of tokens, so it cannot be cut back (truncate=false keeps them)"
            )
        self._cache: Any = _croppable_cache(model.config)

    def extend(self, ids: Ids, keep: int) -> torch.Tensor:
        """Read further tokens.

        Args:
            ids: token ids that follow what was read, shape [n], n >= keep.
            keep: number of last tokens whose predictions are wanted, at least 1.

        Returns:
            Logits of the last `keep` tokens, [keep, vocabulary], in the model's dtype.
        """
        tokens = torch.from_numpy(ids.astype("int64")).unsqueeze(0).to(input_device(self.model))
        logits: torch.Tensor | None = None
        start = 0
        for size in self._blocks(len(ids), keep):
            block = tokens[:, start : start + size]
            start += size
            options = {"logits_to_keep": min(keep, size) if start == len(ids) else 1} if self._last_rows_only else {}
            output = self.model(input_ids=block, past_key_values=self._cache, use_cache=True, **options)
            self.on_tokens(self.length, self.length + size)
            self.length += size
            logits = output.logits
            del output
        assert logits is not None
        return logits[0, -keep:]

    def rewind(self, length: int) -> None:
        """Forget everything after the first `length` tokens."""
        if length < self.length:
            if length == 0:
                self.reset()
            else:
                self._cache.crop(length - self.length)
                self.length = length

    def reset(self) -> None:
        """Forget everything, also after a forward that failed half-way."""
        self._cache = _croppable_cache(self.model.config)
        self.length = 0

    def _blocks(self, n: int, keep: int) -> list[int]:
        """Nearly equal block sizes, the last one holding all rows that are wanted."""
        limit = self.chunk_size
        if not self._unmasked:
            limit = min(limit, max(128, _MASK_ELEMENTS // (self.length + n)))
        if not self._last_rows_only:
            limit = min(limit, max(keep, _LOGIT_ELEMENTS // vocabulary_size(self.model)))
        head = n - keep
        count = -(-head // limit)
        sizes = [head // count + (i < head % count) for i in range(count)] if count else [0]
        sizes[-1] += keep
        return sizes


def lets_go(model: nn.Module) -> bool:
    """Whether its patch lets the cache go of tokens that can never be seen again."""
    return any((owner := vars(module).get(OWNER)) is not None and owner.keep for module in model.modules())


def unheard(*_: int) -> None:
    """Takes a report that nobody asked for."""


def _croppable_cache(config: Any) -> Any:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache: Any = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            # Keeps all keys, so that cutting back is possible; the mask, not the cache, makes the window.
            cache.layers[index] = growing_layer()
        elif hasattr(layer, "update_recurrent_state") or not hasattr(layer, "crop"):
            raise NoReuseError(f"its {type(layer).__name__} state cannot be cut back")
    return cache


def forward_parameters(model: nn.Module) -> set[str]:
    """What the transformers model itself takes: a wrapper's own forward may take anything."""
    return set(inspect.signature(host_of(model).forward).parameters)


def input_device(model: Any) -> torch.device:
    embedding = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    # Weights that accelerate keeps elsewhere until they are needed show as meta: its hooks move the ids.
    return torch.device("cpu") if device.type == "meta" else device


def vocabulary_size(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)

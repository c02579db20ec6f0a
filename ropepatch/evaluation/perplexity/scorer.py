"""Losses of a sequence's last tokens, with never more rows of logits at once than fit a fixed budget."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ropepatch.attention.growing import growing_layer
from ropepatch.errors import RopepatchError, UnsupportedModelError
from ropepatch.evaluation.cache import forward_parameters, input_device, lets_go, unheard, vocabulary_size
from ropepatch.evaluation.limits import check_length, length_dependent_rope
from ropepatch.evaluation.perplexity.loss import Losses, token_losses
from ropepatch.evaluation.pieces import PROBE, fastest_way
from ropepatch.evaluation.plain import full_logits
from ropepatch.evaluation.prompt import Ids
from ropepatch.families import host_of

LOGIT_BYTES = 2**26
"""Most logits at once: 64 MiB. A vocabulary of 49,152 gives 341 rows in float32, 682 in bfloat16."""

_MASK_ELEMENTS = 2**24


@contextmanager
def scorer(model: Any, longest: Ids, *, chunk_size: int) -> Iterator[Scorer]:
    """A model made ready to score sequences; as it was before, when the block ends.

    Args:
        model: a decoder-only language model.
        longest: the longest sequence to come, at least 2 tokens.
        chunk_size: most tokens in one forward, where a sequence can be read in pieces.

    Raises:
        UnsupportedModelError: not a decoder-only language model, or its table of positions is too short.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", True):
        raise UnsupportedModelError("perplexity needs a decoder-only language model", given=type(model).__name__)
    check_length(model, len(longest) - 1)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with ExitStack() as stack:
            made = Scorer(model, chunk_size=chunk_size)
            made.choose(longest[:-1], stack)
            yield made
    finally:
        for module, training in modes:
            module.training = training


class Scorer:
    """Scores sequences on one model; each is read afresh. Made by `scorer`.

    A sequence that fits one chunk, and whose scored tokens fit the budget of logits, is one plain forward. A longer one
    is read in pieces over a cache, where that was found to give the logits of a plain forward; else it goes through the
    model several times whole, for other rows of logits each time.

    Attributes:
        pieces: whether sequences can be read in pieces.
        reason: why not, where they cannot.
        tokens_computed: tokens that went through the model.
        on_tokens: called with (start, end) for every block of positions computed.
    """

    def __init__(self, model: Any, *, chunk_size: int) -> None:
        parameters = forward_parameters(model)
        self.model = model
        self.chunk_size = chunk_size
        self.rows = max(1, min(chunk_size, LOGIT_BYTES // (vocabulary_size(model) * host_of(model).dtype.itemsize)))
        self.pieces = False
        self.reason: str | None = None
        self.tokens_computed = 0
        self.on_tokens: Callable[[int, int], None] = unheard
        self._last_rows_only = "logits_to_keep" in parameters
        self._takes_cache = "past_key_values" in parameters
        self._unmasked = False

    @torch.inference_mode()
    def choose(self, longest: Ids, stack: ExitStack) -> None:
        """Find the fastest way of reading in pieces that agrees with a plain forward, on a text's first tokens.

        Args:
            longest: what is read of the longest sequence.
            stack: keeps the attention that was selected for it.
        """
        rope = length_dependent_rope(self.model, len(longest))
        if rope is not None:
            self.reason = f"its {rope} rotary embedding changes with the length of the input"
            return
        if not self._takes_cache:
            self.reason = "its forward takes no past_key_values"
            return
        probe = longest[:PROBE]
        n = len(probe)
        edges = [0, n // 3, n - n // 6, n]
        blocks = [probe[a:b] for a, b in itertools.pairwise(edges) if a < b]

        def read(unmasked: bool) -> torch.Tensor:
            self._unmasked = unmasked
            cache = _cache(self.model)
            return torch.cat([self._extend(cache, block, len(block)) for block in blocks])

        self.reason = fastest_way(self.model, probe, read, stack)
        self.pieces = self.reason is None
        self._unmasked = self._unmasked and self.pieces

    @torch.inference_mode()
    def score(self, ids: Ids, first: int) -> Losses:
        """The losses of `ids[first:]`, each token given all before it; `first` is at least 1.

        Raises:
            RopepatchError: out of memory.
        """
        # The last token is predicted, not read.
        n, wanted = len(ids) - 1, len(ids) - first
        held = wanted if self._last_rows_only else n
        try:
            if self.pieces and (held > self.rows or n > self.chunk_size):
                return self._in_pieces(ids, first)
            if held <= self.rows or not self._last_rows_only:
                return self._plain(ids, first, slice(None))
            parts = [self._plain(ids, first, slice(at, at + self.rows)) for at in range(0, wanted, self.rows)]
            return Losses.join(parts)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise RopepatchError(
                f"out of memory on a text of {len(ids)} tokens",
                hint="finished documents are kept; use a smaller window, or max_tokens",
            ) from error

    def _plain(self, ids: Ids, first: int, part: slice) -> Losses:
        """One forward over the sequence for a part of the rows that are wanted."""
        n, targets = len(ids) - 1, ids[first:][part]
        if length_dependent_rope(self.model, n) is not None:
            # transformers' dynamic scaling remembers the longest input; a short one makes it forget.
            full_logits(self.model, ids[:1])
        if len(targets) == len(ids) - first:
            logits = full_logits(self.model, ids[:-1], keep=len(targets))
        else:
            device = input_device(self.model)
            keep = torch.arange(first - 1, n, device=device)[part]
            logits = self.model(input_ids=_row(ids[:-1], device), use_cache=False, logits_to_keep=keep).logits[0]
        self._count(0, n)
        return token_losses(logits, targets)

    def _in_pieces(self, ids: Ids, first: int) -> Losses:
        """The context, and then a budget's worth of rows at a time, with keys and values kept."""
        cache, parts, at, n = _cache(self.model), [], 0, len(ids) - 1
        while at < n:
            inside = at >= first - 1
            size = min(self._limit(at, inside), (n if inside else first - 1) - at)
            logits = self._extend(cache, ids[at : at + size], size if inside else 1)
            if inside:
                parts.append(token_losses(logits, ids[at + 1 : at + size + 1]))
            del logits
            self._count(at, at + size)
            at += size
        return Losses.join(parts)

    def _limit(self, before: int, inside: bool) -> int:
        """Most tokens of the next forward."""
        limit = self.rows if inside or not self._last_rows_only else self.chunk_size
        if not self._unmasked:
            limit = min(limit, max(128, _MASK_ELEMENTS // (before + limit)))
        return limit

    def _extend(self, cache: Any, ids: Ids, keep: int) -> torch.Tensor:
        """Read further tokens; the logits of the last `keep` of them, [keep, vocabulary]."""
        options = {"logits_to_keep": keep} if self._last_rows_only else {}
        tokens = _row(ids, input_device(self.model))
        logits: torch.Tensor = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **options).logits[0]
        return logits[-keep:]

    def _count(self, start: int, end: int) -> None:
        self.tokens_computed += end - start
        self.on_tokens(start, end)


def buckets(positions: np.ndarray, nll: np.ndarray, width: int) -> list[dict[str, float]]:
    """Losses by position, in buckets of `width` tokens: those that hold any, in order.

    Args:
        positions, nll: of each token, shape [n].

    Returns:
        `start`, `end` (exclusive), `tokens`, `nll` (nats, summed in float64) of each.
    """
    places = positions // width
    counts, sums = np.bincount(places), np.bincount(places, weights=nll)
    return [
        {"start": int(i) * width, "end": int(i + 1) * width, "tokens": int(counts[i]), "nll": float(sums[i])}
        for i in np.flatnonzero(counts)
    ]


def _cache(model: nn.Module) -> Any:
    """An empty cache of the kind that the model makes for itself: windowed layers keep their window only, and a patch
    may let go of tokens. Layers that keep all grow in place."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    if not lets_go(model):
        cache.layers = [growing_layer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _row(ids: Ids, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(ids.astype("int64")).unsqueeze(0).to(device)

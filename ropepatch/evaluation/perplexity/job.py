"""Perplexity on its way: a trial is a document, and each gives one row."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ropepatch.errors import OptionError, RopepatchError, UnsupportedModelError
from ropepatch.evaluation.engine import DEFAULT_CHUNK
from ropepatch.evaluation.perplexity.documents import (
    TokenisedDocument,
    default_documents,
    read_documents,
    tokenise,
)
from ropepatch.evaluation.perplexity.loss import Losses
from ropepatch.evaluation.perplexity.scorer import Scorer, buckets, scorer
from ropepatch.evaluation.perplexity.windows import Window, windows
from ropepatch.evaluation.progress import progress_bar, quadratic_cost
from ropepatch.evaluation.prompt import TextEncoder
from ropepatch.evaluation.task import Place
from ropepatch.evaluation.trie import token_cost

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ropepatch.evaluation.sharding import Ranks
    from ropepatch.evaluation.tasks.perplexity import PerplexitySuite

Row = dict[str, Any]
_SHORTEST_CONTEXT = 1024

KEY_GAIN, KEY_LOSS = 2.0, 2.0
"""LongPPL's key tokens (arXiv 2410.23771): the far context gains more than 2 nats, and the loss is then below 2."""


class PerplexityJob:
    """The documents of a perplexity suite on one model.

    Args:
        model: a decoder-only language model.
        tokenizer: the model's own, a fast one.
        settings: the suite.
        chunk_size: most tokens in one forward; None for the engine's own.

    Raises:
        PromptError: a document cannot be read, or has nothing to score.
        OptionError: fewer documents than are asked for.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: PerplexitySuite, *, chunk_size: int | None = None) -> None:
        self.settings = settings
        self.model = model
        self._chunk_size = DEFAULT_CHUNK if chunk_size is None else chunk_size
        documents = (
            default_documents() if settings.text is None else read_documents(settings.text, tokens=settings.max_tokens)
        )
        if settings.documents is not None and settings.documents > len(documents):
            raise OptionError(
                "there are not so many documents", given=settings.documents, allowed=f"1..{len(documents)}"
            )
        documents = documents[: settings.documents]
        encoder = TextEncoder(tokenizer)
        self._identities = [document.identity for document in documents]
        self.documents = [tokenise(d, encoder, bos=settings.bos, most=settings.max_tokens) for d in documents]
        self._computed = self._distinct = self._planned = 0
        self._pieces = False
        self._reason: str | None = None

    def places(self) -> list[Place]:
        name = self.settings.name
        return [Place(name, document.scored + 1, None, i) for i, document in enumerate(self.documents)]

    def inputs(self) -> Mapping[str, Any]:
        return {"text": self._identities, "bos_token": self._bos_token()}

    def check(self) -> None:
        """Hold the longest window against the model's tables, and try whether a single pass is possible.

        Raises:
            UnsupportedModelError: the model cannot take it, or cannot be read in pieces.
            OptionError: no document reaches one of the asked contexts.
        """
        longest = max(len(document.prefix) + len(document.ids) for document in self.documents)
        for length in self.settings.lengths or ():
            if length > longest:
                raise OptionError("no document is that long", given=length, allowed=f"at most {longest} tokens")
        with self._scorer():
            pass

    def rows(self, left: Sequence[Place], ranks: Ranks, *, progress: bool) -> Generator[Row, None, None]:
        mine = self._share(left, ranks)
        if not mine:
            return
        total, quadratic = sum(self.costs(mine).values()), quadratic_cost(self.model)
        with self._scorer() as ready, progress_bar(ready, total, quadratic, progress):
            for place in mine:
                yield self._row(place, ready)

    def start_plan(self) -> bool:
        """For a time budget: costs are in units of work, not in seconds."""
        return False

    def costs(self, places: Sequence[Place]) -> dict[Place, float]:
        """What each document costs; they share nothing."""
        quadratic = quadratic_cost(self.model)
        return {place: self._cost(place, quadratic) for place in places}

    def work(self) -> dict[str, Any]:
        """Tokens of the measured documents, of all their windows, and those that went through the model; `reuse` is
        whether the model can be read in pieces."""
        return {
            "trie_size": self._distinct,
            "sum_of_prompts": self._planned,
            "tokens_computed": self._computed,
            "tokens_decoded": 0,
            "reuse": self._pieces,
            "reuse_refused": self._reason,
        }

    def _bos_token(self) -> bool:
        """Whether a BOS token stands in front, by the setting or by the tokenizer's own habit."""
        return self.documents[0].bos

    @contextmanager
    def _scorer(self) -> Iterator[Scorer]:
        inputs = (self._input(d, w) for d in self.documents for w in (*self._windows(d), *self._short_windows(d)))
        with scorer(self.model, max(inputs, key=len), chunk_size=self._chunk_size) as ready:
            self._pieces, self._reason = ready.pieces, ready.reason
            if self.settings.form == "single_pass" and not ready.pieces:
                raise UnsupportedModelError(
                    f"a single pass reads the text in pieces, which this model does not allow: {ready.reason}",
                    given="form=single_pass",
                    hint="use form=sliding",
                )
            yield ready

    def _windows(self, document: TokenisedDocument) -> list[Window]:
        if self.settings.window is None or self.settings.stride is None:
            return [Window(0, document.first, len(document.ids))]
        return windows(len(document.ids), self.settings.window, self.settings.stride, prefix=len(document.prefix))

    def _short_windows(self, document: TokenisedDocument) -> list[Window]:
        """Windows that give each token at least `short_context` tokens of context, and at most a quarter more."""
        context = self.settings.short_context
        if context is None:
            return []
        stride = _short_stride(context)
        return windows(len(document.ids), context + stride, stride, prefix=len(document.prefix))

    def _input(self, document: TokenisedDocument, window: Window) -> Any:
        return np.concatenate([document.prefix, document.ids[window.start : window.end]])

    def _cost(self, place: Place, quadratic: float) -> float:
        document = self.documents[place.trial]
        every = (*self._windows(document), *self._short_windows(document))
        return sum(token_cost(0, len(document.prefix) + w.end - 1 - w.start, quadratic=quadratic) for w in every)

    def _share(self, left: Sequence[Place], ranks: Ranks) -> list[Place]:
        """This process's documents: the longest first, each to whoever has the least to do."""
        if ranks.world_size == 1:
            return list(left)
        costs = self.costs(left)
        loads = [0.0] * ranks.world_size
        mine = []
        for place in sorted(left, key=lambda place: (-costs[place], place.trial)):
            least = loads.index(min(loads))
            loads[least] += costs[place]
            if least == ranks.rank:
                mine.append(place)
        return sorted(mine, key=lambda place: place.order)

    def _row(self, place: Place, scorer: Scorer) -> Row:
        began, before = time.perf_counter(), scorer.tokens_computed
        document = self.documents[place.trial]
        chosen = self._windows(document)
        losses, positions = self._score(document, chosen, scorer)
        nll = losses.nll.astype(np.float64)
        if not np.isfinite(nll).all():
            bad = int(np.argmin(np.isfinite(nll)))
            raise RopepatchError(
                f"the loss of {document.name} is not finite from token {document.first + bad} on",
                hint="try another dtype, or look at the patch",
            )
        row: Row = {
            **place._asdict(),
            "seed": self.settings.seed,
            "answer": document.name,
            "output": "",
            "correct": float(losses.hits.mean()),
            "nll": float(nll.sum()),
            "tokens_scored": len(nll),
            "bytes": document.scored_bytes,
            "windows": len(chosen),
            "by_position": buckets(positions, nll, self.settings.bucket),
        }
        if self.settings.form == "single_pass":
            row["by_context"] = self._by_context(document, positions, nll)
        if self.settings.short_context is not None:
            short = self._score(document, self._short_windows(document), scorer)[0].nll.astype(np.float64)
            row["long_short"] = _long_short(nll, short, positions, self.settings.short_context)
        self._distinct += len(document.ids)
        self._planned += sum(len(document.prefix) + w.end - w.start for w in chosen)
        self._computed += scorer.tokens_computed - before
        return {**row, "elapsed_s": round(time.perf_counter() - began, 6)}

    def _score(
        self, document: TokenisedDocument, chosen: Sequence[Window], scorer: Scorer
    ) -> tuple[Losses, npt.NDArray[np.int64]]:
        """The losses of all scored tokens, and how many tokens the model had read before each."""
        prefix = len(document.prefix)
        losses = [scorer.score(self._input(document, w), prefix + w.first - w.start) for w in chosen]
        positions = [np.arange(w.first, w.end) - w.start + prefix for w in chosen]
        return Losses.join(losses), np.concatenate(positions)

    def _by_context(
        self, document: TokenisedDocument, positions: npt.NDArray[np.int64], nll: npt.NDArray[np.float64]
    ) -> list[dict[str, Any]]:
        """The loss of the document's first tokens, for every context that it reaches."""
        reach = len(document.prefix) + len(document.ids)
        lengths = self.settings.lengths or tuple(_SHORTEST_CONTEXT << i for i in range(reach.bit_length()))
        inside = {length: positions < length for length in lengths if length <= reach}
        return [
            {"length": length, "tokens": int(chosen.sum()), "nll": float(nll[chosen].sum())}
            for length, chosen in inside.items()
        ]


def _short_stride(context: int) -> int:
    return max(1, context // 4)


def _long_short(
    long: npt.NDArray[np.float64], short: npt.NDArray[np.float64], positions: npt.NDArray[np.int64], context: int
) -> dict[str, Any]:
    """What the far context gains, over the tokens that have more context than the short pass gives any token.

    Returns:
        `tokens`: how many there are; `gain`: short loss minus long loss, summed, nats; `key_tokens` and `key_nll`: the
        tokens that LongPPL counts, and their long loss.
    """
    far = positions >= context + _short_stride(context)
    gain = (short - long)[far]
    key = (gain > KEY_GAIN) & (long[far] < KEY_LOSS)
    return {
        "tokens": int(far.sum()),
        "gain": float(gain.sum()),
        "key_tokens": int(key.sum()),
        "key_nll": float(long[far][key].sum()),
    }

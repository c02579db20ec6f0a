"""Does far text help? The loss of a document's end behind its far text, behind the same far text in disorder, alone."""

from __future__ import annotations

import hashlib
import itertools
import re
import time
from collections.abc import Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ropepatch.errors import PromptError, RopepatchError
from ropepatch.evaluation.engine import DEFAULT_CHUNK
from ropepatch.evaluation.haystack import is_sentence_end
from ropepatch.evaluation.perplexity.documents import Document, default_documents, read_documents
from ropepatch.evaluation.perplexity.scorer import scorer
from ropepatch.evaluation.perplexity.summary import loss_interval, perplexity_of
from ropepatch.evaluation.progress import progress_bar, quadratic_cost
from ropepatch.evaluation.prompt import Ids, TextEncoder
from ropepatch.evaluation.summary import run_title, trained_length
from ropepatch.evaluation.task import Place
from ropepatch.evaluation.trie import token_cost

if TYPE_CHECKING:
    from ropepatch.evaluation.sharding import Ranks
    from ropepatch.evaluation.tasks.far_context import FarContextSuite

Row = dict[str, Any]
CONTEXTS = ("intact", "shuffled", "none")
"""What stands before the scored text: its own far text, that text's sentences in another order, nothing."""

_MARK = re.compile(r"""[.!?。！？]["'”’)\]」』]*""")


class FarContextJob:
    """The documents of a `far_context` suite on one model.

    Args:
        model: a decoder-only language model.
        tokenizer: the model's own, a fast one.
        settings: the suite.
        chunk_size: most tokens in one forward; None for the engine's own.

    Raises:
        PromptError: a document cannot be read, or has no far text of at least two sentences.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: FarContextSuite, *, chunk_size: int | None = None) -> None:
        self.model, self.settings = model, settings
        self._chunk_size = DEFAULT_CHUNK if chunk_size is None else chunk_size
        paths, most = settings.text, settings.max_tokens
        documents = default_documents() if paths is None else read_documents(paths, tokens=most)
        encoder = TextEncoder(tokenizer)
        self._identities = [document.identity for document in documents]
        self.inputs_of = [
            far_inputs(document, encoder, keep=settings.keep, most=most, seed=settings.seed) for document in documents
        ]
        self.names = [document.name for document in documents]
        self._computed = self._planned = 0

    def places(self) -> list[Place]:
        name = self.settings.name
        return [Place(name, len(inputs["intact"]), None, i) for i, (inputs, _) in enumerate(self.inputs_of)]

    def inputs(self) -> Mapping[str, Any]:
        return {"text": self._identities}

    def check(self) -> None:
        """Hold the longest input against the model's tables.

        Raises:
            UnsupportedModelError: the model cannot take it.
        """
        with scorer(self.model, self._longest(), chunk_size=self._chunk_size):
            pass

    def rows(self, left: Sequence[Place], ranks: Ranks, *, progress: bool) -> Generator[Row, None, None]:
        mine = list(left)[ranks.rank :: ranks.world_size]
        if not mine:
            return
        total, quadratic = sum(self.costs(mine).values()), quadratic_cost(self.model)
        with (
            scorer(self.model, self._longest(), chunk_size=self._chunk_size) as ready,
            progress_bar(ready, total, quadratic, progress),
        ):
            for place in mine:
                began = time.perf_counter()
                inputs, scored = self.inputs_of[place.trial]
                losses = {name: ready.score(ids, len(ids) - scored) for name, ids in inputs.items()}
                sums = {name: float(found.nll.astype(np.float64).sum()) for name, found in losses.items()}
                if not np.isfinite(list(sums.values())).all():
                    raise RopepatchError(
                        f"the loss of {self.names[place.trial]} is not finite", hint="try another dtype"
                    )
                self._planned += sum(map(len, inputs.values()))
                yield {
                    **place._asdict(),
                    "seed": self.settings.seed,
                    "answer": self.names[place.trial],
                    "output": "",
                    "correct": float(losses["intact"].hits.mean()),
                    "tokens_scored": scored,
                    "nll": sums["intact"],
                    **{f"nll_{name}": sums[name] for name in CONTEXTS[1:]},
                    "elapsed_s": round(time.perf_counter() - began, 6),
                }
            self._computed += ready.tokens_computed

    def start_plan(self) -> bool:
        """For a time budget: costs are in units of work, not in seconds."""
        return False

    def costs(self, places: Sequence[Place]) -> dict[Place, float]:
        """What each document costs; they share nothing."""
        quadratic = quadratic_cost(self.model)
        return {
            place: sum(
                token_cost(0, len(ids) - 1, quadratic=quadratic) for ids in self.inputs_of[place.trial][0].values()
            )
            for place in places
        }

    def work(self) -> dict[str, Any]:
        """Tokens of the inputs; nothing is shared between them."""
        return {
            "trie_size": self._planned,
            "sum_of_prompts": self._planned,
            "tokens_computed": self._computed,
            "tokens_decoded": 0,
            "reuse": False,
            "reuse_refused": None,
        }

    def _longest(self) -> Ids:
        return max((ids for inputs, _ in self.inputs_of for ids in inputs.values()), key=len)


def far_inputs(
    document: Document, encoder: TextEncoder, *, keep: int, most: int, seed: int
) -> tuple[dict[str, Ids], int]:
    """A document's inputs by what stands before its end, and how many of their last tokens are scored.

    The document is cut after `most` tokens; its end is the last `keep` tokens and what belongs to their first sentence.
    The scored tokens are those that all inputs end with, without the first: alone it has nothing before it.

    Raises:
        PromptError: there are not two whole sentences before the end, or the end's tokens change with what is before.
    """
    tokens = encoder.encode(document.text)
    text = document.text[: int(tokens.ends[:most][-1])]
    tokens = encoder.encode(text)
    borders = [0, *(m.end() for m in _MARK.finditer(text) if is_sentence_end(text, m.end()))]
    limit = int(tokens.starts[max(0, len(tokens) - keep)])
    borders = [border for border in borders if border <= limit]
    if len(tokens) <= keep or len(borders) < 3:
        raise PromptError(
            f"the document {document.path} has no far text",
            given=f"{len(tokens)} tokens, of which {keep} are kept",
            allowed="at least two whole sentences before what is kept",
        )
    start = borders[-1]
    sentences = [text[a:b] for a, b in itertools.pairwise(borders)]
    # The same order on every machine and for every document of the same content.
    digest = hashlib.sha256(f"far_context|{seed}|{text}".encode()).digest()
    order = np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(len(sentences))
    disorder = "".join(sentences[i] for i in order).lstrip()
    inputs = {
        "intact": tokens.ids,
        "shuffled": encoder.encode(disorder + text[start:]).ids,
        "none": encoder.encode(text[start:].lstrip()).ids,
    }
    alike = min(_common_suffix(inputs["intact"], inputs[name]) for name in CONTEXTS[1:])
    if alike <= keep // 2:
        raise PromptError(f"the tokens of the end of {document.path} change with the text before it")
    return inputs, alike - 1


def summarise_far(rows: Sequence[Row], configuration: Mapping[str, Any], *, title: str | None = None) -> dict[str, Any]:
    """The content of `summary.json`: a perplexity for each context, and what order and far text gain.

    `contexts` has `loss` (nats per token), `perplexity` and their 95 % interval for each of `CONTEXTS`. `gains` are
    differences of losses on the same tokens, paired by document: `far_text` (none minus intact) and `order` (shuffled
    minus intact), with intervals; where `order` is about 0, the model makes no use of what the far text says.
    """
    rows = sorted(rows, key=lambda row: row["trial"])
    tokens = [row["tokens_scored"] for row in rows]
    sums = {name: [row["nll" if name == "intact" else f"nll_{name}"] for row in rows] for name in CONTEXTS}
    gains = {"far_text": "none", "order": "shuffled"}
    intact = _mean(sums["intact"], tokens)
    return {
        "task": configuration.get("task"),
        "title": run_title(configuration) if title is None else title,
        "trained_length": trained_length(configuration),
        "trials": len(rows),
        **{name: configuration.get(name) for name in ("keep", "max_tokens")},
        "perplexity": perplexity_of(intact["loss"]),
        "tokens_scored": sum(tokens),
        "contexts": [
            {"context": name, **(found := _mean(sums[name], tokens)), "perplexity": perplexity_of(found["loss"])}
            for name in CONTEXTS
        ],
        "gains": {
            gain: _mean([other - own for other, own in zip(sums[name], sums["intact"], strict=True)], tokens)
            for gain, name in gains.items()
        },
        "documents": [
            {"name": row["answer"], "tokens": n, "length": row["length"]}
            | {name: sums[name][i] / n for name in CONTEXTS}
            for i, (row, n) in enumerate(zip(rows, tokens, strict=True))
        ],
        "cells": [],
        "by_length": [],
        "effective_length": None,
        "effective_length_relative": None,
    }


def _mean(sums: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    low, high = loss_interval(sums, tokens) or (None, None)
    return {"loss": sum(sums) / sum(tokens), "ci_low": low, "ci_high": high}


def _common_suffix(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[len(a) - n :][::-1] != b[len(b) - n :][::-1])
    return int(differing[0]) if differing.size else n

"""Scores many prompts at the cost of their distinct tokens.

For every prompt the engine gives what the model generates greedily, and how likely it finds the right answer. Prompt
and answer are read in one go: the logits over the answer are its teacher-forced score, and as long as the most likely
token is the answer's, they are also what greedy generation would have produced; only from the first difference on does
the engine generate, several tokens at once where they can be guessed (`lookup`).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from ropepatch.errors import RopepatchError, UnsupportedModelError
from ropepatch.evaluation.cache import SMALLEST_CHUNK, Reader, unheard
from ropepatch.evaluation.limits import check_length, length_dependent_rope
from ropepatch.evaluation.lookup import Guesser
from ropepatch.evaluation.pieces import PROBE, fastest_way
from ropepatch.evaluation.plain import full_logits, generate_plain
from ropepatch.evaluation.prompt import Ids
from ropepatch.evaluation.trie import Visit, trie_size, walk

DEFAULT_CHUNK = 4096


@dataclass(frozen=True, eq=False)
class Query:
    """A prompt and the answer that it should be continued with; token ids, int32, both at least one token.

    Attributes:
        most_tokens: most tokens to generate; fewer where the model's table of positions ends before.
        enough: whether these generated tokens are enough; None: only their number decides.
    """

    prompt: Ids
    answer: Ids
    most_tokens: int
    enough: Callable[[list[int]], bool] | None = None

    @property
    def sequence(self) -> Ids:
        """What has to be read to score the answer: prompt and answer without the answer's last token."""
        return np.concatenate([self.prompt, self.answer[:-1]])


@dataclass(frozen=True)
class Outcome:
    """What a model made of a query.

    Attributes:
        index: the query's place in the list that was given.
        generated: greedy tokens, as far as they were needed.
        forced: whether every answer token is the most likely one after prompt and preceding answer tokens.
        logprob: log-probability of the answer given the prompt, in nats, summed over its tokens in float32.
        elapsed: seconds of work for this query, shared prefixes charged to the query that met them first.
    """

    index: int
    generated: list[int]
    forced: bool
    logprob: float
    elapsed: float


@dataclass
class Work:
    """Tokens, counted.

    Attributes:
        trie_size: distinct prefixes of the queries' sequences (prompt and answer, without its last token).
        sum_of_prompts: tokens of these sequences without any sharing.
        tokens_computed: tokens of them that went through the model. Where prefixes are shared this is `trie_size`, and
            one more for each prompt that lies wholly within an earlier sequence: its last token is read again.
        tokens_decoded: further tokens that went through the model after a wrong answer token: generated, or guesses.
    """

    trie_size: int = 0
    sum_of_prompts: int = 0
    tokens_computed: int = 0
    tokens_decoded: int = 0


@dataclass
class Engine:
    """Runs queries on one model. Use it in a `with` block: it may select a faster exact attention meanwhile.

    Attributes:
        reuse: whether prefixes are shared; decided by trying on a prompt's first tokens that a cache which
            was cut back and extended gives the logits of a plain forward.
        reason: why not, when they are not.
        work: tokens counted so far.
    """

    model: nn.Module
    chunk_size: int = DEFAULT_CHUNK
    on_tokens: Callable[[int, int], None] = field(default=unheard)
    reuse: bool = field(default=False, init=False)
    reason: str | None = field(default=None, init=False)
    work: Work = field(default_factory=Work, init=False)

    def __post_init__(self) -> None:
        config = getattr(self.model, "config", None)
        if config is None or getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(
                "the evaluation needs a decoder-only language model", given=type(self.model).__name__
            )
        self._stack = ExitStack()
        self._reader: Reader | None = None
        self._decoding = False
        self._remembers_length = False
        self._readable: int | None = None

    def __enter__(self) -> Engine:
        self._modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        return self

    def __exit__(self, *error: object) -> None:
        self._reader = None
        self._stack.close()
        for module, training in self._modes:
            module.training = training

    @torch.inference_mode()
    def prepare(self, queries: Sequence[Query]) -> list[Visit]:
        """Check the model against the longest query, choose the way, and plan the walk.

        Raises:
            UnsupportedModelError: a query is longer than the model's table of positions.
        """
        longest = max(len(q.prompt) + len(q.answer) - 1 for q in queries)
        self._readable = check_length(self.model, longest)
        rope = length_dependent_rope(self.model, longest)
        # transformers' dynamic scaling remembers the longest input; a short one makes it forget.
        self._remembers_length = rope is not None
        if rope is not None:
            self._reader, self.reuse, self.reason = (
                None,
                False,
                f"its {rope} rotary embedding changes with the length of the input",
            )
        else:
            self._choose(max((q.sequence for q in queries), key=len)[:PROBE])
        visits = walk([q.sequence for q in queries])
        self.work.trie_size += trie_size(visits)
        self.work.sum_of_prompts += sum(visit.length * len(visit.members) for visit in visits)
        return visits

    @torch.inference_mode()
    def _choose(self, ids: Ids) -> None:
        """Take the fastest way that agrees with a plain forward."""
        self._reader = None
        self._stack.close()
        tried: list[Reader] = []

        def read(unmasked: bool) -> torch.Tensor:
            tried.append(Reader(self.model, chunk_size=self.chunk_size, unmasked=unmasked))
            return _read_in_pieces(tried[-1], ids)

        self.reason = fastest_way(self.model, ids, read, self._stack)
        self.reuse = self.reason is None
        if self.reuse:
            self._reader = tried[-1]
            self._reader.reset()
            self._reader.on_tokens = self._count

    def run(
        self,
        queries: Sequence[Query],
        *,
        visits: Sequence[Visit] | None = None,
        end_tokens: frozenset[int] = frozenset(),
    ) -> Generator[Outcome, None, None]:
        """Answer the queries, each yielded as soon as it is done.

        Args:
            queries: in any order; outcomes come in the order of the walk.
            visits: what `prepare` returned for them.
            end_tokens: ids that end a text; generation stops after one.

        Raises:
            RopepatchError: a query does not fit into memory even in small pieces.
        """
        for visit in visits if visits is not None else self.prepare(queries):
            known: dict[tuple[int, bytes], tuple[list[int], bool, float]] = {}
            shared = visit.shared
            for index in visit.members:
                query = self._within_table(queries[index])
                began = time.perf_counter()
                # The same sequence may still be another query: cut elsewhere, or with another last answer token.
                same = (len(query.prompt), query.answer.tobytes())
                if same not in known:
                    known[same] = self._answer(query, shared, _Stop(query, end_tokens))
                    shared = visit.length
                yield Outcome(index, *known[same], elapsed=time.perf_counter() - began)

    def _within_table(self, query: Query) -> Query:
        if self._readable is None:
            return query
        # The last token that is generated is not read.
        most = min(query.most_tokens, self._readable - len(query.prompt) + 1)
        return dataclasses.replace(query, most_tokens=most)

    @torch.inference_mode()
    def _answer(self, query: Query, shared: int, stop: _Stop) -> tuple[list[int], bool, float]:
        while True:
            try:
                if self._reader is not None:
                    return self._answer_reusing(self._reader, query, shared, stop)
                return self._answer_plainly(query, stop)
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                self._smaller_chunks(query, error)

    def _smaller_chunks(self, query: Query, error: BaseException) -> None:
        """Halve the chunk after running out of memory, or give up."""
        self._decoding = False
        if self._reader is None or self._reader.chunk_size <= SMALLEST_CHUNK:
            raise RopepatchError(
                f"out of memory on a prompt of {len(query.prompt)} tokens", hint="finished trials are kept"
            ) from error
        self._reader.reset()
        self._reader.chunk_size = max(SMALLEST_CHUNK, min(self._reader.chunk_size, len(query.prompt)) // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _answer_reusing(self, reader: Reader, query: Query, shared: int, stop: _Stop) -> tuple[list[int], bool, float]:
        sequence, end = query.sequence, len(query.prompt)
        # The prediction of the first answer token is needed, so the prompt's last token is always read.
        reader.rewind(min(shared, end - 1))
        logits = reader.extend(sequence[reader.length :], keep=len(sequence) - end + 1)
        right, logprob = _score(logits, query.answer)
        if right == len(query.answer):
            return query.answer.tolist(), True, logprob
        generated = [*query.answer[:right].tolist(), int(logits[right].argmax())]
        reader.rewind(end + right)
        self._decoding = True
        self._generate(reader, query, generated, stop)
        self._decoding = False
        # What was generated is no part of the next sequence.
        reader.rewind(end)
        return generated, False, logprob

    def _generate(self, reader: Reader, query: Query, generated: list[int], stop: _Stop) -> None:
        """Greedy tokens until `stop`, added to those that are there; all but the last of them have been read."""
        guesser = Guesser(query.prompt, max(query.most_tokens, len(generated)))
        for token in generated:
            guesser.add(token)
        done = stop(generated)
        while not done:
            guesses = guesser.guess()
            read = np.concatenate([np.asarray(generated[-1:], dtype=np.int32), guesses])
            chosen = reader.extend(read, keep=len(read)).argmax(-1).tolist()
            right = next((i for i, guess in enumerate(guesses) if guess != chosen[i]), len(guesses))
            for token in chosen[: right + 1]:
                generated.append(token)
                guesser.add(token)
                done = stop(generated)
                if done:
                    break
            guesser.learn(len(guesses), right)
            reader.rewind(len(query.prompt) + len(generated) - 1)

    def _answer_plainly(self, query: Query, stop: _Stop) -> tuple[list[int], bool, float]:
        if self._remembers_length:
            full_logits(self.model, query.prompt[:1])
        generated, logits = generate_plain(
            self.model, query.prompt, stop, max_new_tokens=query.most_tokens, end_tokens=stop.end_tokens
        )
        self._count(0, len(query.prompt) + min(len(generated), len(query.answer)) - 1)
        self.work.tokens_decoded += max(0, len(generated) - len(query.answer))
        if generated[: len(query.answer)] == query.answer.tolist():
            return generated, True, _score(logits[: len(query.answer)], query.answer)[1]
        forced = full_logits(self.model, query.sequence, keep=len(query.answer))
        self._count(0, len(query.sequence))
        right, logprob = _score(forced, query.answer)
        return generated, right == len(query.answer), logprob

    def _count(self, start: int, end: int) -> None:
        if self._decoding:
            self.work.tokens_decoded += end - start
        else:
            self.work.tokens_computed += end - start
            self.on_tokens(start, end)


@dataclass(frozen=True)
class _Stop:
    """When the generation for a query has gone far enough."""

    query: Query
    end_tokens: frozenset[int]

    def __call__(self, generated: list[int]) -> bool:
        query = self.query
        if len(generated) >= query.most_tokens or generated[-1] in self.end_tokens:
            return True
        return query.enough is not None and query.enough(generated)


def _score(logits: torch.Tensor, answer: Ids) -> tuple[int, float]:
    """How many leading answer tokens are the most likely ones, and the answer's log-probability.

    Args:
        logits: the predictions of the answer's tokens, [len(answer), vocabulary].
    """
    target = torch.from_numpy(answer.astype("int64")).to(logits.device)
    wrong = (logits.argmax(-1) != target).nonzero()
    logprob = torch.log_softmax(logits.float(), dim=-1).gather(1, target.unsqueeze(1)).sum()
    return int(wrong[0]) if wrong.numel() else len(answer), float(logprob)


def _read_in_pieces(reader: Reader, ids: Ids) -> torch.Tensor:
    """The logits of the last tokens, after reading, cutting back and reading on."""
    n = len(ids)
    for piece in (ids[: n // 3], ids[n // 3 : n - n // 6]):
        if len(piece):
            reader.extend(piece, keep=1)
    reader.rewind(n // 2)
    return reader.extend(ids[n // 2 :], keep=n - n // 2)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in text for words in ("not enough memory", "can't allocate memory", "out of memory")
    )


def end_tokens(model: Any) -> frozenset[int]:
    """The ids at which the model's own generation config ends a text."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if ids is None:
        ids = model.config.eos_token_id if hasattr(model.config, "eos_token_id") else None
    if ids is None:
        return frozenset()
    return frozenset(ids) if isinstance(ids, (list, tuple)) else frozenset([ids])

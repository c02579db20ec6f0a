"""A retrieval suite on its way: the prompts that are left, whose they are, and a row for each that is answered."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from ropepatch.evaluation.chunked_attention import chunked_attention
from ropepatch.evaluation.engine import DEFAULT_CHUNK, Engine, Outcome, Query, end_tokens
from ropepatch.evaluation.estimate import WORTH_SAYING, Pace, announcement, measure_pace
from ropepatch.evaluation.limits import check_length
from ropepatch.evaluation.plain import full_logits
from ropepatch.evaluation.progress import progress_bar, quadratic_cost, say
from ropepatch.evaluation.trie import Visit, shares, token_cost, trie_size, walk

if TYPE_CHECKING:
    from ropepatch.evaluation.prompt import Ids
    from ropepatch.evaluation.sharding import Ranks
    from ropepatch.evaluation.task import Place, Prompt, Retrieval

Row = dict[str, Any]


class RetrievalJob:
    """The prompts of a retrieval suite on one model.

    Args:
        model: a decoder-only language model.
        retrieval: the suite, made ready for the model's tokenizer.
        seed: recorded in every row.
        chunk_size: most tokens in one forward; None for the engine's own.
    """

    def __init__(self, model: Any, retrieval: Retrieval, *, seed: int, chunk_size: int | None = None) -> None:
        self.retrieval = retrieval
        self.seed = seed
        self.engine = Engine(model, DEFAULT_CHUNK if chunk_size is None else chunk_size)
        self.quadratic = quadratic_cost(model)
        self._pace: Pace | None = None
        self._built: dict[Place, Prompt] = {}

    def places(self) -> list[Place]:
        return self.retrieval.places()

    def inputs(self) -> Mapping[str, Any]:
        return self.retrieval.inputs()

    def check(self) -> None:
        """Build a prompt of every task at its shortest length, and hold the longest against the model's tables."""
        places = self.places()
        shortest: dict[str, Place] = {}
        for place in places:
            if place.task not in shortest or place.length < shortest[place.task].length:
                shortest[place.task] = place
        answer = max(len(self.retrieval.build(place).answer) for place in shortest.values())
        check_length(self.engine.model, max(place.length for place in places) + answer - 1)

    def rows(self, left: Sequence[Place], ranks: Ranks, *, progress: bool) -> Generator[Row, None, None]:
        prompts = [self._prompt(place) for place in left]
        if not prompts:
            return
        with self.engine as engine:
            prompts = self._share(prompts, ranks)
            if not prompts:
                return
            queries = [self._query(prompt) for prompt in prompts]
            visits = engine.prepare(queries)
            if progress:
                self._announce(prompts, visits)
            answered: set[int] = set()
            try:
                with progress_bar(engine, self._total(visits), self.quadratic, progress):
                    for outcome in engine.run(queries, visits=visits, end_tokens=end_tokens(engine.model)):
                        answered.add(outcome.index)
                        yield self._row(prompts[outcome.index], outcome)
            finally:
                self._uncount(visits, answered)

    def work(self) -> dict[str, Any]:
        return {**asdict(self.engine.work), "reuse": self.engine.reuse, "reuse_refused": self.engine.reason}

    def start_plan(self) -> bool:
        """Learn what `costs` needs to know of the model: whether it shares prefixes, and its pace.

        Returns:
            Whether costs are in seconds: they are.
        """
        prompt = self._prompt(max(self.places(), key=lambda place: place.length))
        with self.engine as engine:
            # The longest prompt decides whether prefixes are shared.
            self._uncount(engine.prepare([self._query(prompt)]), set())
            self._pace = self._measure_pace(prompt.ids)
        return True

    def costs(self, places: Sequence[Place]) -> dict[Place, float]:
        """The seconds that trials which are run together are expected to take, in the order of `rows`.

        A prefix that several share is charged to the first. `start_plan` comes first.
        """
        prompts = [self._prompt(place) for place in places]
        if self._pace is None:
            raise RuntimeError("start_plan comes before costs")
        costs: dict[Place, float] = {}
        for visit in walk([self._query(prompt).sequence for prompt in prompts]):
            members = [prompts[index] for index in visit.members]
            cost = self._visit_seconds(visit, members, self._pace)
            for prompt in members:
                costs[prompt.place] = cost
                if self.engine.reuse:
                    cost = 0.0  # the same sequence again
        return costs

    def _prompt(self, place: Place) -> Prompt:
        # Planning asks for the same prompts again and again.
        if place not in self._built:
            self._built[place] = self.retrieval.build(place)
        return self._built[place]

    def _announce(self, prompts: Sequence[Prompt], visits: Sequence[Visit]) -> None:
        pace = self._measure_pace(max((prompt.ids for prompt in prompts), key=len))
        seconds = sum(self._visit_seconds(visit, [prompts[i] for i in visit.members], pace) for visit in visits)
        if seconds >= WORTH_SAYING:
            reuse = self.engine.reuse
            tokens = trie_size(visits) if reuse else sum(visit.length * len(visit.members) for visit in visits)
            say(announcement(len(prompts), tokens, seconds))

    @torch.inference_mode()
    def _measure_pace(self, ids: Ids) -> Pace:
        model = self.engine.model

        def read(tokens: int) -> None:
            # The number makes an accelerator finish.
            full_logits(model, ids[:tokens], keep=1).argmax().item()

        # Without a cache: nothing of it stays.
        with chunked_attention(model):
            return measure_pace(read, len(ids), self.quadratic)

    def _visit_seconds(self, visit: Visit, prompts: Sequence[Prompt], pace: Pace) -> float:
        shared = visit.shared if self.engine.reuse else 0
        work = token_cost(shared, visit.length, quadratic=self.quadratic)
        # Where the answer is right nothing is generated, where it is wrong up to the most: between the two.
        return pace.seconds(1 + max(prompt.most_tokens for prompt in prompts) / 2, work)

    def _uncount(self, visits: Sequence[Visit], answered: set[int]) -> None:
        """Take what was planned but not run out of the count."""
        work = self.engine.work
        for visit in visits:
            missed = sum(index not in answered for index in visit.members)
            work.sum_of_prompts -= visit.length * missed
            if missed == len(visit.members):
                work.trie_size -= visit.length - visit.shared

    def _share(self, prompts: list[Prompt], ranks: Ranks) -> list[Prompt]:
        if ranks.world_size == 1:
            return prompts
        visits = walk([self._query(prompt).sequence for prompt in prompts])
        mine = shares(visits, ranks.world_size, quadratic=self.quadratic)[ranks.rank]
        return [prompts[index] for index in mine]

    def _total(self, visits: Sequence[Visit]) -> float:
        reuse, quadratic = self.engine.reuse, self.quadratic
        return sum(token_cost(visit.shared if reuse else 0, visit.length, quadratic=quadratic) for visit in visits)

    def _query(self, prompt: Prompt) -> Query:
        def enough(generated: list[int]) -> bool:
            return self.retrieval.enough(prompt, self.retrieval.encoder.decode(generated))

        return Query(prompt.ids, prompt.answer, prompt.most_tokens, enough)

    def _row(self, prompt: Prompt, outcome: Outcome) -> Row:
        grade = self.retrieval.grade(prompt, self.retrieval.encoder.decode(outcome.generated))
        return {
            **prompt.place._asdict(),
            "seed": self.seed,
            "answer": prompt.expected if isinstance(prompt.expected, str) else list(prompt.expected),
            "output": grade.output,
            "correct": grade.correct,
            **grade.details,
            "forced": outcome.forced,
            "logprob": outcome.logprob,
            **prompt.details,
            "elapsed_s": round(outcome.elapsed, 6),
        }

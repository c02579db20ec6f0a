"""A retrieval suite on its way: the prompts that are left, whose they are, and a row for each that is answered."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ropepatch.evaluation.engine import DEFAULT_CHUNK, Engine, Outcome, Query, end_tokens
from ropepatch.evaluation.limits import check_length
from ropepatch.evaluation.progress import progress_bar, quadratic_cost
from ropepatch.evaluation.trie import Visit, shares, token_cost, walk

if TYPE_CHECKING:
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
        prompts = [self.retrieval.build(place) for place in left]
        if not prompts:
            return
        quadratic = quadratic_cost(self.engine.model)
        with self.engine as engine:
            prompts = self._share(prompts, ranks, quadratic)
            if not prompts:
                return
            queries = [self._query(prompt) for prompt in prompts]
            visits = engine.prepare(queries)
            with progress_bar(engine, self._total(visits, quadratic), quadratic, progress):
                for outcome in engine.run(queries, visits=visits, end_tokens=end_tokens(engine.model)):
                    yield self._row(prompts[outcome.index], outcome)

    def work(self) -> dict[str, Any]:
        return {**asdict(self.engine.work), "reuse": self.engine.reuse, "reuse_refused": self.engine.reason}

    def _share(self, prompts: list[Prompt], ranks: Ranks, quadratic: float) -> list[Prompt]:
        if ranks.world_size == 1:
            return prompts
        visits = walk([self._query(prompt).sequence for prompt in prompts])
        return [prompts[index] for index in shares(visits, ranks.world_size, quadratic=quadratic)[ranks.rank]]

    def _total(self, visits: Sequence[Visit], quadratic: float) -> float:
        reuse = self.engine.reuse
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

"""A suite of prompts on its way through a served model: several requests at a time, a row for each that is answered."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ropepatch.errors import EndpointError, OptionError, UnsupportedModelError, UsageError
from ropepatch.evaluation.served.client import Client
from ropepatch.evaluation.served.model import Completion, Contact, ServedModel
from ropepatch.evaluation.served.prompts import Served, Speller, beyond
from ropepatch.evaluation.trie import shares, trie_size, walk

if TYPE_CHECKING:
    from ropepatch.evaluation.sharding import Ranks
    from ropepatch.evaluation.suite import Suite
    from ropepatch.evaluation.task import Place, Prompt, Retrieval

Row = dict[str, Any]

CHAT_ROOM = 48
"""Tokens that a chat may take beyond the answer: it answers in sentences."""


@dataclass(frozen=True, eq=False)
class _Answered:
    prompt: Prompt
    served: Served
    completion: Completion
    elapsed: float


class ServedJob:
    """The prompts of a suite on a served model; a `Job`.

    Args:
        served: the model.
        retrieval: the suite, made ready for the model's tokenizer.
        seed: recorded in every row.

    Raises:
        OptionError: a chat without the suite's chat template.
    """

    def __init__(self, served: ServedModel, retrieval: Retrieval, *, seed: int) -> None:
        if served.api == "chat" and not retrieval.encoder.chat_template:
            raise OptionError(
                "a chat is counted by the tokenizer's chat template",
                given="chat_template False",
                hint="turn the chat template on, or use the api 'completions'",
            )
        self.served = served
        self.retrieval = retrieval
        self.seed = seed
        self._contact: Contact | None = None
        # `trie_size`, as everywhere: distinct tokens of the prompts that were answered.
        self._counts = dict.fromkeys(("trie_size", "sum_of_prompts", "tokens_computed", "tokens_decoded"), 0)

    def places(self) -> list[Place]:
        return self.retrieval.places()

    def inputs(self) -> Mapping[str, Any]:
        return self.retrieval.inputs()

    @property
    def contact(self) -> Contact:
        """What the server said of itself; asked when it is first needed."""
        if self._contact is None:
            self._contact = self.served.contact(self.served.client(), self.retrieval.encoder)
        return self._contact

    def check(self) -> None:
        """Build a prompt of every task at its shortest length, ask the server, and hold the longest against its limit.

        Raises:
            PromptError: a prompt cannot be built.
            EndpointError: no server, no such model.
            UnsupportedModelError: the server says that its context is shorter than the longest prompt and its answer.
        """
        places = self.places()
        shortest: dict[str, Place] = {}
        for place in places:
            if place.task not in shortest or place.length < shortest[place.task].length:
                shortest[place.task] = place
        prompts = [self.retrieval.build(place) for place in shortest.values()]
        speller = Speller(self.retrieval.encoder, self.contact.way)
        most = max(self._most_tokens(prompt, speller.spell(prompt.ids)) for prompt in prompts)
        needed = max(place.length for place in places) + most
        limit = self.contact.context
        if limit is not None and needed > limit:
            raise UnsupportedModelError(
                f"the server has a context of {limit} tokens only",
                given=f"{needed} tokens, answer included",
                hint="evaluate shorter lengths, or start it with a longer context",
            )

    def configuration(self, name: str | None) -> dict[str, Any]:
        """What fixes the results besides the suite, in the places of a loaded model's own facts.

        Args:
            name: what the model is called in the results; None: as at the server.
        """
        return {
            "model": name or self.served.model,
            "patch": None,
            "dtype": None,
            "trained_length": self.contact.trained_length,
            "endpoint": {
                "url": self.served.endpoint,
                "api": self.served.api,
                "prompt": "text" if self.contact.way == "chat" else self.contact.way,
                "served_as": self.contact.served_as,
            },
        }

    def rows(self, left: Sequence[Place], ranks: Ranks, *, progress: bool) -> Generator[Row, None, None]:
        """A row for each prompt, in about the order in which prompts share their beginnings.

        Raises:
            EndpointError: a request failed for good. What was under way beside it has been yielded before.
        """
        prompts = [self.retrieval.build(place) for place in left]
        if ranks.world_size > 1:
            visits = walk([prompt.ids for prompt in prompts])
            mine = shares(visits, ranks.world_size, quadratic=0.0)[ranks.rank]
            prompts = [prompts[index] for index in mine]
        if not prompts:
            return
        from ropepatch.evaluation.progress import progress_bar

        meter, answered = _Meter(), []
        try:
            with progress_bar(meter, sum(len(prompt.ids) for prompt in prompts), 0.0, progress):
                for answer in self._answers(prompts[index] for index in _order(prompts)):
                    answered.append(answer.prompt.ids)
                    yield self._row(answer)
                    meter.on_tokens(0, len(answer.prompt.ids))
        finally:
            self._counts["trie_size"] += trie_size(walk(answered))

    def start_plan(self) -> bool:
        """Costs are in tokens: how fast the server is shows in the first trials."""
        return False

    def costs(self, places: Sequence[Place]) -> dict[Place, float]:
        """The tokens of these prompts, in the order in which they are sent."""
        return {places[i]: float(places[i].length) for i in _order([self.retrieval.build(place) for place in places])}

    def work(self) -> dict[str, Any]:
        return {**self._counts, "reuse": False, "reuse_refused": "what a server computes once is its own affair"}

    def _answers(self, prompts: Iterator[Prompt]) -> Generator[_Answered, None, None]:
        speller = Speller(self.retrieval.encoder, self.contact.way)
        client = self.served.client()
        pool = ThreadPoolExecutor(self.served.concurrency, thread_name_prefix="request")
        running: set[Future[_Answered]] = set()
        failure: BaseException | None = None
        try:
            while True:
                while failure is None and len(running) < self.served.concurrency:
                    prompt = next(prompts, None)
                    if prompt is None:
                        break
                    running.add(pool.submit(self._answer, client, prompt, speller.spell(prompt.ids)))
                if not running:
                    break
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    if future.exception() is None:
                        yield future.result()
                    else:
                        failure = failure or future.exception()
            if failure is not None:
                raise failure
        finally:
            # Left early (Ctrl-C, a full disk): nobody waits for answers that nobody takes.
            client.stop()
            pool.shutdown(cancel_futures=True)

    def _answer(self, client: Client, prompt: Prompt, served: Served) -> _Answered:
        began = time.perf_counter()
        completion = self.served.complete(client, self.contact.way, served.content, self._most_tokens(prompt, served))
        read = completion.prompt_tokens
        if read is not None and read < served.length - served.frame - max(8, served.length // 100):
            raise EndpointError(
                f"the server at {self.served.endpoint} read {read} of {served.length} tokens of a prompt",
                hint="give it a longer context, and this run the tokenizer of the model that it serves",
            )
        return _Answered(prompt, served, completion, time.perf_counter() - began)

    def _most_tokens(self, prompt: Prompt, served: Served) -> int:
        return prompt.most_tokens + (served.begun_tokens + CHAT_ROOM if self.contact.way == "chat" else 0)

    def _row(self, answered: _Answered) -> Row:
        prompt, served, completion = answered.prompt, answered.served, answered.completion
        expected = [prompt.expected] if isinstance(prompt.expected, str) else list(prompt.expected)
        read = served.length if completion.prompt_tokens is None else completion.prompt_tokens
        self._counts["sum_of_prompts"] += len(prompt.ids)
        self._counts["tokens_computed"] += read - min(read, completion.cached_tokens)
        self._counts["tokens_decoded"] += completion.generated_tokens
        chat = self.contact.way == "chat"
        grade = self.retrieval.grade(prompt, beyond(served.begun, completion.text) if chat else completion.text)
        row = {
            **prompt.place._asdict(),
            "seed": self.seed,
            "answer": prompt.expected if isinstance(prompt.expected, str) else expected,
            "output": grade.output,
            "correct": grade.correct,
            **grade.details,
            "forced": None,
            "logprob": None,
            **prompt.details,
            "length_served": read,
        }
        if self.contact.way != "ids":
            row["same_ids"] = served.same_ids
        if chat:
            row["reply"] = completion.text
            row["found"] = sum(one.lower() in completion.text.lower() for one in expected) / len(expected)
        return {**row, "elapsed_s": round(answered.elapsed, 6)}


def _order(prompts: Sequence[Prompt]) -> list[int]:
    """Indices, so that prompts with a common beginning follow each other: servers keep what they read last."""
    return [index for visit in walk([prompt.ids for prompt in prompts]) for index in visit.members]


class _Meter:
    """What the progress bar listens to."""

    def on_tokens(self, start: int, end: int) -> None:
        """Heard by nobody until a bar takes this place."""


def served_job(served: ServedModel, suite: Suite, tokenizer: Any, *, dtype: Any, chunk_size: int | None) -> ServedJob:
    """What a suite means for a served model, checked.

    Raises:
        UsageError: the suite needs more of a model than what it generates; names the suite.
        OptionError: a dtype or a chunk size, which are the server's own affair; a chat without a template.
        PromptError, EndpointError, UnsupportedModelError: as `ServedJob.check` has them.
    """
    from ropepatch.evaluation.suite import RetrievalSuite

    if not isinstance(suite, RetrievalSuite):
        raise UsageError(
            f"the suite {suite.name} needs the model's probabilities, which a server does not give",
            given=served.model,
            hint="load the model itself",
        )
    for name, value in (("dtype", dtype if dtype != "auto" else None), ("chunk_size", chunk_size)):
        if value is not None:
            raise OptionError(f"{name} is chosen where the model is served", given=value)
    job = ServedJob(served, suite.retrieval(tokenizer), seed=suite.seed)
    job.check()
    return job

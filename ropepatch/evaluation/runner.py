"""`evaluate`: from a model and a suite to a result, with every finished trial safe on disk on the way."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropepatch.errors import OptionError
from ropepatch.evaluation.result import EvaluationResult
from ropepatch.evaluation.sharding import Ranks, find_ranks
from ropepatch.evaluation.suites import PasskeySuite, load_suite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ropepatch.evaluation.engine import Engine, Outcome, Query
    from ropepatch.evaluation.passkey import PasskeyPrompt, PasskeyTask

Row = dict[str, Any]
_SPARE_TOKENS = 3


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    suite: str | Path = "passkey",
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] | None = None,
    trials: int | None = None,
    seed: int | None = None,
    digits: int | None = None,
    chat_template: bool | None = None,
    text: str | os.PathLike[str] | None = None,
    dtype: Any = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    model_name: str | None = None,
    chunk_size: int | None = None,
) -> EvaluationResult:
    """Measure how well a model finds a hidden key, by prompt length and place of the key.

    Each distinct token of the grid's prompts is computed once. Started by torchrun or accelerate launch, the processes
    share the work and all return the whole result.

    Args:
        model: a decoder-only language model (patched or not, PeftModel or plain). It is not changed.
        tokenizer: the model's own, a fast one.
        suite: a suite's name or the path of a YAML file; the settings below replace the suite's own.
        lengths: exact prompt lengths in tokens.
        depths: places of the key, 0..1.
        trials: prompts of each length and depth.
        seed: of the keys; 0 by default.
        digits: of each key.
        chat_template: whether prompts go through the tokenizer's chat template.
        text: file or folder of .txt files to hide the key in, instead of repeated sentences.
        dtype: the dtype that the model must have ("float32", "bfloat16", a torch.dtype); None or "auto": as it is.
        output: folder for run.json, results.jsonl, summary.json, heatmap.png and report.html. The same call again
            resumes: trials found there are not run twice.
        progress: show a progress bar on stderr.
        model_name: what the model is called in the results; by default the name it was loaded by.
        chunk_size: most tokens in one forward.

    Raises:
        UnknownNameError, OptionError, PromptError: what is asked cannot be; nothing has been run or written.
        UnsupportedModelError: not a decoder-only model, or a prompt exceeds its table of positions.
        OutputConflictError, OutputError: `output` belongs to another configuration, or cannot be written.
    """
    from ropepatch.evaluation.limits import check_length
    from ropepatch.evaluation.passkey import PasskeyTask

    settings = load_suite(
        suite,
        {
            "lengths": lengths,
            "depths": depths,
            "trials": trials,
            "seed": seed,
            "digits": digits,
            "chat_template": chat_template,
            "text": None if text is None else os.fspath(text),
        },
    )
    _check_dtype(model, dtype)
    source = _source(settings)
    task = PasskeyTask(
        tokenizer,
        longest=settings.lengths[-1],
        seed=settings.seed,
        digits=settings.digits,
        chat_template=settings.chat_template,
        text=source,
    )
    # What can be refused is refused before the folder is made.
    first = task.build(settings.lengths[0], settings.depths[0], 0)
    check_length(model, settings.lengths[-1] + len(first.answer) - 1)
    configuration = _configuration(model, settings, model_name, source.sha256 if source else None)
    run = _Run(model, task, settings, find_ranks(), progress, chunk_size)
    return run.in_folder(output, configuration) if output is not None else run.in_memory(configuration)


class _Run:
    """One evaluation on its way: which trials are left, whose they are, what came out."""

    def __init__(
        self,
        model: Any,
        task: PasskeyTask,
        settings: PasskeySuite,
        ranks: Ranks,
        progress: bool,
        chunk_size: int | None,
    ) -> None:
        from ropepatch.evaluation.engine import DEFAULT_CHUNK, Engine

        self.task = task
        self.settings = settings
        self.ranks = ranks
        self.show = progress and ranks.is_first
        self.engine = Engine(model, DEFAULT_CHUNK if chunk_size is None else _positive("chunk_size", chunk_size))

    def in_folder(self, output: str | os.PathLike[str], configuration: dict[str, Any]) -> EvaluationResult:
        from ropepatch.evaluation.folder import RunFolder

        ranks = self.ranks
        with RunFolder.open(output, configuration, rank=ranks.rank, world_size=ranks.world_size) as folder:
            # One list for all: what they see of each other's files may differ while they open the folder.
            finished = ranks.from_first(folder.finished)
            ranks.wait()
            rows = []
            with closing(self.rows(set(finished))) as measured:
                for row in measured:
                    folder.append(row)
                    rows.append(row)
            new = ranks.gather(rows)
            work = self.work()
            # Where nothing was left to run, what the folder says of the work that was done stays true.
            former = None if work["sum_of_prompts"] else _former_work(folder.path)
            summary = folder.finalize({"work": former or work}) if ranks.is_first else None
        return self.result([*finished.values(), *new], ranks.from_first(summary or {}), configuration, work)

    def in_memory(self, configuration: dict[str, Any]) -> EvaluationResult:
        from ropepatch.evaluation.summary import summarise

        rows = sorted(self.ranks.gather(list(self.rows(set()))), key=_place)
        work = self.work()
        return self.result(rows, {**summarise(rows, configuration), "work": work}, configuration, work)

    def rows(self, finished: set[tuple[int, float, int]]) -> Generator[Row, None, None]:
        """Run this process's share of the trials that are left; each row as soon as it is measured."""
        settings = self.settings
        places = [(n, d, t) for n in settings.lengths for d in settings.depths for t in range(settings.trials)]
        places = [place for place in places if place not in finished]
        if not places:
            return
        prompts = [self.task.build(*place) for place in places]
        with self.engine as engine:
            prompts = self._share(prompts)
            if not prompts:
                return
            queries = [_query(prompt) for prompt in prompts]
            visits = engine.prepare(queries)
            quadratic = _quadratic(engine.model)
            with _progress_bar(engine, visits, quadratic, self.show):
                for outcome in engine.run(
                    queries,
                    visits=visits,
                    max_new_tokens=max(len(q.answer) for q in queries) + _SPARE_TOKENS,
                    done=self._has_all_digits,
                    end_tokens=_end_tokens(engine.model),
                ):
                    yield self._row(prompts[outcome.index], outcome)

    def _share(self, prompts: list[PasskeyPrompt]) -> list[PasskeyPrompt]:
        from ropepatch.evaluation.trie import shares, walk

        if self.ranks.world_size == 1:
            return prompts
        visits = walk([_query(prompt).sequence for prompt in prompts])
        parts = shares(visits, self.ranks.world_size, quadratic=_quadratic(self.engine.model))
        return [prompts[index] for index in parts[self.ranks.rank]]

    def _has_all_digits(self, generated: list[int]) -> bool:
        return len(self.task.encoder.decode(generated).strip()) >= self.settings.digits

    def _row(self, prompt: PasskeyPrompt, outcome: Outcome) -> Row:
        text = self.task.encoder.decode(outcome.generated).strip()[: self.settings.digits]
        return {
            "task": self.task.name,
            "length": prompt.length,
            "depth": prompt.depth,
            "trial": prompt.trial,
            "seed": self.settings.seed,
            "answer": prompt.key,
            "output": text,
            "correct": int(text == prompt.key),
            "forced": outcome.forced,
            "logprob": outcome.logprob,
            "key_start": prompt.key_start,
            "key_end": prompt.key_end,
            "elapsed_s": round(outcome.elapsed, 6),
        }

    def work(self) -> dict[str, Any]:
        """What all processes together computed."""
        mine = {**asdict(self.engine.work), "reuse": self.engine.reuse, "reuse_refused": self.engine.reason}
        everyone = self.ranks.gather([mine])
        busy = [work for work in everyone if work["sum_of_prompts"]]
        total: dict[str, Any] = {name: sum(w[name] for w in everyone) for name in asdict(self.engine.work)}
        total["reuse"] = all(w["reuse"] for w in busy) if busy else None
        total["reuse_refused"] = next((w["reuse_refused"] for w in busy if w["reuse_refused"]), None)
        return total

    @staticmethod
    def result(
        rows: list[Row], summary: dict[str, Any], configuration: dict[str, Any], work: dict[str, Any]
    ) -> EvaluationResult:
        return EvaluationResult(sorted(rows, key=_place), summary, configuration, **work)


def _former_work(folder: Path) -> dict[str, Any] | None:
    from ropepatch.evaluation.folder import SUMMARY
    from ropepatch.files import read_object

    summary = folder / SUMMARY
    return read_object(summary).get("work") if summary.exists() else None


def _place(row: Row) -> tuple[int, float, int]:
    return row["length"], row["depth"], row["trial"]


def _query(prompt: PasskeyPrompt) -> Query:
    from ropepatch.evaluation.engine import Query

    return Query(prompt.ids, prompt.answer)


def _end_tokens(model: Any) -> frozenset[int]:
    from ropepatch.evaluation.engine import end_tokens

    return end_tokens(model)


def _source(settings: PasskeySuite) -> Any:
    from ropepatch.evaluation.haystack import read_text

    return None if settings.text is None else read_text(settings.text)


def _configuration(model: Any, settings: PasskeySuite, name: str | None, sha256: str | None) -> dict[str, Any]:
    """What fixes the results: a folder made with one configuration takes no trial of another."""
    import ropepatch

    patch = ropepatch.record_of(model)
    return {
        **settings.model_dump(mode="json", exclude={"description", "text"}),
        "text": None if settings.text is None else {"path": settings.text, "sha256": sha256},
        "model": name or model.config._name_or_path or type(model).__name__,
        "patch": patch,
        "dtype": str(_dtype(model)).removeprefix("torch."),
        "trained_length": ropepatch.inspect(model).trained_length,
    }


def _dtype(model: Any) -> Any:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _check_dtype(model: Any, dtype: Any) -> None:
    from ropepatch.loading import resolve_dtype

    if dtype in (None, "auto"):
        return
    if resolve_dtype(dtype) != _dtype(model):
        raise OptionError(
            "the model has another dtype than asked",
            given=str(dtype),
            allowed=str(_dtype(model)),
            hint="load it with from_pretrained(..., dtype=...): converting it later would round its rotary frequencies",
        )


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise OptionError(f"{name} must be positive", given=value)
    return value


def _quadratic(model: Any) -> float:
    """The work of one query-key pair over all layers, relative to one token's work in the weights."""
    config = model.config.get_text_config(decoder=True)
    parameters: int = sum(p.numel() for p in model.parameters())
    return float(2 * config.num_hidden_layers * config.hidden_size / parameters)


@contextmanager
def _progress_bar(engine: Engine, visits: Sequence[Any], quadratic: float, show: bool) -> Iterator[None]:
    """A bar in units of work, not of trials: a long prompt takes more than its share, a shared prefix nothing."""
    if not show:
        yield
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ropepatch.evaluation.cache import unheard
    from ropepatch.evaluation.trie import token_cost

    if engine.reuse:
        total = sum(token_cost(v.shared, v.length, quadratic=quadratic) for v in visits)
    else:
        total = sum(token_cost(0, v.length, quadratic=quadratic) for v in visits)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), speed_estimate_period=120
    ) as bar:
        task = bar.add_task("evaluating", total=total)
        engine.on_tokens = lambda start, end: bar.advance(task, token_cost(start, end, quadratic=quadratic))
        try:
            yield
        finally:
            engine.on_tokens = unheard

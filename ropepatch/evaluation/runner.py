"""`evaluate`: from a model and a suite to a result, with every finished trial safe on disk on the way."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropepatch.errors import OptionError
from ropepatch.evaluation.budget import Budget, Spender
from ropepatch.evaluation.result import EvaluationResult
from ropepatch.evaluation.served import ServedJob, ServedModel, served_job
from ropepatch.evaluation.sharding import Ranks, find_ranks
from ropepatch.evaluation.suites import load_suite
from ropepatch.evaluation.task import Place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ropepatch.evaluation.suite import Job, Suite

Row = dict[str, Any]


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    suite: str | Path = "passkey",
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float] | None = None,
    trials: int | None = None,
    seed: int | None = None,
    chat_template: bool | None = None,
    text: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    dtype: Any = None,
    output: str | os.PathLike[str] | None = None,
    progress: bool = True,
    model_name: str | None = None,
    chunk_size: int | None = None,
    budget: float | None = None,
    **settings: Any,
) -> EvaluationResult:
    """Run a suite on a model: how well it finds what is hidden in a long prompt, or how well it predicts a long text.

    Each distinct token of a grid's prompts is computed once. Started by torchrun or accelerate launch, the processes
    share the work and all return the whole result.

    Args:
        model: a decoder-only language model (patched or not, PeftModel or plain), or a `ServedModel`. It is not
            changed.
        tokenizer: the model's own, a fast one.
        suite: a suite's name or the path of a YAML file; the settings below replace the suite's own.
        lengths: exact prompt lengths in tokens.
        depths: places of what is hidden, 0..1.
        trials: prompts of each cell.
        seed: of everything that is drawn; 0 by default.
        chat_template: whether prompts go through the tokenizer's chat template.
        text: file or folder of .txt files to hide things in, or to predict; several where the suite takes them.
        dtype: the dtype that the model must have ("float32", "bfloat16", a torch.dtype); None or "auto": as it is.
        output: folder for run.json, results.jsonl, summary.json, figures and report.html. The same call again
            resumes: trials found there are not run twice.
        progress: show a progress bar on stderr, and how long a longer run will take.
        model_name: what the model is called in the results; by default the name it was loaded by.
        chunk_size: most tokens in one forward.
        budget: minutes that may be spent. `trials` is then the most of each cell: one for each, and further ones
            where the interval is widest, until the time is used up. No part of the configuration: the same call goes
            on with another budget, or without. The summary records it under `budget`.
        settings: further settings of the suite (`digits` of passkey, `window` of perplexity, ...).

    Raises:
        UnknownNameError, OptionError, PromptError: what is asked cannot be; nothing has been run or written.
        UnsupportedModelError: not a decoder-only model, or a prompt exceeds its table of positions.
        OutputConflictError, OutputError: `output` belongs to another configuration, or cannot be written.
        OptionError: not even one trial fits into the budget, and none is there from before.
    """
    time = None if budget is None else Budget(budget)
    chosen, job = make_job(
        model,
        tokenizer,
        suite,
        lengths=lengths,
        depths=depths,
        trials=trials,
        seed=seed,
        chat_template=chat_template,
        text=text,
        dtype=dtype,
        chunk_size=chunk_size,
        **settings,
    )
    run = _Run(chosen, job, _configuration(model, chosen, job, model_name), find_ranks(), progress, time)
    return run.in_memory() if output is None else run.in_folder(output)


def make_job(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    suite: str | Path,
    *,
    text: Any = None,
    dtype: Any = None,
    chunk_size: int | None = None,
    **settings: Any,
) -> tuple[Suite, Job]:
    """A suite with the caller's settings, and what it means for a model; whatever can be refused is refused here.

    Arguments and errors are those of `evaluate`.
    """
    chosen = load_suite(suite, {"text": _paths(text), **settings})
    if isinstance(model, ServedModel):
        return chosen, served_job(model, chosen, tokenizer, dtype=dtype, chunk_size=chunk_size)
    _check_dtype(model, dtype)
    if chunk_size is not None and chunk_size < 1:
        raise OptionError("chunk_size must be positive", given=chunk_size)
    job = chosen.job(model, tokenizer, chunk_size=chunk_size)
    job.check()
    return chosen, job


class _Run:
    """One evaluation on its way: which trials are left, and what came out."""

    def __init__(
        self,
        suite: Suite,
        job: Job,
        configuration: dict[str, Any],
        ranks: Ranks,
        progress: bool,
        budget: Budget | None,
    ) -> None:
        self.suite = suite
        self.job = job
        self.configuration = configuration
        self.ranks = ranks
        self.progress = progress and ranks.is_first
        self.budget = budget

    def in_folder(self, output: str | os.PathLike[str]) -> EvaluationResult:
        from ropepatch.evaluation.folder import RunFolder

        ranks = self.ranks
        with RunFolder.open(output, self.configuration, rank=ranks.rank, world_size=ranks.world_size) as folder:
            # One list for all: what they see of each other's files may differ while they open the folder.
            finished = ranks.from_first(folder.finished)
            ranks.wait()
            rows = []
            with closing(self.measured(finished)) as measured:
                for row in measured:
                    folder.append(row)
                    rows.append(row)
            new = ranks.gather(rows)
            work = self.work()
            # Where nothing was left to run, what the folder says of the work that was done stays true.
            former = None if work["sum_of_prompts"] else _former_work(folder.path)
            spent = self.spent(finished, new)
            summary = folder.finalize({"work": former or work, **spent}) if ranks.is_first else None
        return self.result([*finished.values(), *new], ranks.from_first(summary or {}), work)

    def in_memory(self) -> EvaluationResult:
        mine = list(self.measured({}))
        rows = sorted(self.ranks.gather(mine), key=_order)
        work = self.work()
        summary = {**self.suite.summarise(rows, self.configuration), "work": work, **self.spent({}, rows)}
        return self.result(rows, summary, work)

    def left(self, finished: Iterable[Place]) -> list[Place]:
        done = set(finished)
        return [place for place in self.job.places() if place not in done]

    def measured(self, finished: dict[Place, Row]) -> Generator[Row, None, None]:
        """This process's share of the trials that are left, or of those that the budget has time for."""
        left = self.left(finished)
        if self.budget is None:
            return self.job.rows(left, self.ranks, progress=self.progress)
        spender = Spender(self.job, left, finished.values(), self.ranks, self.budget)
        return spender.rows(progress=self.progress)

    def spent(self, finished: dict[Place, Row], new: list[Row]) -> dict[str, Any]:
        """What the summary says of the budget; nothing without one."""
        if self.budget is None:
            return {}
        if not finished and not new:
            raise OptionError(
                "the budget is too short for a single trial",
                given=f"{self.budget.minutes:g} minutes",
                hint="give more minutes, or begin with shorter lengths",
            )
        left = self.left([*finished, *(Place.of(row) for row in new)])
        return {"budget": {"minutes": self.budget.minutes, "trials_run": len(new), "trials_left": len(left)}}

    def work(self) -> dict[str, Any]:
        """What all processes together computed."""
        everyone = self.ranks.gather([self.job.work()])
        busy = [work for work in everyone if work["sum_of_prompts"]]
        counts = [name for name in everyone[0] if name not in ("reuse", "reuse_refused")]
        total: dict[str, Any] = {name: sum(work[name] for work in everyone) for name in counts}
        total["reuse"] = all(work["reuse"] for work in busy) if busy else None
        total["reuse_refused"] = next((work["reuse_refused"] for work in busy if work["reuse_refused"]), None)
        return total

    def result(self, rows: list[Row], summary: dict[str, Any], work: dict[str, Any]) -> EvaluationResult:
        return EvaluationResult(sorted(rows, key=_order), summary, self.configuration, **work)


def _former_work(folder: Path) -> dict[str, Any] | None:
    from ropepatch.evaluation.folder import SUMMARY
    from ropepatch.files import read_object

    summary = folder / SUMMARY
    return read_object(summary).get("work") if summary.exists() else None


def _order(row: Row) -> tuple[str, int, float, int]:
    return Place.of(row).order


def _paths(text: Any) -> Any:
    if text is None or isinstance(text, (str, os.PathLike)):
        return None if text is None else os.fspath(text)
    return [os.fspath(path) for path in text]


def _configuration(model: Any, suite: Suite, job: Job, name: str | None) -> dict[str, Any]:
    """What fixes the results: a folder made with one configuration takes no trial of another."""
    import ropepatch

    asked = {**suite.model_dump(mode="json", exclude={"description"}), **job.inputs()}
    if isinstance(job, ServedJob):
        return {**asked, **job.configuration(name)}
    return {
        **asked,
        "model": name or model.config._name_or_path or type(model).__name__,
        "patch": ropepatch.record_of(model),
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

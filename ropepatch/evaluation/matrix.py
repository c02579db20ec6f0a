"""Several patches of one model in one run: loaded once, patched and unpatched in turn, each in a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropepatch.errors import AlreadyPatchedError, OptionError, RopepatchError, UsageError
from ropepatch.evaluation.budget import Budget
from ropepatch.evaluation.progress import say
from ropepatch.evaluation.result import EvaluationResult
from ropepatch.evaluation.runner import evaluate, make_job
from ropepatch.evaluation.sharding import find_ranks
from ropepatch.evaluation.variants import Variant, parse_variants

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ropepatch.evaluation.compare import Comparison

COMPARISON = "comparison.md", "comparison.html"


@dataclass
class MatrixResult:
    """What `evaluate_matrix` returns.

    Attributes:
        results: finished runs by name, in the order of the matrix.
        refused: why the others were not run, by name.
        folders: of the finished runs, by name; empty without an output folder.
        comparison: of the runs; None without an output folder, where fewer than two are finished, and where
            they share nothing.
    """

    results: dict[str, EvaluationResult] = field(default_factory=dict)
    refused: dict[str, RopepatchError] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    comparison: Comparison | None = None


def evaluate_matrix(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    suite: str | Path,
    variants: Sequence[str | Mapping[str, Any] | Variant],
    *,
    output: str | os.PathLike[str] | None = None,
    model_name: str | None = None,
    progress: bool = True,
    budget: float | None = None,
    **settings: Any,
) -> MatrixResult:
    """Run a suite on a model under several patches.

    Each variant runs in `output`/NAME exactly as a single `evaluate` would, so either goes on with what the other
    began. A variant that is refused (the model lacks what the method changes, its folder belongs to another run) is
    told and passed over. At the end `output` holds comparison.md and comparison.html.

    Args:
        model: unpatched, and unpatched again after each variant.
        tokenizer: the model's own.
        suite: as for `evaluate`.
        variants: as for `parse_variants`: "unpatched", a method's name, {"method": "yarn", "options": {"factor": 2}}.
        output: parent of the runs' folders; None keeps everything in memory.
        model_name, progress: as for `evaluate`.
        budget: minutes for all variants together; each gets an even share of what is left.
        settings: as for `evaluate`.

    Raises:
        AlreadyPatchedError: the model is patched.
        UnknownNameError, OptionError, PromptError: what is asked cannot be; nothing has been run or written.
        OutputError: the comparison cannot be written.
    """
    import ropepatch

    chosen = parse_variants(variants)
    time = None if budget is None else Budget(budget)
    if ropepatch.record_of(model) is not None:
        raise AlreadyPatchedError(
            "the model of a matrix comes unpatched", hint="call ropepatch.unpatch(model), and name the patch a variant"
        )
    # What every variant would be refused for is refused now.
    make_job(model, tokenizer, suite, **settings)
    ranks = find_ranks()
    shown = progress and ranks.is_first
    result = MatrixResult()
    for number, variant in enumerate(chosen):
        if shown:
            say(f"{variant.name} ({number + 1} of {len(chosen)})")
        folder = None if output is None else Path(output) / variant.name
        running = False
        try:
            minutes = None if time is None else _share(time, len(chosen) - number)
            with _variant_of(model, variant):
                running = True
                result.results[variant.name] = evaluate(
                    model,
                    tokenizer,
                    suite,
                    output=folder,
                    model_name=model_name,
                    progress=progress,
                    budget=minutes,
                    **settings,
                )
        except RopepatchError as error:
            # One process alone may have failed: the others would wait for it in vain.
            if running and ranks.world_size > 1:
                raise
            result.refused[variant.name] = error
            if shown:
                say(f"{variant.name} is left out: {error}")
        else:
            if folder is not None:
                result.folders[variant.name] = folder
    if output is not None and ranks.is_first:
        result.comparison = write_comparison(list(result.folders.values()), Path(output))
    return result


def write_comparison(folders: Sequence[Path], output: Path) -> Comparison | None:
    """Write comparison.md and comparison.html of these runs into a folder.

    Returns:
        None, and nothing is written, with fewer than two runs, or where they cannot be compared: that is said.

    Raises:
        OutputError: the folder cannot be written.
    """
    from ropepatch.evaluation.compare import compare
    from ropepatch.evaluation.report import write_comparison_report
    from ropepatch.files import write_atomic

    if len(folders) < 2:
        return None
    try:
        comparison = compare(folders)
    except UsageError as error:  # within a budget, two runs may have no length in common
        say(f"no comparison: {error}")
        return None
    markdown, page = COMPARISON
    write_atomic(output / markdown, f"{comparison.to_markdown()}\n{comparison.explanation()}\n")
    write_comparison_report(comparison, output / page)
    return comparison


@contextmanager
def _variant_of(model: Any, variant: Variant) -> Iterator[None]:
    import ropepatch

    if variant.method is None:
        yield
        return
    with ropepatch.patched(model, variant.method, **variant.options):
        yield


def _share(time: Budget, runs: int) -> float:
    """Minutes for the next of so many runs."""
    left = time.left
    if left <= 0:
        raise OptionError("the budget was used up before", given=f"{time.minutes:g} minutes", hint="give more minutes")
    return left / 60 / runs

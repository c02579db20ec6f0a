"""Several patches and models in one `ropepatch eval`: each model is loaded once, each run has a folder of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropepatch.cli._shared import say
from ropepatch.errors import UsageError

if TYPE_CHECKING:
    from ropepatch.evaluation.compare import Comparison
    from ropepatch.evaluation.variants import Variant


def model_folders(models: Sequence[str]) -> dict[str, str]:
    """A folder name for each model: the last part of a path, a hub id or demo name with dashes.

    Raises:
        UsageError: two of them are the same.
    """
    names: dict[str, str] = {}
    for model in models:
        path = Path(model).expanduser()
        name = path.resolve().name if path.is_dir() else model
        names[model] = re.sub(r"[^A-Za-z0-9._+=-]+", "-", name).strip("-.") or "model"
    if len(names) < len(models) or len(set(names.values())) < len(names):
        raise UsageError(
            "two models would share a folder", given=list(models), hint="run them into output folders of their own"
        )
    return names


def run_matrix(
    suite: str,
    models: Sequence[str],
    variants: Sequence[Variant],
    *,
    grid: dict[str, Any],
    dtype: str,
    output: Path,
    budget: float | None,
) -> tuple[list[dict[str, Any]], Comparison | None]:
    """Run every variant of every model.

    Returns:
        An entry for each run, with `name`, `model`, `output` and the summary, or `refused`: why it was not run. And
        the comparison of them all, if there is one.
    """
    from ropepatch.evaluation.budget import Budget
    from ropepatch.evaluation.matrix import evaluate_matrix, write_comparison
    from ropepatch.loading import load_model, model_source

    names = model_folders(models)
    # A model that is missing is found before hours of work on another.
    for model in models:
        model_source(model)
    time = None if budget is None else Budget(budget)
    entries: list[dict[str, Any]] = []
    folders: list[Path] = []
    comparison = None
    for number, model in enumerate(models):
        if number:
            say(model)
        minutes = None if time is None else max(time.left, 1.0) / 60 / (len(models) - number)
        parent = output if len(models) == 1 else output / names[model]
        subject, tokenizer = load_model(model, dtype=dtype)
        found = evaluate_matrix(
            subject, tokenizer, suite, variants, **grid, output=parent, model_name=model, budget=minutes
        )
        for variant in variants:
            entry: dict[str, Any] = {"name": variant.name, "model": model}
            if variant.name in found.refused:
                entry["refused"] = str(found.refused[variant.name])
            else:
                entry |= {"output": str(found.folders[variant.name]), **found.results[variant.name].summary}
            entries.append(entry)
        folders += found.folders.values()
        comparison = found.comparison
    if len(models) > 1 and is_first():
        comparison = write_comparison(folders, output)
    return entries, comparison


def is_first() -> bool:
    """Whether this is the process that talks, of those that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"

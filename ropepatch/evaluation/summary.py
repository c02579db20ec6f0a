"""From trials to a summary: a cell for each length and depth, a row for each length, and how far the model reaches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ropepatch.evaluation.scoring import (
    RULER_THRESHOLD,
    SELF_RELATIVE_SHARE,
    effective_length,
    self_relative_length,
    wilson_interval,
)

Row = Mapping[str, Any]


def summarise(rows: list[dict[str, Any]], configuration: dict[str, Any], *, title: str | None = None) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        rows: finished trials, each with `length` (tokens), `depth` (0..1), `correct` (0..1) and, where the task has
            them, `forced` (0..1) and `logprob` (summed over the answer tokens, nats).
        configuration: what was asked; names the patch and the trained length.
        title: what to call the run; default by its patch.

    Returns:
        Plain data: `task`, `title`, `trained_length` (tokens or None), `trials`, `cells` and `by_length` (each entry
        with `n`, `accuracy`, `ci_low`, `ci_high`: a 95 % Wilson interval), `effective_length` and
        `effective_length_relative` (tokens, or None when even the shortest length fails) with their thresholds.
    """
    cells = [
        {"length": length, "depth": depth, **_scores(group)}
        for (length, depth), group in _grouped(rows, lambda row: (row["length"], row["depth"]))
    ]
    by_length = [{"length": length, **_scores(group)} for length, group in _grouped(rows, lambda row: row["length"])]
    return {
        "task": configuration.get("task"),
        "title": run_title(configuration) if title is None else title,
        "trained_length": trained_length(configuration),
        "trials": len(rows),
        "cells": cells,
        "by_length": by_length,
        "effective_length": effective_length(by_length),
        "effective_length_threshold": RULER_THRESHOLD,
        "effective_length_relative": self_relative_length(by_length),
        "effective_length_relative_share": SELF_RELATIVE_SHARE,
    }


def summarise_tasks(
    rows: list[dict[str, Any]], configuration: dict[str, Any], tasks: Sequence[str], *, title: str | None = None
) -> dict[str, Any]:
    """The content of `summary.json` for a run of several tasks.

    Args:
        rows, configuration, title: as for `summarise`; each row has its `task`, and no depth.
        tasks: their names, in the order of the tables.

    Returns:
        As `summarise`, but `by_length` is the mean over the tasks that have a trial at this length (`tasks` says how
        many), each counting the same; its interval is Wilson's for that mean and all trials of the length, which is
        wider than it had to be, since it knows nothing of tasks and parts of a point. Also `by_task` (one entry for
        each task and length; `cells` are the same, with depth None) and, over the lengths, `average`, `average_inc`
        and `average_dec`: the mean of `by_length`, and RULER's wAvg (inc) and wAvg (dec), whose weights rise or fall
        linearly from the shortest length to the longest, by rank.
    """
    order = {task: number for number, task in enumerate(tasks)}
    groups = _grouped(rows, lambda row: (order[row["task"]], row["length"]))
    by_task = [{"task": group[0]["task"], "length": group[0]["length"], **_scores(group)} for _, group in groups]
    by_length = []
    for length, group in _grouped(rows, lambda row: row["length"]):
        parts = [entry for entry in by_task if entry["length"] == length]
        scores = _scores(group)
        accuracy = sum(part["accuracy"] for part in parts) / len(parts)
        low, high = wilson_interval(min(accuracy, 1.0) * len(group), len(group))
        means = {"accuracy": accuracy, "ci_low": low, "ci_high": high}
        by_length.append({"length": length, "tasks": len(parts), **scores, **means})
    accuracies = [entry["accuracy"] for entry in by_length]
    rising = range(1, len(accuracies) + 1)
    return {
        **summarise(rows, configuration, title=title),
        "cells": [{"length": entry["length"], "depth": None, **entry} for entry in by_task],
        "by_length": by_length,
        "by_task": by_task,
        "average": weighted_average(accuracies, [1] * len(accuracies)),
        "average_inc": weighted_average(accuracies, rising),
        "average_dec": weighted_average(accuracies, rising[::-1]),
        "effective_length": effective_length(by_length),
        "effective_length_relative": self_relative_length(by_length),
    }


def weighted_average(values: Sequence[float], weights: Sequence[float]) -> float:
    """The mean of the values, each counting by its weight."""
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def run_title(configuration: Mapping[str, Any]) -> str:
    """What a run is called in tables and figures: "unpatched", or its method with the options that are not default.

    Of a served model nobody knows how it was loaded: "served".
    """
    patch = configuration.get("patch")
    if not patch:
        return "served" if configuration.get("endpoint") else "unpatched"
    title = _named(patch["method"], patch.get("options", {}))
    base = dict(patch.get("base") or {})
    return f"{title} over {_named(base.pop('method'), base)}" if base else title


def _named(method: str, options: Mapping[str, Any]) -> str:
    """A method with its options that are not default."""
    import ropepatch

    known = next((info for info in ropepatch.methods() if info.name == method), None)
    defaults = {option["name"]: option["default"] for option in known.options} if known else {}
    said = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in options.items()
        if value is not None and (name not in defaults or defaults[name] != value)
    )
    return f"{method} ({said})" if said else method


def trained_length(configuration: Mapping[str, Any]) -> int | None:
    """The trained length in tokens, where the run recorded it."""
    patch = configuration.get("patch") or {}
    length = configuration.get("trained_length") or patch.get("original_length")
    return None if length is None else int(length)


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[tuple[Any, list[Row]]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return sorted(groups.items())


def _scores(rows: list[Row]) -> dict[str, Any]:
    scores = _score([row["correct"] for row in rows])
    forced = [row["forced"] for row in rows if row.get("forced") is not None]
    if forced:
        scores |= {f"forced_{name}": value for name, value in _score(forced).items() if name != "n"}
    logprobs = [row["logprob"] for row in rows if row.get("logprob") is not None]
    if logprobs:
        scores["mean_logprob"] = sum(logprobs) / len(logprobs)
    return scores


def _score(values: list[float]) -> dict[str, Any]:
    total, n = float(sum(values)), len(values)
    low, high = wilson_interval(total, n)
    return {"n": n, "accuracy": total / n, "ci_low": low, "ci_high": high}

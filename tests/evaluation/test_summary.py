"""The summary against counts made by hand and scipy's Wilson interval."""

from __future__ import annotations

import json
from typing import Any

import pytest
from example_runs import YARN, configuration, trials
from hypothesis import given
from hypothesis import strategies as st

from ropepatch.evaluation.summary import run_title, summarise


def test_cells_and_lengths_count_what_they_hold() -> None:
    rows = trials(lambda length, depth, trial: float(length < 128 or (depth == 0.5 and trial == 0)))
    summary = summarise(rows, configuration())
    assert [(c["length"], c["depth"], c["n"], c["accuracy"]) for c in summary["cells"]] == [
        *((length, depth, 2, 1.0) for length in (32, 64) for depth in (0.0, 0.5, 1.0)),
        (128, 0.0, 2, 0.0),
        (128, 0.5, 2, 0.5),
        (128, 1.0, 2, 0.0),
    ]
    assert [(r["length"], r["n"], r["accuracy"]) for r in summary["by_length"]] == [
        (32, 6, 1.0),
        (64, 6, 1.0),
        (128, 6, pytest.approx(1 / 6)),
    ]
    assert (summary["task"], summary["title"], summary["trained_length"]) == ("passkey", "unpatched", 64)
    assert (summary["trials"], summary["effective_length"], summary["effective_length_relative"]) == (18, 64, 64)
    assert [r["mean_logprob"] for r in summary["by_length"]] == [-2.0, -4.0, -8.0]
    assert all(r["forced_accuracy"] == 1.0 for r in summary["cells"])
    json.dumps(summary, allow_nan=False)


@given(scores=st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60))
def test_intervals_are_wilsons(scores: list[float]) -> None:
    stats = pytest.importorskip("scipy.stats")
    rows = trials(lambda length, depth, trial: scores[trial], lengths=(32,), depths=(0.5,), n=len(scores))
    (cell,) = summarise(rows, configuration())["cells"]
    oracle = stats.binomtest(int(sum(scores)), len(scores)).proportion_ci(method="wilson")
    assert (cell["ci_low"], cell["ci_high"]) == pytest.approx((oracle.low, oracle.high), abs=1e-9)


def test_order_of_trials_does_not_matter() -> None:
    rows = trials(lambda length, depth, trial: float(trial))
    assert summarise(rows[::-1], configuration()) == summarise(rows, configuration())


def test_a_model_that_fails_everywhere_reaches_nothing() -> None:
    summary = summarise(trials(lambda *_: 0.0), configuration())
    assert summary["effective_length"] is None
    assert summary["effective_length_relative"] is None


def test_a_task_without_forced_scores_has_none() -> None:
    rows = [
        {name: value for name, value in row.items() if name not in ("forced", "logprob")}
        for row in trials(lambda *_: 0.5)
    ]
    (row, *_) = summarise(rows, configuration())["by_length"]
    assert set(row) == {"length", "n", "accuracy", "ci_low", "ci_high"}
    assert row["accuracy"] == 0.5


@pytest.mark.parametrize(
    ("patch", "title"),
    [(None, "unpatched"), (YARN, "yarn (factor 2)"), ({"method": "nope", "options": {}}, "nope")],
)
def test_a_run_is_called_by_its_patch(patch: Any, title: str) -> None:
    assert run_title(configuration(patch=patch)) == title


def test_the_trained_length_falls_back_to_the_patch_record() -> None:
    rows = trials(lambda *_: 1.0)
    assert summarise(rows, configuration(trained_length=None, patch=YARN))["trained_length"] == 64
    assert summarise(rows, configuration(trained_length=None))["trained_length"] is None


def test_titles_name_what_lies_below_and_what_nobody_knows() -> None:
    patch = {"method": "rerope", "options": {"window": None}, "base": {"method": "yarn", "factor": 2}}
    assert run_title(configuration(patch=patch)) == "rerope over yarn (factor 2)"
    assert run_title(configuration(patch=None, endpoint={"url": "http://x"})) == "served"

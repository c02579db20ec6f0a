"""Runs side by side, against scipy and counts made by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from example_runs import YARN, make_run, trials
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ropepatch.errors import RecordError, UsageError
from ropepatch.evaluation.compare import compare, mcnemar_exact


@given(gained=st.integers(0, 300), lost=st.integers(0, 300))
def test_mcnemar_is_a_two_sided_binomial_test(gained: int, lost: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    oracle = 1.0 if gained + lost == 0 else stats.binomtest(gained, gained + lost, 0.5).pvalue
    assert mcnemar_exact(gained, lost) == pytest.approx(oracle, rel=1e-9)
    assert mcnemar_exact(gained, lost) == mcnemar_exact(lost, gained)


def test_rows_differences_and_counts(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", trials(lambda length, depth, trial: float(length < 128 or trial == 0)))
    other = make_run(
        tmp_path / "other", trials(lambda length, depth, trial: float(length > 32 or depth > 0)), patch=YARN
    )
    found = compare([base, other])
    assert [(row.run, row.length, row.n, row.accuracy) for row in found.rows] == [
        ("base", 32, 6, 1.0),
        ("other", 32, 6, pytest.approx(4 / 6)),
        ("base", 64, 6, 1.0),
        ("other", 64, 6, 1.0),
        ("base", 128, 6, 0.5),
        ("other", 128, 6, 1.0),
    ]
    assert all(row.difference is None for row in found.rows[::2])
    assert [(row.shared, row.difference, row.gained, row.lost, row.p_value) for row in found.rows[1::2]] == [
        (6, pytest.approx(-2 / 6), 0, 2, 0.5),
        (6, 0.0, 0, 0, 1.0),
        (6, pytest.approx(0.5), 3, 0, 0.25),
    ]
    assert [run.title for run in found.runs] == ["unpatched", "yarn (factor 2)"]


def test_differences_use_shared_trials_only(tmp_path: Path) -> None:
    base = make_run(tmp_path / "a", trials(lambda *_: 0.0, lengths=(32, 64), n=2))
    other = make_run(tmp_path / "b", trials(lambda _, __, trial: float(trial >= 2), lengths=(64, 128), n=4))
    rows = {(row.run, row.length): row for row in compare([base, other]).rows}
    assert set(rows) == {("a", 32), ("a", 64), ("b", 64), ("b", 128)}
    assert (rows["b", 64].accuracy, rows["b", 64].shared, rows["b", 64].difference) == (0.5, 6, 0.0)
    assert "(6 shared)" in compare([base, other]).to_markdown()
    assert (rows["b", 128].shared, rows["b", 128].difference) == (0, None)


def test_the_same_in_json_markdown_and_the_terminal(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", trials(lambda length, *_: float(length < 128)))
    other = make_run(tmp_path / "other", trials(lambda *_: 1.0), patch=YARN)
    found = compare([base, other])
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [run["effective_length"] for run in document["runs"]] == [64, 128]
    assert document["rows"][-1]["difference"] == 1.0
    lines = found.to_markdown().splitlines()
    assert lines[0] == "| length | base: unpatched | other: yarn (factor 2) |"
    assert len({line.count("|") for line in lines}) == 1
    assert "1.00  n=6<br>[0.61, 1.00]<br>+1.00 p=0.031" in lines[4]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    assert "[0.00, 0.39]" in text
    assert "+1.00 p=0.031" in text


def test_brackets_in_names_are_shown_as_they_are(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, trials(lambda *_: 1.0)) for name in ("[red]a", "b|c")]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(compare(runs).table())
    assert "[red]a" in console.export_text()
    assert "b\\|c" in compare(runs).to_markdown()


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "run", trials(lambda *_: 1.0)) for name in ("a", "b")]
    assert [run.name for run in compare(runs).runs] == ["a/run", "b/run"]
    with pytest.raises(UsageError, match="named twice"):
        compare([runs[0], runs[0]])


def test_what_cannot_be_compared_is_refused_with_the_reason(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", trials(lambda *_: 1.0))
    with pytest.raises(UsageError, match="at least two"):
        compare([base])
    lengths = make_run(tmp_path / "lengths", trials(lambda *_: 1.0, lengths=(48,)))
    with pytest.raises(UsageError, match="share no prompt length"):
        compare([base, lengths])
    questions = make_run(tmp_path / "questions", trials(lambda *_: 1.0, answer="11111", seed=8))
    with pytest.raises(UsageError, match=r"different questions: at length 32, depth 0, trial 0 .* \(seeds 7 and 8\)"):
        compare([base, questions])


def test_unreadable_folders_are_named(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", trials(lambda *_: 1.0))
    with pytest.raises(RecordError, match="no such folder"):
        compare([base, tmp_path / "missing"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match=r"run\.json cannot be read"):
        compare([base, tmp_path / "empty"])
    started = make_run(tmp_path / "started", [])
    with pytest.raises(RecordError, match="no finished trial"):
        compare([base, started])
    corrupt = make_run(tmp_path / "corrupt", trials(lambda *_: 1.0))
    with (corrupt / "results.jsonl").open("a") as file:
        file.write("{oops\n")
    with pytest.raises(RecordError, match=r"results\.jsonl, line 19, is corrupt"):
        compare([base, corrupt])


def test_a_run_that_is_not_finished_can_be_compared(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", trials(lambda *_: 1.0))
    part = make_run(tmp_path / "part", trials(lambda *_: 1.0)[:5])
    with (part / "results.jsonl").open("a") as file:
        file.write('{"length": 12')
    assert [row.n for row in compare([base, part]).rows if row.run == "part"] == [5]

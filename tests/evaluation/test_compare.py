"""Runs side by side, against scipy and counts made by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from example_runs import YARN, make_loss_run, make_run, make_tasks_run, trials
from rich.console import Console

from ropepatch.errors import OptionError, RecordError, UsageError
from ropepatch.evaluation.compare import compare
from ropepatch.evaluation.comparison import Part
from ropepatch.evaluation.statistics import newcombe_interval


def test_rows_differences_and_counts(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", trials(lambda length, depth, trial: float(length < 128 or trial == 0)))
    other = make_run(
        tmp_path / "other", trials(lambda length, depth, trial: float(length > 32 or depth > 0)), patch=YARN
    )
    found = compare([base, other])
    assert [(row.run, row.length, row.n, row.score) for row in found.rows] == [
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
    # Holm over the three differences of the table.
    assert [row.p_adjusted for row in found.rows[1::2]] == [1.0, 1.0, 0.75]
    worst = found.rows[1]
    assert (worst.difference_low, worst.difference_high) == newcombe_interval(4, 0, 2, 0)
    assert not any(row.real for row in found.rows)


def test_differences_use_shared_trials_only(tmp_path: Path) -> None:
    base = make_run(tmp_path / "a", trials(lambda *_: 0.0, lengths=(32, 64), n=2))
    other = make_run(tmp_path / "b", trials(lambda _, __, trial: float(trial >= 2), lengths=(64, 128), n=4))
    rows = {(row.run, row.length): row for row in compare([base, other]).rows}
    assert set(rows) == {("a", 32), ("a", 64), ("b", 64), ("b", 128)}
    assert (rows["b", 64].score, rows["b", 64].shared, rows["b", 64].difference) == (0.5, 6, 0.0)
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
    assert [line.split(" | ")[1:] for line in lines[-2:]] == [["64", "128 |"]] * 2
    assert lines[0] == "| length | base: unpatched | other: yarn (factor 2) |"
    assert len({line.count("|") for line in lines}) == 1
    assert "1.00 [0.61, 1.00] n=6<br>+1.00 [+0.45, +1.00] p=0.094" in lines[4]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    assert "[0.00, 0.39]" in text
    assert "+1.00 [+0.45, +1.00] p=0.094" in text


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


def test_scores_in_parts_are_bootstrapped(tmp_path: Path) -> None:
    base = make_run(tmp_path / "base", trials(lambda *_: 0.5, lengths=(32,), n=10))
    other = make_run(tmp_path / "other", trials(lambda _, depth, trial: 0.5 + trial / 20, lengths=(32,), n=10))
    found = compare([base, other])
    row = found.rows[1]
    assert row.difference == pytest.approx(0.225)
    assert 0.15 < row.difference_low < 0.225 < row.difference_high < 0.3
    assert (row.gained, row.lost) == (27, 0)
    assert row.p_value < 0.001
    assert "bootstrap" in found.explanation()


def test_several_tasks_together_and_one_by_one(tmp_path: Path) -> None:
    base = make_tasks_run(tmp_path / "base", lambda task, length, trial: float(task == "vt" and length == 64), n=8)
    other = make_tasks_run(tmp_path / "other", lambda task, length, trial: float(task != "fwe"), n=8)
    found = compare([base, other])
    assert found.parts == [Part(None, 64), Part(None, 128)]
    assert found.task_parts == [Part(task, length) for task in ("niah_single_1", "vt", "fwe") for length in (64, 128)]
    together = {(row.run, row.length): row for row in found.rows if row.part.task is None}
    assert together["other", 128].score == pytest.approx(2 / 3)
    assert together["other", 128].difference == pytest.approx(2 / 3)
    single = {(row.run, row.part): row for row in found.rows if row.part.task is not None}
    assert single["other", Part("niah_single_1", 64)].difference == 1.0
    assert single["other", Part("fwe", 64)].p_value == 1.0
    # Two tables, each adjusted for its own tests: 8 wins of 8 in three of six.
    assert single["other", Part("vt", 128)].p_adjusted == pytest.approx(6 * 2 / 2**8)
    assert together["other", 64].p_adjusted == pytest.approx(2 / 2**8)
    markdown = found.to_markdown()
    assert "| niah_single_1 | 64 | 0.00 [0.00, 0.32] | 1.00 [0.68, 1.00]* |" in markdown
    assert "| wAvg (inc) | 0.11 | 0.67 |" in markdown


def test_tasks_count_alike_where_a_run_has_more_trials_of_one(tmp_path: Path) -> None:
    base = make_tasks_run(tmp_path / "base", lambda *_: 0.0)
    part = make_run(
        tmp_path / "part",
        [
            *trials(lambda *_: 1.0, lengths=(64,), depths=(None,), n=4, task="vt"),
            *trials(lambda *_: 0.0, lengths=(64,), depths=(None,), n=1, task="fwe"),
        ],
        task="ruler",
    )
    row = next(row for row in compare([base, part]).rows if row.run == "part" and row.part == Part(None, 64))
    assert (row.score, row.difference) == (pytest.approx(0.5), pytest.approx(0.5))


def test_losses_are_compared_document_by_document(tmp_path: Path) -> None:
    base = make_loss_run(tmp_path / "base", [[4.0, 3.0, 3.0, 3.0], [3.0, 2.0, 2.0, 2.0], [3.5, 2.5]])
    other = make_loss_run(tmp_path / "other", [[4.0, 2.5, 2.0, 2.0], [3.0, 1.5, 1.2, 1.0], [3.4, 2.5]])
    found = compare([base, other])
    assert [str(part) for part in found.parts] == ["all", "0–63", "64–127", "128–255"]
    rows = {(row.run, str(row.part)): row for row in found.rows}
    whole = rows["other", "all"]
    assert rows["base", "all"].score == pytest.approx((13 + 9 + 6) / 10)
    assert whole.difference == pytest.approx((10.5 + 6.7 + 5.9 - 28) / 10)
    assert whole.difference_low < whole.difference < whole.difference_high
    assert (whole.shared, whole.gained, whole.lost) == (3, 3, 0)
    assert whole.p_value == pytest.approx(2 / 2**3)
    assert rows["other", "128–255"].n == 2
    assert rows["base", "128–255"].score == pytest.approx(2.5)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["measure"] == "loss"
    assert document["rows"][0]["perplexity"] == pytest.approx(found.runs[0].summary["perplexity"])
    assert "difference to base" not in found.to_markdown()
    assert "16.44" in found.to_markdown()
    assert [run.name for run in found.sorted_by("perplexity").runs] == ["other", "base"]
    with pytest.raises(OptionError, match="perplexity"):
        found.sorted_by("effective")


def test_a_single_document_has_no_interval(tmp_path: Path) -> None:
    runs = [make_loss_run(tmp_path / name, [[loss, loss]]) for name, loss in (("a", 3.0), ("b", 2.0))]
    row = compare(runs).rows[1]
    assert (row.ci_low, row.difference, row.difference_low, row.p_value) == (None, -1.0, None, 1.0)
    json.dumps(compare(runs).to_dict(), allow_nan=False)


def test_losses_of_other_texts_are_refused(tmp_path: Path) -> None:
    base = make_loss_run(tmp_path / "a", [[3.0]])
    moved = make_loss_run(tmp_path / "moved", [[3.0]], text=[{"path": "elsewhere.txt", "sha256": "0" * 64}])
    assert compare([base, moved]).rows[1].difference == 0
    text = make_loss_run(tmp_path / "b", [[3.0]], text=[{"path": "a.txt", "sha256": "1" * 64}])
    with pytest.raises(UsageError, match="different texts"):
        compare([base, text])
    longer = make_loss_run(tmp_path / "c", [[3.0, 2.0]])
    with pytest.raises(UsageError, match="share no document"):
        compare([base, longer])
    with pytest.raises(UsageError, match=r"different tasks \(perplexity and passkey\)"):
        compare([base, make_run(tmp_path / "d", trials(lambda *_: 1.0))])


def many(tmp_path: Path, runs: int = 6) -> list[Path]:
    return [
        make_run(tmp_path / f"run{k}", trials(lambda length, _, trial, k=k: float(length <= 32 * k + trial)))
        for k in range(runs)
    ]


def test_many_runs_stand_below_each_other(tmp_path: Path) -> None:
    lines = compare(many(tmp_path)).to_markdown().splitlines()
    assert lines[0] == "| run | 32 | 64 | 128 | effective | self-relative |"
    assert lines[2].startswith("| run0: unpatched (base) | 0.00 [0.00, 0.39] |")
    assert lines[4].endswith("| 64 | 64 |")
    # Then the differences, of all but the base.
    assert lines[9] == "| difference to run0 | 32 | 64 | 128 |"
    assert [line.split(":")[0] for line in lines[11:]] == [f"| run{k}" for k in range(1, 6)]


def test_differences_of_many_runs_are_those_of_two(tmp_path: Path) -> None:
    losses = [[[3.0, 2.0], [4.0, 3.0 + k / 10]] for k in range(5)]
    runs = [make_loss_run(tmp_path / f"run{k}", loss) for k, loss in enumerate(losses)]
    lines = compare(runs).to_markdown().splitlines()
    cells = next(line for line in reversed(lines) if line.startswith("| run4")).split(" | ")
    of_two = compare([runs[0], runs[4]]).to_markdown()
    assert cells[1].startswith("+0.100 [")
    assert all(cell.strip(" |") in of_two for cell in cells[1:])


def test_stars_mark_what_is_left_after_holm(tmp_path: Path) -> None:
    base = make_run(tmp_path / "a", trials(lambda *_: 0.0, n=4))
    runs = [make_run(tmp_path / f"b{k}", trials(lambda *_, k=k: float(k == 0), n=4)) for k in range(5)]
    found = compare([base, *runs])
    marked = {row.run for row in found.rows if row.real}
    assert marked == {"b0"}
    line = next(line for line in found.to_markdown().splitlines() if line.startswith("| b0"))
    assert line.count("*") == 3


def test_runs_can_be_sorted_and_the_base_stays(tmp_path: Path) -> None:
    found = compare(many(tmp_path))
    assert [run.name for run in found.sorted_by("64").runs] == ["run2", "run3", "run4", "run5", "run0", "run1"]
    assert [run.name for run in found.sorted_by("effective").runs][:2] == ["run4", "run5"]
    shuffled = compare([found.runs[k].path for k in (3, 0, 5, 1, 2, 4)])
    by_name = shuffled.sorted_by("name")
    assert [run.name for run in by_name.runs] == [f"run{k}" for k in range(6)]
    assert by_name.base == "run3"
    assert by_name.rows == shuffled.rows
    assert "run3: unpatched (base)" in by_name.to_markdown()
    with pytest.raises(OptionError, match="Did you mean 'effective'"):
        found.sorted_by("efective")
    with pytest.raises(OptionError, match="name, effective, 32, 64, 128"):
        found.sorted_by("96")


def test_other_settings_that_differ_are_said(tmp_path: Path) -> None:
    base = make_run(tmp_path / "a", trials(lambda *_: 1.0), dtype="float32")
    other = make_run(tmp_path / "b", trials(lambda *_: 1.0), dtype="bfloat16", trials=3, patch=YARN)
    found = compare([base, other])
    assert found.differing() == {"dtype": ["float32", "bfloat16"]}
    assert "The runs also differ in: dtype." in found.explanation()

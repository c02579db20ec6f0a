"""Several suites in one table, against what `compare` says of each and counts made by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from example_runs import YARN, make_loss_run, make_run, make_tasks_run, trials
from rich.console import Console

from ropepatch.errors import OptionError, UsageError
from ropepatch.evaluation.compare import compare
from ropepatch.evaluation.model_card import overview_card
from ropepatch.evaluation.overview import Column, Overview, overview


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two settings under passkey (YaRN in two folders: other lengths and trials) and perplexity; RULER of one."""
    right = trials(lambda length, *_: float(length < 128))
    far = trials(lambda *_: 1.0, lengths=(128, 256), n=4)
    return {
        "base": make_run(tmp_path / "keys" / "base", right),
        "yarn": make_run(tmp_path / "keys" / "yarn", right, patch=YARN),
        "far": make_run(tmp_path / "far" / "yarn", far, patch=YARN, lengths=[128, 256], trials=4),
        "base-loss": make_loss_run(tmp_path / "loss" / "base", [[3.0, 2.5], [2.0, 2.5]]),
        "yarn-loss": make_loss_run(tmp_path / "loss" / "yarn", [[3.0, 1.5], [2.0, 1.5]], patch=YARN),
        "ruler": make_tasks_run(tmp_path / "ruler" / "base", lambda *_: 1.0),
    }


def column(found: Overview, heading: str) -> Column:
    return next(column for column in found.columns if column.heading == heading)


def test_a_row_for_each_setting_and_a_column_for_what_each_suite_measured(folders: dict[str, Path]) -> None:
    found = overview(list(folders.values()))
    assert found.settings == ["unpatched", "yarn (factor 2)"]
    assert found.base == "unpatched"
    assert [(column.comparison.suite, str(column.part)) for column in found.columns] == [
        *(("passkey", str(length)) for length in (32, 64, 128, 256)),
        *(("perplexity", words) for words in ("all", "0–63", "64–127")),
        *(("ruler", str(length)) for length in (64, 128)),
    ]
    losses = compare([folders["base-loss"], folders["yarn-loss"]])
    theirs = [(row.score, row.difference, row.difference_low, row.p_adjusted) for row in losses.rows]
    ours = [found.row(setting, column) for column in found.columns[4:7] for setting in ("unpatched", "yarn (factor 2)")]
    assert [(row.score, row.difference, row.difference_low, row.p_adjusted) for row in ours if row] == theirs
    assert found.row("yarn (factor 2)", found.columns[-1]) is None


def test_runs_that_differ_in_their_grid_alone_are_taken_together(folders: dict[str, Path]) -> None:
    found = overview(list(folders.values()))
    # 3 depths x 2 trials in one folder and 3 x 4 in the other, of which 6 are the same prompts: the first's count.
    row = found.row("yarn (factor 2)", column(found, "passkey 128 (n=6 to 12)"))
    assert row is not None
    assert (row.n, row.score, row.shared, row.difference) == (12, 0.5, 6, 0.0)
    other = overview([folders[name] for name in ("base", "far", "yarn", "ruler")])
    row = other.row("yarn (factor 2)", column(other, "passkey 128 (n=6 to 12)"))
    assert row is not None
    assert (row.n, row.score, row.difference) == (12, 1.0, 1.0)


def test_other_questions_are_columns_of_their_own(folders: dict[str, Path], tmp_path: Path) -> None:
    rows = trials(lambda *_: 1.0, lengths=(64,), answer="11111", seed=8)
    seeded = [make_run(tmp_path / "seed" / "yarn", rows, patch=YARN, seed=8)]
    found = overview([folders["base"], folders["yarn"], *seeded, folders["ruler"]])
    headings = [column.heading for column in found.columns if column.part.length == 64]
    assert headings == ["passkey 64 (n=6) #1", "passkey 64 (n=6) #2", "ruler 64 (n=12)"]
    row = found.row("yarn (factor 2)", column(found, headings[1]))
    assert row is not None
    assert row.score == 1.0
    assert headings[1] not in [column.heading for column in found.differing]
    assert "passkey 64 (n=6) #2" in found.explanation()


def test_the_base_may_be_any_setting(folders: dict[str, Path]) -> None:
    paths = list(folders.values())
    found = overview(paths, base="yarn (factor 2)")
    assert found.settings[0] == found.base == "yarn (factor 2)"
    row = found.row("unpatched", column(found, "perplexity 64–127 (n=2)"))
    assert row is not None
    assert row.difference == pytest.approx(1.0)
    assert overview(paths, base="keys/yarn").base == "yarn (factor 2)"
    assert {column.comparison.suite for column in found.differing} == {"passkey", "perplexity"}
    with pytest.raises(OptionError, match=r"No run is called so.*Did you mean 'unpatched'"):
        overview(paths, base="unpached")


def test_models_are_part_of_a_setting_where_there_are_several(folders: dict[str, Path], tmp_path: Path) -> None:
    tuned = make_run(tmp_path / "tuned", trials(lambda *_: 1.0), model="tuned")
    found = overview([folders["base"], tuned, folders["base-loss"]])
    assert found.settings == ["tiny: unpatched", "tuned: unpatched"]
    only = found.at([64])
    assert only.settings == found.settings
    assert only.row("tuned: unpatched", only.columns[0]) is not None


def test_lengths_choose_columns_and_leave_tests_as_they_are(folders: dict[str, Path]) -> None:
    found = overview(list(folders.values()))
    shown = found.at([64, 256])
    headings = ["passkey 64 (n=6)", "passkey 256 (n=12)", "perplexity 0–63 (n=2)", "ruler 64 (n=12)"]
    assert [column.heading for column in shown.columns] == headings
    for heading in headings:
        assert shown.row("yarn (factor 2)", column(shown, heading)) == found.row(
            "yarn (factor 2)", column(found, heading)
        )
    assert found.at([32]).settings == ["unpatched", "yarn (factor 2)"]
    assert overview([folders[name] for name in ("base", "far", "ruler")]).at([32]).settings == ["unpatched"]
    with pytest.raises(OptionError, match="No run measured this length"):
        found.at([96])
    one = compare([folders["base"], folders["yarn"]])
    assert {row.length for row in one.at([64]).rows} == {64}
    with pytest.raises(OptionError, match="No run measured this length"):
        one.at([256])


def test_orders(folders: dict[str, Path]) -> None:
    found = overview(list(folders.values()))
    better = ["yarn (factor 2)", "unpatched"]
    assert found.sorted_by("perplexity:128").settings == better
    assert found.sorted_by("passkey:256").settings == better
    assert found.sorted_by("perplexity:perplexity").settings == better
    assert found.sorted_by("name").settings == found.sorted_by("ruler:64").settings == better[::-1]
    assert found.sorted_by("passkey:256").base == "unpatched"
    for key in ("passkey", "paskey:64", "128"):
        with pytest.raises(OptionError, match="Unknown order of settings"):
            found.sorted_by(key)
    with pytest.raises(OptionError, match="Unknown order of runs"):
        found.sorted_by("passkey:96")


def test_the_same_in_json_markdown_and_the_terminal(folders: dict[str, Path]) -> None:
    found = overview(list(folders.values())).at([128, 256])
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert document["settings"] == ["unpatched", "yarn (factor 2)"]
    assert [(row["setting"], row["column"]) for row in document["rows"]][-2:] == [
        ("yarn (factor 2)", "perplexity 64–127 (n=2)"),
        ("unpatched", "ruler 128 (n=12)"),
    ]
    assert document["rows"][-2]["difference"] == pytest.approx(-1.0)
    scores, differences = found.to_markdown().split("\n\n")
    # exp(2.5), the same in both documents.
    assert "| unpatched (base) | 0.00 [0.00, 0.39] | – | 12.18 [12.18, 12.18] | 1.00 [0.76, 1.00] |" in scores
    assert differences.splitlines()[0] == (
        "| difference to unpatched | passkey 128 (n=6 to 12) | perplexity 64–127 (n=2) |"
    )
    assert "| yarn (factor 2) | +0.00 [-0.39, +0.39] | -1.000 [-1.000, -1.000] |" in differences
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    assert "12.18" in text
    assert "-1.000" in text
    assert "Without a difference to unpatched: passkey 256 (n=12), ruler 128 (n=12)." in found.explanation()


def test_a_model_card_of_several_suites(folders: dict[str, Path]) -> None:
    text = overview_card(overview(list(folders.values())))
    assert text.startswith("## Long-context evaluation\n\n| setting |")
    assert [line for line in text.splitlines() if line.startswith("###")] == [
        "### `passkey`",
        "### `perplexity`",
        "### `ruler`",
    ]
    # One for every folder, also for the two that are one row.
    assert text.count("```bash") == 6
    assert "--lengths 128,256 --trials 4" in text


def test_compare_refuses_several_suites_and_says_who_takes_them(folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"different tasks \(passkey and ruler\), which ropepatch\.overview takes"):
        compare([folders["base"], folders["ruler"]])
    with pytest.raises(UsageError, match="at least two"):
        overview([folders["base"]])

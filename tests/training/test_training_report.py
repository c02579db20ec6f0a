"""Where evaluations of a run are, which are wanted, and what the report says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_runs import recipe

from ropepatch.evaluation.folder import RunFolder
from ropepatch.training.recipe import Recipe
from ropepatch.training.report import folders, is_measured, wanted, write_report

HERE = Path("model")
TWICE = {
    "runs": [{"suite": "passkey", "settings": {"lengths": [64]}}, {"suite": "ruler"}, {"suite": "passkey"}],
}


def measure(path: Path, right: int, **patch: Any) -> None:
    """A finished passkey run with so many of four keys found."""
    configuration = {"task": "passkey", "model": "tiny", "seed": 0, "trained_length": 64, "patch": patch or None}
    with RunFolder.open(path, configuration) as folder:
        for trial in range(4):
            output = str(trial) * 5 if trial < right else "99999"
            row = {"task": "passkey", "length": 64, "depth": 0.5, "trial": trial, "seed": 0, "answer": str(trial) * 5}
            folder.append({**row, "output": output, "correct": int(trial < right), "elapsed_s": 0.1})
        folder.finalize()


def record(**changes: Any) -> dict[str, Any]:
    done = {"steps": 2, "stopped_early": False}
    return {"trained": done, "versions": {"torch": "1"}, "launch": {"processes": 1}, **changes}


def write_log(output: Path) -> None:
    line = {"loss": 3.0, "learning_rate": 0.1, "tokens": 100, "seconds": 2.0, "peak_memory_mib": 1234}
    lines = [{**line, "step": 1}, {**line, "step": 2, "loss": 1.5, "tokens": 200, "seconds": 4.0}]
    (output / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))


@pytest.fixture
def asked() -> Recipe:
    return recipe(HERE, eval={"runs": [{"suite": "passkey"}]}, description="A <b>bold</b> recipe.")


def test_a_suite_that_runs_twice_gets_two_folders() -> None:
    places = folders(recipe(HERE, eval=TWICE), Path("out"), "after")
    assert [place.as_posix() for place in places] == [
        "out/eval/after/passkey",
        "out/eval/after/ruler",
        "out/eval/after/passkey-3",
    ]


def test_what_is_wanted() -> None:
    runs = {"runs": [{"suite": "passkey"}]}
    assert [wanted(recipe(HERE, eval=runs), stage) for stage in ("unpatched", "before", "after")] == [True] * 3
    assert not wanted(recipe(HERE, eval={**runs, "before": False}), "before")
    # Without a patch, the model as it was loaded is the one before training.
    assert not wanted(recipe(HERE, eval=runs, patch=None), "unpatched")
    assert not wanted(recipe(HERE), "after")


def test_what_is_finished(asked: Recipe, tmp_path: Path) -> None:
    assert not is_measured(asked, tmp_path, "after")
    measure(tmp_path / "eval" / "after" / "passkey", 4)
    assert is_measured(asked, tmp_path, "after")
    assert not is_measured(asked, tmp_path, "before")
    assert is_measured(recipe(HERE), tmp_path, "before")


def test_the_report_sets_stages_side_by_side(asked: Recipe, tmp_path: Path) -> None:
    write_log(tmp_path)
    measure(tmp_path / "eval" / "unpatched" / "passkey", 0)
    measure(tmp_path / "eval" / "before" / "passkey", 1, method="yarn", options={"factor": 4.0})
    measure(tmp_path / "eval" / "after" / "passkey", 4, method="yarn", options={"factor": 4.0})
    text = write_report(asked, tmp_path, record()).read_text()
    assert "3.0000 at step 1, 1.5000 at step 2" in text
    assert "4 s, 50 tokens a second" in text and "1,234 MiB" in text
    row = next(line for line in text.splitlines() if line.startswith("| 64 "))
    assert [cell.split()[0] for cell in row.strip("| ").split("|")[1:]] == ["0.00", "0.25", "1.00"]
    page = (tmp_path / "report.html").read_text()
    assert "A &lt;b&gt;bold&lt;/b&gt; recipe." in page
    assert "after/passkey" in page and "train.batch_size" in page
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_without_evaluations(tmp_path: Path) -> None:
    write_log(tmp_path)
    text = write_report(recipe(HERE), tmp_path, record(trained={"steps": 2, "stopped_early": True})).read_text()
    assert "stopped early" in text and "## " not in text

"""`ropepatch eval` end to end on a tiny model folder: results, resuming, and what bad input gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ropepatch.cli.app import app

GRID = ("--lengths", "180,220", "--depths", "0,0.5,1", "--trials", "2", "--dtype", "float32")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="ropepatch")


def evaluate(model: Path, output: Path, *more: object) -> Result:
    return run("eval", "passkey", "--model", model, *GRID, "--output", output, *more)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def comparable(folder: Path) -> list[dict[str, Any]]:
    found = [{name: value for name, value in row.items() if name != "elapsed_s"} for row in rows(folder)]
    return sorted(found, key=lambda row: (row["length"], row["depth"], row["trial"]))


@pytest.fixture(scope="module")
def finished(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    result = evaluate(tiny_model_folder, output, "--patch", "yarn", "--set", "factor=2")
    assert result.exit_code == 0, result.output
    return output


def test_a_run_leaves_the_promised_folder(finished: Path, tiny_model_folder: Path) -> None:
    assert {"run.json", "results.jsonl", "summary.json", "heatmap.png", "report.html"} <= {
        path.name for path in finished.iterdir()
    }
    found = rows(finished)
    assert sorted((row["length"], row["depth"], row["trial"]) for row in found) == [
        (length, depth, trial) for length in (180, 220) for depth in (0, 0.5, 1) for trial in (0, 1)
    ]
    promised = {"task", "length", "depth", "trial", "seed", "answer", "output", "correct", "elapsed_s"}
    assert all(promised <= set(row) for row in found)
    made = json.loads((finished / "run.json").read_text())
    assert (made["model"], made["patch"]["method"], made["seed"]) == (str(tiny_model_folder), "yarn", 0)
    assert made["configuration"]["dtype"] == "float32"
    summary = json.loads((finished / "summary.json").read_text())
    assert len(summary["cells"]) == 6
    assert [row["n"] for row in summary["by_length"]] == [6, 6]
    assert summary["trained_length"] == 256
    assert summary["title"] == "yarn (factor 2)"


def test_json_is_one_document_on_stdout(tiny_model_folder: Path, tmp_path: Path) -> None:
    result = evaluate(tiny_model_folder, tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["output"] == str(tmp_path / "run")
    assert document["cells"] == json.loads((tmp_path / "run" / "summary.json").read_text())["cells"]


def test_the_table_shows_every_length_with_its_interval(tiny_model_folder: Path, tmp_path: Path) -> None:
    result = evaluate(tiny_model_folder, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for row in summary["by_length"]:
        assert f"{row['ci_low']:.3f} - {row['ci_high']:.3f}" in result.stdout
    assert "unpatched" in result.stdout


def test_the_same_command_again_runs_nothing_twice(finished: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    before = (finished / "results.jsonl").read_bytes()
    assert evaluate(tiny_model_folder, finished, "--patch", "yarn", "--set", "factor=2").exit_code == 0
    assert (finished / "results.jsonl").read_bytes() == before


def test_a_hard_kill_loses_no_finished_trial_and_changes_no_result(tiny_model_folder: Path, tmp_path: Path) -> None:
    grid = ("--lengths", "220", "--depths", "0,0.2,0.4,0.6,0.8,1", "--trials", "12", "--dtype", "float32")
    command = ["eval", "passkey", "--model", str(tiny_model_folder), *grid]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    child = subprocess.Popen(
        [sys.executable, "-m", "ropepatch", *command, "--output", str(killed)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    results = killed / "results.jsonl"
    while child.poll() is None and not (results.exists() and results.read_bytes().count(b"\n") >= 5):
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    content = results.read_bytes()
    survived = content[: content.rfind(b"\n") + 1]
    assert 5 <= survived.count(b"\n") < 72, "the kill came too late to test anything"
    assert run(*command, "--output", killed).exit_code == 0
    assert results.read_bytes().startswith(survived)
    assert run(*command, "--output", whole).exit_code == 0
    ours, theirs = comparable(killed), comparable(whole)
    assert len(ours) == 72
    # Log-probabilities depend on how a prompt was cut into pieces, to rounding.
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.pop("logprob") == pytest.approx(other.pop("logprob"), abs=1e-3)
    assert ours == theirs


def test_a_torn_last_line_is_redone(finished: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = ("--patch", "yarn", "--set", "factor=2")
    assert evaluate(tiny_model_folder, output, *command).exit_code == 0
    os.truncate(output / "results.jsonl", (output / "results.jsonl").stat().st_size - 7)
    assert evaluate(tiny_model_folder, output, *command).exit_code == 0
    ours, theirs = comparable(output), comparable(finished)
    assert [row["output"] for row in ours] == [row["output"] for row in theirs]
    assert len(ours) == 12


BAD: dict[str, tuple[int, tuple[str, ...], str]] = {
    "unknown suite": (2, ("eval", "passky", "--model", "{model}", "--output", "{out}"), "passkey"),
    "unknown method": (2, ("--patch", "yarrn", "--set", "factor=2"), "did you mean 'yarn'"),
    "unknown option": (2, ("--patch", "yarn", "--set", "factr=2"), "factr"),
    "factor zero": (2, ("--patch", "yarn", "--set", "factor=0"), "factor"),
    "factor not finite": (2, ("--patch", "yarn", "--set", "factor=inf"), "factor"),
    "set without patch": (2, ("--set", "factor=2"), "--patch"),
    "set without value": (2, ("--patch", "yarn", "--set", "factor"), "factor"),
    "lengths are no numbers": (2, ("--lengths", "1k"), "--lengths"),
    "length too short": (2, ("--lengths", "10"), "too short"),
    "length zero": (2, ("--lengths", "0"), "lengths"),
    "depth outside": (2, ("--depths", "0,1.5"), "depths"),
    "depth not a number": (2, ("--depths", "nan"), "depths"),
    "no trials": (2, ("--trials", "0"), "trials"),
    "no digits": (2, ("--digits", "0"), "digits"),
    "unknown dtype": (2, ("--dtype", "int8"), "dtype"),
    "no chat template": (2, ("--chat-template",), "chat template"),
    "missing text": (2, ("--text", "{tmp}/none.txt"), "none.txt"),
    "missing model": (1, ("--model", "{tmp}/none"), "no such folder"),
    "unknown demo model": (2, ("--model", "demo:smolm2"), "demo:smollm2"),
    "not an option": (2, ("--nonsense",), "--nonsense"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_leaves_nothing(name: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    status, more, words = BAD[name]
    output = tmp_path / "run"
    command = ["eval", "passkey", "--model", str(tiny_model_folder), *GRID, "--output", str(output)]
    filled = [part.format(model=tiny_model_folder, out=output, tmp=tmp_path) for part in more]
    result = run(*(filled if filled[0] == "eval" else [*command, *filled]))
    assert result.exit_code == status
    assert words.lower() in result.stderr.lower()
    assert "Traceback" not in result.output
    if name != "not an option":
        assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert not output.exists()


def test_a_folder_of_another_configuration_is_refused_untouched(finished: Path, tiny_model_folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    result = evaluate(tiny_model_folder, finished, "--patch", "yarn", "--set", "factor=4")
    assert result.exit_code == 2
    assert "patch.options.factor is 2.0 there and 4.0 here" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_an_unwritable_output_is_one_clear_line(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = evaluate(tiny_model_folder, tmp_path / "file" / "run")
    assert result.exit_code == 1
    assert "annot write to" in result.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_corrupt_result_line_is_named_and_kept(finished: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    import shutil

    output = shutil.copytree(finished, tmp_path / "run")
    with (output / "results.jsonl").open("a") as file:
        file.write("{oops\n")
    content = (output / "results.jsonl").read_bytes()
    result = evaluate(tiny_model_folder, output, "--patch", "yarn", "--set", "factor=2")
    assert result.exit_code == 1
    assert "results.jsonl, line 13, is corrupt" in result.stderr
    assert (output / "results.jsonl").read_bytes() == content

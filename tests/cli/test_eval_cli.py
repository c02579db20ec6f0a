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

from ropepatch.cli.app import app, spread

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
    "no budget": (2, ("--budget", "0"), "number of minutes"),
    "matrix and patch": (2, ("--matrix", "untuned", "--patch", "yarn", "--set", "factor=2"), "choose one"),
    "matrix and set": (2, ("--matrix", "untuned", "--set", "factor=2"), "--set needs --patch"),
    "unknown matrix": (2, ("--matrix", "untund"), "did you mean 'untuned'"),
    "missing matrix": (2, ("--matrix", "{tmp}/none.yaml"), "none.yaml"),
    "same model twice": (2, ("--model", "{model}"), "share a folder"),
    "a second model that is missing": (1, ("--model", "{tmp}/none"), "no such folder"),
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


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("passkey --text a b c", "passkey --text a --text b --text c"),
        ("passkey --text a b --model m --text c d", "passkey --text a --text b --model m --text c --text d"),
        ("passkey --text a --text b", "passkey --text a --text b"),
        ("passkey --model m x --text a", "passkey --model m x --text a"),
        ("passkey --text a -m m b", "passkey --text a -m m b"),
        ("passkey --text", "passkey --text"),
        ("passkey --text --model m", "passkey --text --model m"),
        ("--text a passkey", "--text a passkey"),
        ("--help", "--help"),
        ("", ""),
    ],
)
def test_text_takes_several_values(given: str, wanted: str) -> None:
    assert spread(given.split(), "--text") == wanted.split()


def test_several_texts_reach_the_suite(tiny_model_folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("The grass is green. " * 200)
    texts = ("--text", tmp_path / "a.txt", tmp_path / "b.txt")
    result = evaluate(tiny_model_folder, tmp_path / "run", *texts)
    # The passkey suite takes one text: both arrived there.
    assert result.exit_code == 2
    assert "text" in result.stderr
    assert "a.txt" in result.stderr and "b.txt" in result.stderr
    assert evaluate(tiny_model_folder, tmp_path / "run", *texts[:2]).exit_code == 0


def test_a_budget_is_kept_and_the_run_goes_on(tiny_model_folder: Path, tmp_path: Path) -> None:
    result = evaluate(tiny_model_folder, tmp_path / "run", "--budget", "5", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["budget"] == {"minutes": 5, "trials_run": 12, "trials_left": 0}
    result = evaluate(tiny_model_folder, tmp_path / "none", "--budget", "1e-9")
    assert result.exit_code == 2
    assert "too short for a single trial" in result.stderr


MATRIX = """
- unpatched
- {method: yarn, options: {factor: 2}}
- {name: nowhere, method: dca, options: {layers: [9]}}
"""


@pytest.fixture(scope="module")
def matrix(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A matrix whose last variant is refused."""
    folder = tmp_path_factory.mktemp("matrix")
    (folder / "mine.yaml").write_text(MATRIX)
    result = evaluate(tiny_model_folder, folder / "out", "--matrix", folder / "mine.yaml", "--json")
    return folder, result


def test_a_matrix_is_one_document_and_names_what_was_refused(matrix: tuple[Path, Result]) -> None:
    folder, result = matrix
    assert result.exit_code == 1, result.output
    document = json.loads(result.stdout)
    assert document["output"] == str(folder / "out")
    assert [run["name"] for run in document["runs"]] == ["unpatched", "yarn-2", "nowhere"]
    for run in document["runs"][:2]:
        summary = json.loads((folder / "out" / run["name"] / "summary.json").read_text())
        assert {name: run[name] for name in summary} == summary
        assert run["output"] == str(folder / "out" / run["name"])
    assert "layers" in document["runs"][2]["refused"]
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.output
    assert {path.name for path in (folder / "out").iterdir()} == {
        "comparison.html", "comparison.md", "unpatched", "yarn-2"
    }  # fmt: skip


def test_a_matrix_and_single_commands_go_on_with_each_other(
    matrix: tuple[Path, Result], finished: Path, tiny_model_folder: Path
) -> None:
    output = matrix[0] / "out" / "yarn-2"
    assert comparable(output) == comparable(finished)
    before = (output / "results.jsonl").read_bytes()
    assert evaluate(tiny_model_folder, output, "--patch", "yarn", "--set", "factor=2").exit_code == 0
    assert (output / "results.jsonl").read_bytes() == before


def test_each_model_is_loaded_once(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from ropepatch import loading

    loaded: list[str] = []
    load = loading.load_model

    def count(name: str, **options: Any) -> Any:
        loaded.append(name)
        return load(name, **options)

    monkeypatch.setattr(loading, "load_model", count)
    models = [str(shutil.copytree(tiny_model_folder, tmp_path / name)) for name in ("one", "two")]
    (tmp_path / "mine.yaml").write_text("[unpatched, rerope]")
    result = run(
        *("eval", "passkey", "--model", models[0], "--model", models[1], *GRID, "--budget", "10"),
        *("--matrix", tmp_path / "mine.yaml", "--output", tmp_path / "out"),
    )
    assert result.exit_code == 0, result.output
    assert loaded == models
    names = {str(path.relative_to(tmp_path / "out").parent) for path in (tmp_path / "out").rglob("summary.json")}
    assert names == {"one/unpatched", "one/rerope", "two/unpatched", "two/rerope"}
    for folder in ("", "one", "two"):
        assert (tmp_path / "out" / folder / "comparison.html").is_file()
    assert "rerope" in result.stdout
    assert json.loads((tmp_path / "out/two/rerope/run.json").read_text())["model"] == models[1]


def test_several_models_under_one_patch(tiny_model_folder: Path, tmp_path: Path) -> None:
    import shutil

    other = shutil.copytree(tiny_model_folder, tmp_path / "other")
    result = evaluate(
        tiny_model_folder, tmp_path / "out", "--model", other, "--patch", "yarn", "--set", "factor=2", "--json"
    )
    assert result.exit_code == 0, result.output
    assert [(r["model"], r["name"]) for r in json.loads(result.stdout)["runs"]] == [
        (str(tiny_model_folder), "yarn-2"),
        (str(other), "yarn-2"),
    ]

"""`ropepatch lm-eval`: the harness on a tiny model folder, and what bad input gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from ropepatch.cli.app import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="ropepatch")


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness without its own 14,000 tasks, whose files take seconds to read."""
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'ropepatch[harness]'")
    from lm_eval.tasks import TaskManager

    class Few(TaskManager):
        def __init__(self, **more: Any) -> None:
            super().__init__(include_defaults=False, **more)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Few)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    questions = ["The pass key is 12345. What is the pass key?", "The grass is green. What is the grass?"]
    (folder / "data.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in questions))
    task = {
        "task": "small_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["12345", "green"],
        "doc_to_target": 0,
    }
    (folder / "small_choice.yaml").write_text(json.dumps(task))
    return folder


@pytest.mark.usefixtures("harness")
def test_results_are_written_and_printed(tiny_model_folder: Path, tasks: Path, tmp_path: Path) -> None:
    command = (
        *("lm-eval", "--model", tiny_model_folder, "--patch", "yarn", "--set", "factor=2", "--tasks", "small_choice"),
        *("--include-path", tasks, "--dtype", "float32", "--limit", 1, "--seed", 7, "--output", tmp_path / "run"),
    )
    result = run(*command, "--json", "--log-samples")
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert json.loads(result.stdout) == {"output": str(tmp_path / "run"), **written}
    assert 0 <= written["results"]["small_choice"]["acc,none"] <= 1
    assert written["n-samples"]["small_choice"]["effective"] == 1
    assert written["config"]["random_seed"] == 7
    ours = written["config"]["ropepatch"]
    assert ours["model"] == str(tiny_model_folder)
    assert (ours["patch"]["method"], ours["patch"]["options"]["factor"]) == ("yarn", 2)
    assert (ours["trained_length"], ours["max_length"]) == (256, 512)
    (line,) = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert json.loads(line)["task"] == "small_choice"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"results.json", "samples.jsonl"}

    again = run(*command)
    assert again.exit_code == 2
    assert "holds results.json already" in again.output
    table = run(*command[:-1], tmp_path / "other")
    assert table.exit_code == 0, table.output
    assert "|small_choice|" in table.stdout


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tasks", "small_choise"), "Did you mean 'small_choice'"),
        (("--tasks", "small_choice", "--max-length", "20"), "would be cut to 20"),
        (("--tasks", "small_choice", "--limit", "0"), "must be a positive number"),
        (("--tasks", "small_choice", "--apply-chat-template"), "no chat template"),
        (("--tasks", "small_choice", "--patch", "yarm"), "Did you mean 'yarn'"),
        (("--tasks", "small_choice", "--dtype", "int4"), "Unknown dtype"),
    ],
)
def test_refusals_write_no_results(
    arguments: tuple[str, ...], words: str, tiny_model_folder: Path, tasks: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    result = run("lm-eval", "--model", tiny_model_folder, "--include-path", tasks, "--output", output, *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
    assert not output.exists() or not list(output.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tasks", "a,,b"), "--tasks takes names separated by commas"),
        (("--tasks", "a", "--set", "factor=2"), "--set needs --patch"),
        (("--tasks", "a", "--metadata", "{"), "--metadata is not valid JSON"),
        (("--tasks", "a", "--metadata", "[1]"), "--metadata must be a JSON object"),
        (("--tasks", "a", "--batch-size", "0"), "--batch-size"),
    ],
)
def test_wrong_usage_is_seen_before_the_harness_is_needed(
    arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    result = run("lm-eval", "--model", "nowhere", "--output", tmp_path / "run", *arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert not (tmp_path / "run").exists()


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "ropepatch.evaluation.harness", raising=False)
    result = run("lm-eval", "--model", "nowhere", "--tasks", "a", "--output", tmp_path / "run")
    assert result.exit_code == 1
    assert "pip install 'ropepatch[harness]'" in result.output


@pytest.mark.slow
def test_rulers_tasks_make_their_data(tiny_model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'ropepatch[harness]'")
    pytest.importorskip("wonderwords", reason="needs wonderwords: pip install 'ropepatch[harness]'")
    result = run(
        *("lm-eval", "--model", tiny_model_folder, "--patch", "yarn", "--set", "factor=8", "--tasks", "niah_single_1"),
        *("--metadata", '{"max_seq_lengths": [1024]}', "--limit", 2, "--json", "--output", tmp_path / "run"),
    )
    assert result.exit_code == 0, result.output
    assert "1024,none" in json.loads(result.stdout)["results"]["niah_single_1"]

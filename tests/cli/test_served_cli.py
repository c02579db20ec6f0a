"""`ropepatch eval --endpoint`: a served model from the command line, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import serving
from typer.testing import CliRunner, Result

import ropepatch
from ropepatch.cli.app import app

GRID = ("--lengths", "180,220", "--depths", "0,1", "--trials", "2")
SECRET = "sk-very-secret-0123456789"


@pytest.fixture(scope="module")
def server(tiny_model_folder: Path) -> Iterator[serving.Server]:
    model, tokenizer = ropepatch.load_model(tiny_model_folder, dtype="float32")
    with serving.serving(model, tokenizer, key=SECRET) as server:
        yield server


@pytest.fixture(scope="module")
def tokenizer_folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer and nothing else."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for file in tiny_model_folder.glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="ropepatch")


def comparable(folder: Path) -> list[dict[str, Any]]:
    names = ("task", "length", "depth", "trial", "seed", "answer", "output", "correct", "key_start", "key_end")
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    found = [{name: row[name] for name in names} for row in rows]
    return sorted(found, key=lambda row: (row["length"], row["depth"], row["trial"]))


def test_a_served_model_gives_the_rows_of_a_loaded_one(
    server: serving.Server, tiny_model_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    asked = ("--endpoint", server.url, "--tokenizer", tokenizer_folder, "--concurrency", 2, "--original-length", 256)
    result = run("eval", "passkey", "--model", "tiny", *asked, *GRID, "--output", tmp_path / "served", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["trials"] == 8
    loaded = ("--model", tiny_model_folder, "--dtype", "float32")
    assert run("eval", "passkey", *loaded, *GRID, "--output", tmp_path / "loaded").exit_code == 0
    assert comparable(tmp_path / "served") == comparable(tmp_path / "loaded")
    made = json.loads((tmp_path / "served" / "run.json").read_text())
    assert made["configuration"]["endpoint"]["prompt"] == "ids"
    assert (made["model"], made["patch"], made["configuration"]["trained_length"]) == ("tiny", None, 256)
    assert all(SECRET.encode() not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    # A table for people, without the scores that a server does not give; and nothing is run twice.
    asked_before = len(server.prompts())
    again = run("eval", "passkey", "--model", "tiny", *asked, *GRID, "--output", tmp_path / "served")
    assert again.exit_code == 0, again.output
    assert "effective length" in again.stdout
    assert len(server.prompts()) == asked_before + 1
    assert run("compare", tmp_path / "served", tmp_path / "loaded").exit_code == 0


BAD: dict[str, tuple[int, tuple[str, ...], str]] = {
    "no tokenizer": (2, ("--endpoint", "{url}"), "--endpoint needs --tokenizer"),
    "no endpoint": (2, ("--tokenizer", "{folder}"), "--tokenizer needs --endpoint"),
    "concurrency without endpoint": (2, ("--concurrency", "2"), "--concurrency needs --endpoint"),
    "a patch": (2, ("{served}", "--patch", "yarn", "--set", "factor=2"), "--patch concerns"),
    "a matrix": (2, ("{served}", "--matrix", "untuned"), "--matrix concerns"),
    "a dtype": (2, ("{served}", "--dtype", "float32"), "--dtype concerns"),
    "two models": (2, ("{served}", "--model", "other"), "one --model"),
    "no URL": (2, ("--tokenizer", "{folder}", "--endpoint", "localhost:8080"), "base URL"),
    "unknown api": (2, ("{served}", "--api", "chatt"), "did you mean 'chat'"),
    "no chat template": (2, ("{served}", "--api", "chat"), "no chat template"),
    "no concurrency": (2, ("{served}", "--concurrency", "0"), "concurrency"),
    "no key": (2, ("{served}", "--api-key-env", "NO_SUCH_KEY"), "NO_SUCH_KEY"),
    "wrong key": (1, ("{served}", "--api-key-env", "WRONG_KEY"), "status 401"),
    "no such tokenizer": (1, ("--endpoint", "{url}", "--tokenizer", "{tmp}/none"), "none"),
    "no tokenizer there": (1, ("--endpoint", "{url}", "--tokenizer", "{tmp}"), "cannot load the tokenizer"),
    "nobody there": (1, ("--tokenizer", "{folder}", "--endpoint", "http://127.0.0.1:1/v1"), "cannot be reached"),
    "too short": (2, ("{served}", "--lengths", "10"), "too short"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    name: str,
    server: serving.Server,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WRONG_KEY", "sk-wrong")
    status, more, words = BAD[name]
    served = ("--endpoint", server.url, "--tokenizer", str(tokenizer_folder))
    filled = [
        given.format(url=server.url, folder=tokenizer_folder, tmp=tmp_path)
        for part in more
        for given in (served if part == "{served}" else (part,))
    ]
    output = tmp_path / "run"
    result = run("eval", "passkey", "--model", "tiny", *GRID, "--output", output, *filled)
    assert result.exit_code == status, result.output
    assert words.lower() in result.stderr.lower()
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""
    assert not output.exists()
    assert "sk-" not in result.stderr


def test_help_names_the_options() -> None:
    text = run("eval", "--help").stdout
    for flag in ("--endpoint", "--tokenizer", "--api", "--api-key-env", "--timeout", "--retries", "--concurrency"):
        assert flag in text

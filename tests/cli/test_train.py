"""`ropepatch train`: what it refuses before a model is loaded, a dry run, and a whole run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ropepatch.cli.app import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments], prog_name="ropepatch")


@pytest.fixture
def recipe(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROPEPATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"""
description: a try
model: {{name: {tiny_model_folder}}}
patch: {{method: yarn, options: {{factor: 2}}}}
lora: {{r: 2}}
data: {{length: 64, sources: [{{kind: files, path: stdlib}}]}}
train: {{max_steps: 2, batch_size: 2, precision: float32, learning_rate: 1e-3}}
eval:
  unpatched: false
  before: false
  runs: [{{suite: passkey, settings: {{lengths: [300], depths: [0.5], trials: 1, digits: 1}}}}]
"""
    )
    return path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("lora.rank=8", "train.max_steps=zero"), "2 problems"),
        (("train.max_steps",), "'train.max_steps' is no override"),
        (("patch.method=yarm",), "Did you mean 'yarn'"),
        (("train.micro_batch_size=4",), "train.batch_size=2 is no multiple of train.micro_batch_size=4"),
        (("model.name=/no/such/folder",), "no such folder"),
    ],
)
def test_what_is_refused_writes_nothing(recipe: Path, arguments: tuple[str, ...], said: str) -> None:
    result = run(str(recipe), *arguments, "--output", "out")
    assert result.exit_code in (1, 2), result.output
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("ropepatch: error: ")
    assert said in result.stderr
    assert not Path("out").exists() or not any(Path("out").rglob("*.safetensors"))


def test_what_this_machine_lacks_is_refused(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run(str(recipe), "train.loss=liger")
    assert result.exit_code == 1
    assert "needs CUDA: set train.loss=auto" in result.stderr


def test_a_dry_run_tells_what_the_machine_lacks_and_goes_on(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = run(str(recipe), "train.loss=liger", "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "not on this machine: train.loss=liger needs CUDA" in result.stderr
    assert result.stdout == f"{recipe}: valid as far as it could be checked here\n"
    assert not Path("runs").exists()


def test_a_run_from_the_command_line(recipe: Path) -> None:
    result = run(str(recipe), "train.max_steps=1", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["output"] == "runs/mine"
    assert document["steps"] == 1
    assert Path(document["model"], "adapter_config.json").is_file()
    assert Path(document["report"]).is_file()
    again = run(str(recipe), "train.max_steps=1")
    assert again.exit_code == 0
    assert "trained: runs/mine/adapter" in again.stdout
    other = run(str(recipe), "train.max_steps=1", "lora.r=4")
    assert other.exit_code == 2
    assert "lora.r" in other.stderr
    assert run(str(recipe), "train.max_steps=1", "--no-resume").exit_code == 2


@pytest.mark.slow
def test_the_module_is_the_verb(recipe: Path) -> None:
    command = [sys.executable, "-m", "ropepatch.training", str(recipe), "lora.rank=8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "lora.rank: there is no such setting" in done.stderr

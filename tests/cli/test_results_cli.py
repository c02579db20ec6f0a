"""`ropepatch compare` and `ropepatch plot` on finished folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ropepatch.cli.app import app
from ropepatch.evaluation.folder import RunFolder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="ropepatch")


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = []
    for name, reach in (("base", 64), ("longer", 128)):
        with RunFolder.open(
            tmp_path / name, {"task": "passkey", "seed": 0, "model": "tiny", "patch": None, "trained_length": 64}
        ) as folder:
            for length in (64, 128):
                for trial in range(4):
                    folder.append(
                        {"task": "passkey", "length": length, "depth": 0.5, "trial": trial, "seed": 0}
                        | {"answer": "12345", "output": "1", "correct": float(length <= reach)}
                    )
        made.append(tmp_path / name)
    return made


def test_compare_prints_a_table_markdown_or_json(folders: list[Path]) -> None:
    table = run("compare", *folders)
    assert table.exit_code == 0
    assert "+1.00 p=0.12" in table.stdout
    assert "McNemar" in table.stdout
    assert run("compare", *folders, "--markdown").stdout.startswith("| length |")
    document = json.loads(run("compare", *folders, "--json").stdout)
    assert document["rows"][-1]["gained"] == 4


def test_compare_writes_a_report(folders: list[Path], tmp_path: Path) -> None:
    result = run("compare", *folders, "--report", tmp_path / "page.html", "--json")
    assert result.exit_code == 0
    json.loads(result.stdout)
    assert "<!doctype html>" in (tmp_path / "page.html").read_text()


def test_plot_draws_png_and_svg(folders: list[Path], tmp_path: Path) -> None:
    assert run("plot", "heatmap", *folders, "--output", tmp_path / "a.png").exit_code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert run("plot", "heatmap", folders[0], "--output", tmp_path / "a.svg").exit_code == 0
    assert "128" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("plot", "heatmp", "{base}", "--output", "{tmp}/a.png"), 2, "Did you mean 'heatmap'"),
        (("plot", "heatmap", "{base}", "--output", "{tmp}/a.gif"), 2, ".png or .svg"),
        (("plot", "heatmap", "{tmp}/none", "--output", "{tmp}/a.png"), 1, "no such folder"),
        (("plot", "heatmap", "{base}", "--output", "{tmp}/none/a.png"), 1, "annot write"),
        (("compare", "{base}"), 2, "at least two"),
        (("compare", "{base}", "{tmp}/none"), 1, "no such folder"),
        (("compare", "{base}", "{base}"), 2, "named twice"),
        (("compare", "{base}", "{longer}", "--json", "--markdown"), 2, "choose one"),
    ],
)
def test_bad_input_is_one_clear_line(
    folders: list[Path], tmp_path: Path, arguments: tuple[str, ...], status: int, words: str
) -> None:
    filled = [part.format(base=folders[0], longer=folders[1], tmp=tmp_path) for part in arguments]
    result = run(*filled)
    assert result.exit_code == status
    assert words.lower() in result.stderr.lower()
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("a.*"))


@pytest.mark.parametrize("verb", ["compare", "plot", "eval", "demo"])
def test_a_verbs_file_loads_nothing_heavy(verb: str) -> None:
    program = (
        f"import sys, ropepatch.cli.{verb}; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'matplotlib', 'numpy')))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

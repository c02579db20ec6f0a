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
    # One test of two has a p below 1: 0.125, twice that after Holm. The table is not cut where there is no terminal.
    assert "1.00 [0.51, 1.00] n=4" in table.stdout
    assert "+1.00 [+0.31, +1.00] p=0.25" in table.stdout
    assert "McNemar" in table.stdout
    assert run("compare", *folders, "--markdown").stdout.startswith("| length |")
    document = json.loads(run("compare", *folders, "--json").stdout)
    assert document["rows"][-1]["gained"] == 4


def test_a_table_in_a_pipe_is_as_wide_as_it_needs(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert "1.00 [0.51, 1.00] n=4" in run("compare", *folders).stdout


def test_compare_writes_a_report(folders: list[Path], tmp_path: Path) -> None:
    result = run("compare", *folders, "--report", tmp_path / "page.html", "--json")
    assert result.exit_code == 0
    json.loads(result.stdout)
    assert "<!doctype html>" in (tmp_path / "page.html").read_text()


def test_compare_writes_tables_of_trials(folders: list[Path], tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="tables are pandas's")
    pytest.importorskip("pyarrow", reason="Parquet takes pyarrow")
    files = tmp_path / "a.csv", tmp_path / "a.parquet"
    result = run("compare", *folders, "--csv", files[0], "--parquet", files[1], "--json")
    assert result.exit_code == 0
    json.loads(result.stdout)
    assert len(pandas.read_csv(files[0])) == len(pandas.read_parquet(files[1])) == 16


def test_compare_prints_a_model_card_of_one_run_or_more(folders: list[Path]) -> None:
    one = run("compare", folders[0], "--card")
    assert one.exit_code == 0
    assert one.stdout.startswith("## Long-context evaluation")
    assert "ropepatch eval passkey --model tiny" in one.stdout
    assert run("compare", *folders, "--card").stdout.count("```bash") == 2


def test_compare_sorts_and_keeps_the_base(folders: list[Path]) -> None:
    document = json.loads(run("compare", *folders, "--sort", "128", "--json").stdout)
    assert [entry["name"] for entry in document["runs"]] == ["longer", "base"]
    assert document["base"] == "base"


def test_compare_takes_another_base_and_some_lengths(folders: list[Path]) -> None:
    document = json.loads(run("compare", *folders, "--base", "longer", "--lengths", "128", "--json").stdout)
    assert document["base"] == "longer"
    assert [(row["run"], row["length"], row["difference"]) for row in document["rows"]] == [
        ("base", 128, -1.0),
        ("longer", 128, None),
    ]


def test_compare_of_several_suites_is_one_table(folders: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    with RunFolder.open(other, {"task": "needle", "seed": 0, "model": "tiny", "patch": None}) as folder:
        folder.append(
            {"task": "needle", "length": 64, "depth": 0.5, "trial": 0, "seed": 0}
            | {"answer": "12345", "output": "1", "correct": 0.0}
        )
    several = (folders[0], other)
    table = run("compare", *several)
    assert table.exit_code == 0
    assert "needle 64 (n=1)" in table.stdout
    assert "A row is a setting" in table.stdout
    assert run("compare", *several, "--markdown").stdout.startswith("| setting | passkey 64 (n=4) |")
    assert run("compare", *several, "--card").stdout.count("```bash") == 2
    document = json.loads(run("compare", *several, "--json", "--report", tmp_path / "page.html").stdout)
    assert [suite["suite"] for suite in document["suites"]] == ["passkey", "needle"]
    assert "needle: Failures" in (tmp_path / "page.html").read_text()


def test_plot_draws_curves(folders: list[Path], tmp_path: Path) -> None:
    assert run("plot", "curve", *folders, "-o", tmp_path / "a.svg").exit_code == 0
    assert "trained length 64" in (tmp_path / "a.svg").read_text()


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
        (("plot", "loss", "{base}", "--output", "{tmp}/a.png"), 2, "did not measure"),
        (("compare", "{base}"), 2, "at least two"),
        (("compare", "{base}", "{longer}", "--sort", "96"), 2, "name, effective, 64, 128"),
        (("compare", "{base}", "{longer}", "--base", "loner"), 2, "did you mean 'longer'"),
        (("compare", "{base}", "{longer}", "--lengths", "96"), 2, "64, 128"),
        (("compare", "{base}", "{longer}", "--lengths", "all"), 2, "whole numbers"),
        (("compare", "{base}", "{longer}", "--card", "--json"), 2, "choose one"),
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


def test_plot_draws_attention_distances_from_json(tmp_path: Path) -> None:
    shares = [[0.25, 0.25, 0.25]]
    layer = {"path": "x", "first_tokens": [0.25], "shares": shares}
    profile = {
        "title": "a",
        "length": 20,
        "trained_length": 8,
        "queries": [19],
        "first_tokens": 4,
        "buckets": [0, 1, 2],
    }
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({**profile, "layers": [layer]}))
    assert run("plot", "distance", file, "--output", tmp_path / "a.png").exit_code == 0
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert run("plot", "distance", tmp_path / "none.json", "--output", tmp_path / "b.png").exit_code == 1

"""`ropepatch plot` of order: a file comes out, and what cannot be drawn is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("matplotlib", reason="figures need matplotlib")

from ropepatch.cli.app import app
from ropepatch.testing import tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = {}
    for kind in ("llama", "gpt2", "t5"):
        made[kind] = str(tmp_path_factory.mktemp(kind))
        tiny_model(kind, "encoder-decoder" if kind == "t5" else "causal-lm").save_pretrained(made[kind])
    return made


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["plot", *arguments])
    return done.exit_code, done.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("table", "--length", "50", "--dim", "128"),
        ("likeness",),
        ("decay", "--theta", "10000,500000", "--length", "300"),
        ("wavelengths",),
        ("planes", "--length", "64"),
        ("table", "--model", "gpt2"),
        ("decay", "--model", "llama", "--patch", "yarn", "--set", "factor=4"),
        ("wavelengths", "--model", "llama", "--patch", "linear", "--set", "factor=2"),
        ("planes", "--model", "llama"),
        ("bias", "--model", "llama", "--patch", "alibi"),
        ("remap", "--model", "llama", "--patch", "self_extend", "--set", "factor=2"),
        ("bias", "--model", "t5"),
        ("bias", "--model", "t5", "--patch", "linear", "--set", "factor=2", "--site", "decoder", "--length", "40"),
    ],
    ids=" ".join,
)
def test_a_figure_is_written(arguments: tuple[str, ...], folders: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "figure.svg"
    status, output = run(*(folders.get(word, word) for word in arguments), "--output", str(file))
    assert status == 0, output
    assert file.read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("decya",), "did you mean 'decay'"),
        (("heatmap",), "none was named"),
        (("table", "some-folder"), "not of folders"),
        (("bias",), "name it with --model"),
        (("bias", "--model", "llama"), "adds no bias"),
        (("table", "--model", "llama"), "no position table"),
        (("remap", "--model", "gpt2"), "no rotation"),
        (("table", "--theta", "10,20"), "one base"),
        (("decay", "--theta", "0"), "above 1"),
        (("decay", "--patch", "yarn"), "--patch needs --model"),
        (("heatmap", "--model", "llama", "some-folder"), "does not go with"),
        (("table", "--model", "gpt2", "--site", "nowhere"), "no such site"),
        (("bias", "--model", "t5", "--length", "100000"), "is a matrix"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_drawn_is_refused(
    arguments: tuple[str, ...], words: str, folders: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "figure.png"
    status, output = run(*(folders.get(word, word) for word in arguments), "--output", str(file))
    assert status == 2, output
    assert words in output.lower() or words in output
    assert not file.exists()

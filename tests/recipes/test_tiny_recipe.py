"""The tiny recipes, run whole: a model that fails beyond its length, and after the recipe does not.

What is measured is what a user gets: the commands of the recipes' headers, and the `passkey` suite as they ask for it.
"""

from __future__ import annotations

import json
import shlex
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ropepatch._data import find_data
from ropepatch.cli.app import app
from ropepatch.training.reading import load_recipe

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "recipes" / "tiny" / "model"
TRAINED, FAR = 128, 512
NEAR = 124  # with the three tokens of the answer within 128


def run(name: str, output: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    """The launch command of a recipe's header, in the folder that it is meant for, with another output."""
    header = find_data("recipes", name).read_text(encoding="utf-8").splitlines()
    command = next(line.removeprefix("# Launch: ") for line in header if line.startswith("# Launch: "))
    program, *arguments = shlex.split(command)
    assert (program, arguments[:2], arguments[2]) == ("ropepatch", ["train", name], "--output")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ROPEPATCH_CACHE", str(output.parent / "cache"))
    result = CliRunner().invoke(app, ["train", name, *overrides, "--output", str(output)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr


def by_length(output: Path, stage: str) -> dict[int, dict[str, Any]]:
    """What a stage's passkey evaluation says of each length."""
    summary = json.loads((output / "eval" / stage / "passkey" / "summary.json").read_text(encoding="utf-8"))
    return {cell["length"]: cell for cell in summary["by_length"]}


def script() -> Any:
    """scripts/make_tiny_model.py as a module."""
    spec = spec_from_file_location("make_tiny_model", ROOT / "scripts" / "make_tiny_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_model_folder_is_what_the_script_makes(tmp_path: Path) -> None:
    script().write(tmp_path)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        made, kept = (json.loads((folder / name).read_text(encoding="utf-8")) for folder in (tmp_path, MODEL))
        for content in (made, kept):
            content.pop("transformers_version", None)
        if name == "config.json":
            # Releases differ in the defaults that they write out.
            common = made.keys() & kept.keys()
            assert {"rope_parameters", "hidden_size", "max_position_embeddings"} <= common
            made, kept = ({key: content[key] for key in common} for content in (made, kept))
        assert made == kept, name


def test_recipes_speak_of_the_same_model() -> None:
    base, extended = load_recipe("tiny/base"), load_recipe("tiny/linear")
    assert base.model.name == f"scratch:{extended.model.name}"
    assert extended.patch is not None
    assert base.data.length == TRAINED
    # The suite's prompt and its answer end below the target.
    assert extended.patch.options["factor"] * TRAINED >= FAR + 3


def check(output: Path) -> None:
    """A run of tiny/linear shows failure before, and success after."""
    unpatched, before, after = (by_length(output, stage) for stage in ("unpatched", "before", "after"))
    assert {lengths[FAR]["n"] for lengths in (unpatched, before, after)} == {50}
    assert unpatched[NEAR]["accuracy"] >= 0.9
    assert unpatched[FAR]["ci_high"] <= 0.3
    assert before[FAR]["ci_high"] <= 0.3, "the patch alone does not do it"
    assert after[FAR]["accuracy"] >= 0.9
    assert after[NEAR]["accuracy"] >= 0.9, "what it could before it still can"


def test_fails_beyond_its_length_and_after_the_recipe_finds_keys_at_four_times_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    run("tiny/linear", output, monkeypatch)
    check(output)


@pytest.mark.slow
def test_both_recipes_from_random_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("tiny/base", tmp_path / "base", monkeypatch)
    base = by_length(tmp_path / "base", "after")
    assert base[NEAR]["accuracy"] >= 0.9
    assert base[FAR]["ci_high"] <= 0.3
    run("tiny/linear", tmp_path / "run", monkeypatch, f"model.name={tmp_path / 'base' / 'model'}")
    check(tmp_path / "run")

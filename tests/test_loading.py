"""Loading by name, and what is said when it fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ropepatch.errors import ModelLoadError, OptionError, UnknownNameError
from ropepatch.loading import load_model, resolve_dtype


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def shrink(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:3].clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_loads_with_model_and_tokenizer(tiny_model_folder: Path, dtype: torch.dtype) -> None:
    model, tokenizer = load_model(tiny_model_folder, dtype=str(dtype).removeprefix("torch."))
    assert model.dtype == dtype
    assert not model.training
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    saved = load_file(tiny_model_folder / "model.safetensors")
    torch.testing.assert_close(
        model.state_dict()["model.layers.0.mlp.up_proj.weight"],
        saved["model.layers.0.mlp.up_proj.weight"].to(dtype),
        rtol=0,
        atol=0,
    )
    assert tokenizer.decode(tokenizer("The pass key is 123.").input_ids) == "The pass key is 123."


def test_folder_of_a_run_names_the_models_in_it(tmp_path: Path) -> None:
    for name, file in (("adapter", "adapter_config.json"), ("merged", "config.json"), ("eval", "run.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    with pytest.raises(ModelLoadError, match="holds no model") as caught:
        load_model(tmp_path)
    assert caught.value.hint == f"did you mean {str(tmp_path / 'adapter')!r} or {str(tmp_path / 'merged')!r}?"


def test_auto_chooses_one_of_the_two() -> None:
    assert resolve_dtype("auto") == resolve_dtype(None)
    assert resolve_dtype("auto") in (torch.float32, torch.bfloat16)
    with pytest.raises(OptionError, match="auto, bfloat16, float16, float32"):
        resolve_dtype("float99")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), r"has no config\.json"),
    "config is no JSON": (lambda path: (path / "config.json").write_text("{"), "not a valid JSON"),
    "config of nothing": (lambda path: (path / "config.json").write_text("{}"), "model_type"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "no file named"),
    "cut weights": (lambda path: os.truncate(path / "model.safetensors", 9000), "annot load"),
    "no weights inside": (lambda path: (path / "model.safetensors").write_bytes(b"x" * 99), "annot load"),
    "no tokenizer": (lambda path: [file.unlink() for file in path.glob("tokenizer*")], "annot load"),
    "tokenizer is no JSON": (lambda path: (path / "tokenizer.json").write_text("{"), "annot load"),
    "a tensor is missing": (
        lambda path: edit_weights(path, drop),
        r"missing from its weights, or have another shape: model\.layers\.1\.mlp\.up_proj",
    ),
    "a tensor has another shape": (
        lambda path: edit_weights(path, shrink),
        r"missing from its weights, or have another shape: model\.layers\.1\.mlp\.up_proj",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_clear_line(tiny_model_folder: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    apply, reason = DAMAGE[damage]
    apply(folder)
    with pytest.raises(ModelLoadError, match=reason) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["", "/no/such/folder", "./missing", "~missing/x", "a/b/c", "missing/"])
def test_a_missing_folder_is_not_asked_of_the_hub(name: str) -> None:
    with pytest.raises(ModelLoadError, match="there is no such folder"):
        load_model(name)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(ModelLoadError, match="not a model folder"):
        load_model(tmp_path / "model")


def test_a_hub_id_that_cannot_be_had_is_one_clear_line() -> None:
    with pytest.raises(ModelLoadError, match="no-such-owner/no-such-model") as caught:
        load_model("no-such-owner/no-such-model")
    assert "\n" not in str(caught.value)


def test_an_unknown_demo_model_suggests_the_known_one() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'demo:smollm2'"):
        load_model("demo:smolm2")

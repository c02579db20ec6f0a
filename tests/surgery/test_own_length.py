"""What lengths count, in models of images and of time series as in those of text."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    BertConfig,
    BertModel,
    PatchTSTConfig,
    PatchTSTModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

import ropepatch

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
MODELS: dict[str, tuple[Any, Any, int, str]] = {
    # An image of 4 x 6 patches: the longer side counts.
    "vit": (ViTModel, ViTConfig(**SMALL, image_size=(32, 48), patch_size=8), 6, "patches"),
    "swin": (
        SwinModel,
        SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4),
        4,
        "patches",
    ),
    "patchtst": (
        PatchTSTModel,
        PatchTSTConfig(
            context_length=32,
            patch_length=4,
            patch_stride=4,
            d_model=16,
            num_attention_heads=2,
            num_hidden_layers=1,
        ),
        32,
        "time steps",
    ),
    "bert": (BertModel, BertConfig(**SMALL, vocab_size=20, max_position_embeddings=24), 24, "tokens"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_lengths_and_their_unit_before_and_after_a_patch(kind: str) -> None:
    cls, config, length, unit = MODELS[kind]
    model = cls(config).eval()
    for target in (length, 2 * length):
        if target != length:
            ropepatch.patch(model, "linear", factor=2)
        found = ropepatch.inspect(model)
        assert (found.trained_length, found.target_length, found.unit) == (length, target, unit)
        assert found.to_dict()["unit"] == unit
        assert f"target length   {target} {unit}" in str(found).splitlines()

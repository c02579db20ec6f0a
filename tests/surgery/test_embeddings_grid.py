"""Tables over image patches: larger images, against what the models do themselves when asked to interpolate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BeitConfig,
    BeitModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

import ropepatch
from ropepatch.errors import OptionError, UnsupportedModelError

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
GRID: dict[str, Any] = {**SMALL, "image_size": 32, "patch_size": 8}
# Those that interpolate only when told to.
MODELS: dict[str, tuple[Any, Any, dict[str, Any], bool]] = {
    "vit": (ViTConfig, ViTModel, {}, True),
    "deit": (DeiTConfig, DeiTModel, {}, True),
    "clip": (CLIPVisionConfig, CLIPVisionModel, {}, True),
    "siglip": (SiglipVisionConfig, SiglipVisionModel, {}, True),
    "blip": (BlipVisionConfig, BlipVisionModel, {}, True),
    "dinov2": (Dinov2Config, Dinov2Model, {}, False),
    "beit": (BeitConfig, BeitModel, {"use_absolute_position_embeddings": True}, False),
}


def build(kind: str, **overrides: Any) -> Any:
    config, model, more, _ = MODELS[kind]
    torch.manual_seed(0)
    made = model(config(**{**GRID, **more, **overrides})).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # tables and tokens of zeros would hide what is behind them
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return made


def image(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def states(model: Any, pixels: torch.Tensor, **more: Any) -> torch.Tensor:
    return model(pixel_values=pixels, **more).last_hidden_state


@pytest.mark.parametrize("kind", MODELS)
def test_cubic_is_the_models_own_interpolation_to_the_last_bit(kind: str) -> None:
    model = build(kind)
    before, config = states(model, image(32, 32)), model.config.to_dict()
    asked = {"interpolate_pos_encoding": True} if MODELS[kind][3] else {}
    native = states(model, image(64, 64), **asked)
    ropepatch.patch(model, "linear", factor=2, interpolation="cubic")
    assert states(model, image(64, 64)).equal(native)
    found = ropepatch.inspect(model)
    assert (found.trained_length, found.target_length) == (4, 8) and "64 x 64" in found.warnings[0]
    ropepatch.unpatch(model)
    assert states(model, image(32, 32)).equal(before) and model.config.to_dict() == config


def test_linear_differs_from_cubic_and_keeps_the_rows_before_the_patches() -> None:
    model = build("deit")
    old = model.embeddings.position_embeddings.detach().clone()
    ropepatch.patch(model, "linear", factor=2)
    new = model.embeddings.position_embeddings.detach().clone()
    assert tuple(new.shape) == (1, 2 + 64, 16) and new[:, :2].equal(old[:, :2])
    ropepatch.unpatch(model)
    ropepatch.patch(model, "linear", factor=2, interpolation="cubic")
    assert not model.embeddings.position_embeddings.allclose(new)


def test_oblong_images_grow_along_both_axes() -> None:
    model = build("vit", image_size=(32, 48))
    ropepatch.patch(model, "linear", factor=1.5)
    assert model.config.image_size == (48, 72)
    assert states(model, image(48, 72)).shape[1] == 1 + 6 * 9


def test_one_tower_of_a_model_of_text_and_images() -> None:
    text = CLIPTextConfig(**SMALL, vocab_size=40, max_position_embeddings=16, eos_token_id=2)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=CLIPVisionConfig(**GRID).to_dict())).eval()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        before = model(input_ids=ids, pixel_values=image(32, 32)).logits_per_image
        ropepatch.patch(model, "linear", factor=2)  # the text
        model(input_ids=torch.cat((ids, ids), 1), pixel_values=image(32, 32))
        ropepatch.unpatch(model)
        ropepatch.patch(model.vision_model, "linear", factor=2)
        model(input_ids=ids, pixel_values=image(64, 64))
        ropepatch.unpatch(model)
        assert model(input_ids=ids, pixel_values=image(32, 32)).logits_per_image.equal(before)


def test_saved_and_exported_folders_take_larger_images(tmp_path: Any) -> None:
    model = ropepatch.patch(build("vit"), "linear", factor=2)
    wanted = states(model, image(64, 64))
    ropepatch.save_pretrained(model, tmp_path / "saved")
    again = ropepatch.from_pretrained(tmp_path / "saved")
    assert states(again, image(64, 64)).equal(wanted)
    assert states(ropepatch.unpatch(again), image(32, 32)).equal(states(ropepatch.unpatch(model), image(32, 32)))
    ropepatch.patch(model, "linear", factor=2)
    ropepatch.export(model, tmp_path / "plain")
    plain = ViTModel.from_pretrained(tmp_path / "plain")
    assert plain.config.image_size == 64 and states(plain, image(64, 64)).equal(wanted)


def test_what_fits_no_grid_is_refused_and_changes_nothing() -> None:
    model = build("vit")
    before = states(model, image(32, 32))
    with pytest.raises(OptionError, match="splits a patch"):
        ropepatch.patch(model, "linear", factor=1.1)
    with pytest.raises(UnsupportedModelError, match="no form for positions on two axes"):
        ropepatch.patch(model, "hierarchical", factor=2)
    with pytest.raises(OptionError, match="grid of patches"):
        ropepatch.patch(model, "linear", factor=2, original_length=4)
    model.config.image_size = 48
    with pytest.raises(UnsupportedModelError, match="no grid of patches"):
        ropepatch.patch(model, "linear", factor=2)
    model.config.image_size = 32
    assert states(model, image(32, 32)).equal(before)


@pytest.mark.parametrize("trained", [True, False])
def test_training_does_not_fill_a_table_that_is_switched_off(trained: bool) -> None:
    model = build("deit")
    table = model.embeddings.position_embeddings.requires_grad_(trained)
    ropepatch.patch(model, "nope", factor=2)
    model(pixel_values=image(64, 64)).last_hidden_state.square().sum().backward()
    assert table.grad is None and any(parameter.grad is not None for parameter in model.parameters())
    ropepatch.unpatch(model)
    assert model.embeddings.position_embeddings.requires_grad == trained

"""Rotary positions on several axes: those of a language model are patched, those over image patches are shown only."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ropepatch
from ropepatch.errors import UnsupportedModelError
from ropepatch.testing.modalities import tiny_modality_model
from ropepatch.testing.native import native_twin

THREE_AXES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SCALINGS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("linear", {"factor": 4}, {"rope_type": "linear", "factor": 4.0}),
    ("yarn", {"factor": 4}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
    (
        "llama3",
        {"factor": 4, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
]


def positions() -> torch.Tensor:
    """Text, an image of 4 x 5 patches, text: time, height and width of each of 40 tokens, [3, 1, 40]."""
    before = torch.arange(10)
    patches = torch.arange(20)
    image = torch.stack((torch.zeros_like(patches), patches // 5, patches % 5)) + 10
    after = torch.arange(10) + 15
    return torch.cat((before.expand(3, -1), image, after.expand(3, -1)), 1)[:, None]


@torch.no_grad()
def states(model: Any, places: torch.Tensor) -> torch.Tensor:
    ids = torch.arange(40, 80)[None]
    return model(input_ids=ids, position_ids=places, use_cache=False).last_hidden_state


@torch.no_grad()
def seen(model: Any) -> torch.Tensor:
    """What the vision tower makes of one image of 4 x 4 patches."""
    config = model.config.vision_config
    width = getattr(config, "in_channels", 3) * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(16, width, generator=torch.Generator().manual_seed(0))
    output = model.visual(pixels, grid_thw=torch.tensor([[1, 4, 4]]))
    return output[0] if not torch.is_tensor(output) else output


@pytest.mark.parametrize(("method", "options", "scaling"), SCALINGS)
@pytest.mark.parametrize("kind", THREE_AXES)
def test_three_axes_are_scaled_as_transformers_scales_them(
    kind: str, method: str, options: dict[str, Any], scaling: dict[str, Any]
) -> None:
    model = tiny_modality_model(kind)
    before, image = states(model, positions()), seen(model)
    twin = native_twin(model, scaling)
    assert twin is not None
    ropepatch.patch(model, method, **options)
    scaled = states(model, positions())
    assert scaled.equal(states(twin, positions())) and not scaled.equal(before)
    assert seen(model).equal(image)
    ropepatch.unpatch(model)
    assert states(model, positions()).equal(before)


@pytest.mark.parametrize("kind", THREE_AXES)
def test_linear_divides_the_positions_of_every_axis(kind: str) -> None:
    model = tiny_modality_model(kind)
    before = states(model, positions())
    ropepatch.patch(model, "linear", factor=4)
    assert states(model, 4 * positions()).equal(before)


@pytest.mark.parametrize("kind", [*THREE_AXES, "mistral3"])
def test_the_tower_is_shown_and_refused_by_itself(kind: str) -> None:
    model = tiny_modality_model(kind)
    found = ropepatch.inspect(model)
    assert found.mechanism == "rotary"
    rotary = {site["part"]: site for site in found.sites if site["mechanism"] == "rotary"}
    assert rotary.keys() == {"text", "vision"}
    assert rotary["text"]["kind"] == "frequencies"
    assert (rotary["vision"]["kind"], "image patches" in rotary["vision"]["note"]) == ("fixed", True)
    assert all(site["part"] == "vision" for site in found.sites if site["mechanism"] == "learned")
    tower = model.visual if hasattr(model, "visual") else model.vision_tower
    kept = {name: buffer.clone() for name, buffer in tower.named_buffers()}
    for method in ("linear", "yarn", "nope", "self_extend"):
        with pytest.raises(UnsupportedModelError, match=rf"{tower.config.model_type}.*image patches.*language model"):
            ropepatch.patch(tower, method, **({} if method == "nope" else {"factor": 2}), verify=False)
    assert all(buffer.equal(kept[name]) for name, buffer in tower.named_buffers())


@pytest.mark.parametrize("kind", ["pixtral", "dinov3_vit"])
def test_towers_of_their_own(kind: str) -> None:
    model = tiny_modality_model(kind)
    rotary = [site for site in ropepatch.inspect(model).sites if site["mechanism"] == "rotary"]
    assert rotary and all(site["kind"] == "fixed" for site in rotary)
    with pytest.raises(UnsupportedModelError, match="image patches"):
        ropepatch.patch(model, "linear", factor=2)


def test_a_refusal_names_the_part_that_has_what_a_method_changes() -> None:
    model = tiny_modality_model("sam")
    with pytest.raises(UnsupportedModelError, match=r"its vision part has learned ones, at .*pass that part by itself"):
        ropepatch.patch(model, "linear", factor=2)
    ropepatch.patch(model.vision_encoder, "linear", factor=2)


def test_rotary_of_sound_stays_on_one_axis() -> None:
    model = tiny_modality_model("mimi")
    rotary = [site for site in ropepatch.inspect(model).sites if site["mechanism"] == "rotary"]
    assert rotary and all(site["kind"] == "frequencies" for site in rotary)

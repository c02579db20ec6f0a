"""A sample of the list of models that read images, sound or time series: these rows are still true."""

from __future__ import annotations

import importlib.util

import pytest

from ropepatch.testing.modalities import PLAIN, POSITIONS, measure_parts, modality_types, tiny_modality_model

YES, NO = "yes", "refused"
# Type to the rows of its parts: what the part reads, its mechanism, and what becomes of linear, nope and yarn.
ROWS = {
    "vit": [("images", "learned", YES, YES, NO)],
    "clip": [("text", "learned", YES, YES, NO), ("images", "learned", YES, YES, NO)],
    "llava": [("text", "rotary", YES, YES, YES), ("images", "learned", YES, YES, NO)],
    "qwen2_vl": [("images", "rotary", NO, NO, NO), ("text", "rotary", YES, YES, YES)],
    "pixtral": [("images", "rotary", NO, NO, NO)],
    "dinov3_vit": [("images", "rotary", NO, NO, NO)],
    "swin": [("images", "relative_bias", YES, NO, NO)],
    "swinv2": [("images", "relative_bias", YES, NO, NO)],
    "donut-swin": [("images", "relative_bias", YES, NO, NO)],
    "beit": [("images", "relative_bias", YES, NO, NO)],
    "data2vec-vision": [("images", "relative_bias", YES, NO, NO)],
    "sam_vision_model": [("images", "learned+relative_bias", YES, YES, NO)],
    "levit": [("images", "relative_bias", NO, NO, NO)],
    "yolos": [("images", "learned", NO, NO, NO)],
    "whisper": [("sound", "sinusoidal", YES, YES, NO), ("text", "learned", YES, YES, NO)],
    "glmasr_encoder": [("sound", "rotary", "unverified", NO, "unverified")],
    "decision_transformer": [("time series", "learned", YES, YES, NO)],
}


@pytest.mark.parametrize("model_type", ROWS)
def test_rows(model_type: str) -> None:
    rows = measure_parts(model_type)
    found = [(row.part, row.mechanism, *(word for word, _ in row.outcomes.values())) for row in rows]
    assert sorted(found) == sorted(ROWS[model_type])
    assert all(bool(why) == (word != YES) for row in rows for word, why in row.outcomes.values())


@pytest.mark.parametrize(
    ("model_type", "detail"),
    [
        ("resnet", PLAIN),
        ("wav2vec2", POSITIONS + "encoder.pos_conv_embed"),
    ],
)
def test_types_without_sites(model_type: str, detail: str) -> None:
    (row,) = measure_parts(model_type)
    assert (row.mechanism, row.detail, row.outcomes) == ("none", detail, {})


@pytest.mark.skipif(importlib.util.find_spec("natten") is not None, reason="needs an environment without natten")
def test_what_cannot_be_built_is_named() -> None:
    (row,) = measure_parts("dinat")
    assert row.detail and not row.outcomes


def test_the_list_has_every_modality_and_no_text_model() -> None:
    types = set(modality_types())
    assert types > {*ROWS, "resnet", "videomae", "timesfm", "moonshine", "sam"}
    assert not types & {"llama", "bert", "t5"}


def test_the_random_weights_are_those_of_the_seed() -> None:
    first, again = (tiny_modality_model("vit").state_dict() for _ in range(2))
    assert all(first[name].equal(again[name]) for name in first)

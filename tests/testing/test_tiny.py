"""The tiny models: real classes, built from a name, small, and the same at every build."""

from __future__ import annotations

import pytest
import torch

from ropepatch.errors import OptionError, RopepatchError, UnknownNameError, UnsupportedModelError
from ropepatch.testing import forward_logits, model_types, tiny_config, tiny_inputs, tiny_model

SAMPLE = [
    ("llama", "causal-lm"),
    ("gemma3_text", "causal-lm"),
    ("deepseek_v3", "causal-lm"),
    ("gpt_oss", "causal-lm"),
    ("gptj", "causal-lm"),
    ("qwen3_5", "causal-lm"),
    ("bloom", "causal-lm"),
    ("gpt2", "causal-lm"),
    ("xglm", "causal-lm"),
    ("mamba", "causal-lm"),
    ("bert", "encoder"),
    ("modernbert", "encoder"),
    ("deberta-v2", "encoder"),
    ("t5", "encoder-decoder"),
    ("bart", "encoder-decoder"),
]


@pytest.mark.parametrize(("model_type", "kind"), SAMPLE)
def test_builds_runs_and_repeats(model_type: str, kind: str) -> None:
    model = tiny_model(model_type, kind)
    inputs = tiny_inputs(model, length=24, batch=2)
    logits = forward_logits(model, **inputs)
    assert not model.training
    assert logits.shape[:2] == (2, 24)
    assert logits.isfinite().all()
    assert not logits.requires_grad
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    again = tiny_model(model_type, kind)
    assert torch.equal(logits, forward_logits(again, **inputs))
    other = tiny_model(model_type, kind, seed=1)
    assert not torch.equal(logits, forward_logits(other, **inputs))


def test_the_causal_lm_types_are_those_of_transformers() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert model_types() == tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    assert {"bert", "modernbert"} <= set(model_types("encoder"))
    assert {"t5", "bart"} <= set(model_types("encoder-decoder"))
    assert not set(model_types("encoder")) & set(model_types("encoder-decoder"))


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    tiny_model("llama")
    assert torch.equal(torch.rand(3), expected)


def test_positions_matter_in_so_small_a_model() -> None:
    # With transformers' own 0.02 the attention of so narrow a model is flat, and no position method shows.
    model = tiny_model("llama")
    inputs = tiny_inputs(model, length=24)
    straight = forward_logits(model, **inputs)
    stretched = forward_logits(model, **inputs, position_ids=3 * torch.arange(24)[None])
    assert (straight - stretched).abs().max() > 0.05


def test_every_layer_type_is_kept() -> None:
    config = tiny_config("gemma3_text")
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert config.num_hidden_layers == 2


def test_special_tokens_are_in_the_vocabulary_and_not_in_the_inputs() -> None:
    model = tiny_model("qwen3_5")
    config = tiny_config("qwen3_5")
    special = [value for name, value in config.to_dict().items() if name.endswith("_token_id") and value is not None]
    assert special
    assert max(special) < config.text_config.vocab_size
    ids = tiny_inputs(model, length=256)["input_ids"]
    assert not set(special) & set(ids.unique().tolist())
    assert ids.max() < config.text_config.vocab_size


def test_native_scaling_is_kept_for_the_small_length() -> None:
    config = tiny_config("gpt_oss")
    parameters = config.rope_parameters
    assert parameters["rope_type"] == "yarn"
    assert config.max_position_embeddings == parameters["factor"] * parameters["original_max_position_embeddings"]


def test_partial_rotary_leaves_planes_to_rotate() -> None:
    model = tiny_model("gpt_neox")
    assert model.gpt_neox.rotary_emb.inv_freq.numel() >= 4


def test_overrides_reach_the_text_part_of_a_composite_config() -> None:
    assert tiny_config("llama", max_position_embeddings=128).max_position_embeddings == 128
    assert tiny_config("qwen3_5", max_position_embeddings=128).text_config.max_position_embeddings == 128


def test_dtype() -> None:
    assert next(tiny_model("llama").parameters()).dtype == torch.float32
    assert next(tiny_model("llama", dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16


def test_an_unknown_type_suggests_near_names() -> None:
    with pytest.raises(UnknownNameError, match="llama"):
        tiny_model("lama")
    with pytest.raises(UnknownNameError, match="bert"):
        tiny_model("bret", "encoder")
    with pytest.raises(UnknownNameError, match="causal-lm"):
        model_types("causal")


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(OptionError, match="max_position_embeddings"):
        tiny_config("llama", max_position_embedding=128)


def test_what_cannot_be_built_says_why() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'llama'.*hidden"):
        tiny_model("llama", hidden_size=63, head_dim=None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal-lm", "encoder", "encoder-decoder", "text"])
def test_nearly_every_type_builds_and_runs(kind: str) -> None:
    failures = {}
    for model_type in model_types(kind):
        try:
            model = tiny_model(model_type, kind)
        except RopepatchError as error:
            failures[model_type] = str(error)
            continue
        if model_type == "voxtral_realtime":  # wants audio frames beside the tokens
            continue
        logits = forward_logits(model, **tiny_inputs(model, length=24))
        assert logits.isfinite().all(), model_type
    # Gemma 3n needs the timm package; the assistants of Gemma 4 cannot be built by transformers itself.
    assert set(failures) <= {"gemma3n", "gemma4_assistant", "gemma4_unified_assistant"}, failures

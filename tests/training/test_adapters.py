"""What is adapted, what is trained whole, and what comes back from the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import recipe

import ropepatch
from ropepatch.errors import OptionError, UnsupportedModelError
from ropepatch.testing import tiny_model
from ropepatch.training.adapters import adapt, add_lora, attention_projections
from ropepatch.training.recipe import LoraSection

IDS = torch.arange(30, 60)[None]

# By hand, from the models' code.
PROJECTIONS = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qwen3": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "phi3": {"qkv_proj", "o_proj"},
    "gpt_neox": {"query_key_value", "dense"},
    "gpt2": {"c_attn", "c_proj"},
    "gptj": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "falcon": {"query_key_value", "dense"},
    "bloom": {"query_key_value", "dense"},
    "mpt": {"Wqkv", "out_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
    # A hybrid: the state-space layers beside the attention are left alone.
    "jamba": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qwen3_next": {"q_proj", "k_proj", "v_proj", "o_proj"},
}


def stirred(model: Any) -> Any:
    """Trained parameters moved from where they began: B of an adapter begins as zeros."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("model_type", PROJECTIONS)
def test_attention_projections_are_found_by_what_they_are(model_type: str) -> None:
    found = attention_projections(tiny_model(model_type))
    assert {name.rpartition(".")[2] for name in found} == PROJECTIONS[model_type]
    # None of an MLP that happens to have a projection of that name.
    assert all(any(part in name for part in ("attn", "attention")) for name in found)


def test_a_model_without_attention_is_refused() -> None:
    for model_type in ("mamba", "mamba2"):
        with pytest.raises(UnsupportedModelError, match=r"lora\.target_modules=attention.*(?i:name them)"):
            add_lora(tiny_model(model_type), LoraSection(r=2))
    assert add_lora(tiny_model("mamba"), LoraSection(r=2, target_modules=["in_proj"]))


def test_names_must_match() -> None:
    with pytest.raises(OptionError, match=r"'q_prj'.*'q_proj'"):
        add_lora(tiny_model("llama"), LoraSection(r=2, target_modules=["q_prj"]))
    one = add_lora(tiny_model("llama"), LoraSection(r=2, target_modules=["layers.1.self_attn.q_proj"]))
    assert len([name for name, p in one.named_parameters() if p.requires_grad]) == 2


def test_all_linear_leaves_the_head_and_learned_biases_alone() -> None:
    model = ropepatch.patch(tiny_model("llama"), "fire")
    adapted = add_lora(model, LoraSection(r=2, target_modules="all-linear"))
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert not any("lm_head" in name for name in names)
    learned = {name for name in names if "ropepatch_bias" in name}
    assert learned and not any("lora" in name for name in learned)
    assert any("mlp.down_proj.lora_A" in name for name in names)


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"train_norms": True}, "yarn"),
        ({"train_embeddings": True, "train_norms": True}, "yarn"),
        ({"use_dora": True}, "ntk"),
        ({"use_rslora": True, "target_modules": "all-linear"}, "self_extend"),
        ({"train_norms": True}, "kerple"),
        ({"target_modules": "all-linear"}, "fire"),
    ],
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_is_trained_comes_back(settings: dict[str, Any], method: str, tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    options = {"factor": 4} if method in ("yarn", "ntk", "self_extend") else {}
    asked = recipe(tmp_path / "base", lora={"r": 2, **settings}, patch=None)
    model = stirred(adapt(ropepatch.patch(base, method, **options), asked))
    before = logits(model)
    ropepatch.save_pretrained(model, tmp_path / "adapter")
    again = ropepatch.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), before)
    merged = again.merge_and_unload()
    embedding, head = merged.get_input_embeddings().weight, merged.get_output_embeddings().weight
    assert (embedding is head) == tied
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_a_longer_position_table_is_trained_and_comes_back(model_type: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_model(model_type).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    asked = recipe(tmp_path / "base", lora={"r": 2, "train_positions": True}, patch=None)
    model = stirred(adapt(ropepatch.patch(base, "linear", factor=4), asked)).eval()
    tables = [p for name, p in model.named_parameters() if "modules_to_save" in name and p.requires_grad]
    assert len(tables) == 1
    assert len(tables[0]) >= 4 * 64
    ids = torch.arange(200)[None] % 100
    with torch.no_grad():
        before = model(ids).logits
        ropepatch.save_pretrained(model, tmp_path / "adapter")
        again = ropepatch.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(again(ids).logits, before)


def test_a_model_without_a_table_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="train_positions"):
        add_lora(tiny_model("llama"), LoraSection(r=2, train_positions=True))


def test_adapters_depend_on_the_seed_alone(tiny_model_folder: Path) -> None:
    def first(seed: int) -> torch.Tensor:
        torch.rand(seed + 3)
        model = adapt(tiny_model("llama"), recipe(tiny_model_folder, train__seed=seed))
        return next(p for name, p in model.named_parameters() if "lora_A" in name)

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_trained_weights_are_float32_in_a_half_precision_model() -> None:
    model = add_lora(tiny_model("llama", dtype=torch.bfloat16), LoraSection(r=2, train_norms=True))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_the_base_keeps_the_name_of_the_recipe(tiny_model_folder: Path) -> None:
    model = add_lora(tiny_model("llama"), LoraSection(r=2), base="demo:smollm2", revision="main")
    config = model.peft_config["default"]
    assert (config.base_model_name_or_path, config.revision) == ("demo:smollm2", "main")


def test_without_lora_all_weights_are_trained(tiny_model_folder: Path) -> None:
    model = tiny_model("llama").requires_grad_(False)
    assert all(p.requires_grad for p in adapt(model, recipe(tiny_model_folder, lora=None)).parameters())


def test_gradients_pass_through_quantized_weights(tmp_path: Path) -> None:
    """Also after a forward in eval mode, at which bitsandbytes repacks its weights on some CPUs."""
    pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    from ropepatch.training.loading import load_base

    tiny_model("llama").save_pretrained(tmp_path)
    asked = recipe(tmp_path, model={"name": str(tmp_path), "quantization": "nf4"}, lora={"r": 2})

    def gradients(dequantized: bool) -> dict[str, torch.Tensor]:
        base = load_base(asked)
        logits(base)
        if dequantized:
            base = base.dequantize().float()
            base.config.quantization_config = None
        model = stirred(adapt(base, asked)).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    found, wanted = gradients(dequantized=False), gradients(dequantized=True)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(value.norm()) > 0
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=1e-3 * float(value.norm()))

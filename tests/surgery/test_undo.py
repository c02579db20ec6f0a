"""unpatch restores the model bit for bit, in any order with PEFT, casts, deepcopy, pickle and compilation."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ropepatch
from ropepatch.testing import forward_logits, tiny_inputs, tiny_model

FAMILIES = ["llama", "gemma3_text", "gpt_neox", "gptj", "deepseek_v3", "phi3", "falcon", "cohere", "stablelm"]
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"factor": 4}),
    ("ntk", {"factor": 4}),
    ("yarn", {"factor": 4}),
    ("ntk_by_parts", {"factor": 4}),
    ("llama3", {"factor": 4}),
    ("abf", {"factor": 4}),
]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a patch might touch, by value."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "buffers": {key: value.clone() for key, value in model.named_buffers()},
        "config": copy.deepcopy(model.config.to_dict()),
        "attributes": {
            (path, name): repr(value)
            for path, module in model.named_modules()
            for name, value in vars(module).items()
            if isinstance(value, int | float | str | bool | dict) and not name.startswith("_") and name != "config"
        },
        "attention": model.config._attn_implementation,
        "keys": [sorted(vars(module)) for module in model.modules()],
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> None:
    for part in ("state", "buffers"):
        assert left[part].keys() == right[part].keys()
        for key, value in left[part].items():
            other = right[part][key]
            assert value.dtype == other.dtype and torch.equal(value, other), (part, key)
    for part in ("config", "attributes", "attention", "keys"):
        assert left[part] == right[part], part


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_unpatch_restores_everything(family: str, method: str, options: dict[str, Any]) -> None:
    model = tiny_model(family)
    inputs = tiny_inputs(model, length=24)
    before, logits = snapshot(model), forward_logits(model, **inputs)
    ropepatch.patch(model, method, **options, **_rescale(model))
    assert not torch.equal(forward_logits(model, **inputs), logits)
    ropepatch.unpatch(model)
    same(snapshot(model), before)
    assert torch.equal(forward_logits(model, **inputs), logits)


def _rescale(model: nn.Module) -> dict[str, str]:
    """Some families cannot be built without a native scaling."""
    return {"on_scaled": "replace"} if ropepatch.inspect(model).native_scaling else {}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gptj"])
def test_undo_after_a_cast_equals_the_cast_alone(family: str) -> None:
    patched, plain = tiny_model(family), tiny_model(family)
    ropepatch.patch(patched, "yarn", factor=4)
    for model in (patched, plain):
        model.to(torch.bfloat16).to(torch.float32)
    ropepatch.unpatch(patched)
    same(snapshot(patched), snapshot(plain))


def test_a_rounded_buffer_is_patched_in_float32_and_restored_rounded() -> None:
    model, exact = tiny_model("llama").to(torch.bfloat16), tiny_model("llama")
    before = snapshot(model)
    assert "bfloat16" in ropepatch.inspect(model).warnings[0]
    ropepatch.patch(model, "ntk", factor=4)
    ropepatch.patch(exact, "ntk", factor=4)
    inv_freq = model.model.rotary_emb.inv_freq
    assert inv_freq.dtype == torch.float32
    assert torch.equal(inv_freq, exact.model.rotary_emb.inv_freq)
    ropepatch.unpatch(model)
    same(snapshot(model), before)


def test_deepcopy_and_pickle_carry_the_patch_and_its_undo() -> None:
    model = tiny_model("llama")
    inputs = tiny_inputs(model, length=24)
    original = forward_logits(model, **inputs)
    ropepatch.patch(model, "yarn", factor=4)
    patched = forward_logits(model, **inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(forward_logits(twin, **inputs), patched)
        ropepatch.unpatch(twin)
        assert torch.equal(forward_logits(twin, **inputs), original)
    assert torch.equal(forward_logits(model, **inputs), patched), "a twin's undo reached the original"


def test_patching_one_model_leaves_another_of_the_same_config_alone() -> None:
    config = tiny_model("llama").config
    one, two = tiny_model("llama"), tiny_model("llama")
    two.config = copy.deepcopy(config)
    inputs = tiny_inputs(one, length=24)
    before, logits = snapshot(two), forward_logits(two, **inputs)
    ropepatch.patch(one, "linear", factor=4)
    same(snapshot(two), before)
    assert torch.equal(forward_logits(two, **inputs), logits)


def test_state_dict_keys_do_not_change() -> None:
    for family in FAMILIES:
        model = tiny_model(family)
        keys = list(model.state_dict())
        ropepatch.patch(model, "linear", factor=2, **_rescale(model))
        assert list(model.state_dict()) == keys


def _adapted(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("unpatch_through_peft", [True, False])
def test_peft_in_either_order(patch_first: bool, unpatch_through_peft: bool) -> None:
    reference = _adapted(tiny_model("llama"))
    inputs = tiny_inputs(tiny_model("llama"), length=24)
    original = forward_logits(reference, **inputs)

    base = tiny_model("llama")
    if patch_first:
        adapted = _adapted(ropepatch.patch(base, "yarn", factor=4))
    else:
        adapted = ropepatch.patch(_adapted(base), "yarn", factor=4)
    assert not torch.equal(forward_logits(adapted, **inputs), original)
    assert ropepatch.inspect(adapted).method == "yarn"
    ropepatch.unpatch(adapted if unpatch_through_peft else base)
    assert torch.equal(forward_logits(adapted, **inputs), original)


def test_merge_and_unload_keeps_the_patch() -> None:
    adapted = ropepatch.patch(_adapted(tiny_model("llama")), "yarn", factor=4)
    inputs = tiny_inputs(tiny_model("llama"), length=24)
    logits = forward_logits(adapted, **inputs)
    merged = adapted.merge_and_unload()
    assert ropepatch.inspect(merged).method == "yarn"
    torch.testing.assert_close(forward_logits(merged, **inputs), logits, rtol=1e-4, atol=1e-5)
    plain = _adapted(tiny_model("llama")).merge_and_unload()
    ropepatch.unpatch(merged)
    assert torch.equal(forward_logits(merged, **inputs), forward_logits(plain, **inputs))


@pytest.mark.parametrize("compile_first", [True, False])
def test_compiled_models_follow(compile_first: bool) -> None:
    model, eager = tiny_model("llama"), tiny_model("llama")
    inputs = tiny_inputs(model, length=24)
    original = forward_logits(eager, **inputs)
    ropepatch.patch(eager, "yarn", factor=4)
    expected = forward_logits(eager, **inputs)

    torch._dynamo.reset()
    if compile_first:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        forward_logits(compiled, **inputs)
        ropepatch.patch(compiled, "yarn", factor=4)
    else:
        ropepatch.patch(model, "yarn", factor=4)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(forward_logits(compiled, **inputs), expected, rtol=1e-5, atol=1e-5)
    ropepatch.unpatch(compiled)
    torch.testing.assert_close(forward_logits(compiled, **inputs), original, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dispatch_first", [True, False])
@pytest.mark.parametrize("offload_buffers", [True, False])
def test_accelerate_offload(dispatch_first: bool, offload_buffers: bool) -> None:
    from accelerate import cpu_offload

    model, plain = tiny_model("llama"), tiny_model("llama")
    inputs = tiny_inputs(model, length=24)
    original = forward_logits(plain, **inputs)
    expected = forward_logits(ropepatch.patch(plain, "yarn", factor=4), **inputs)
    if dispatch_first:
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
        ropepatch.patch(model, "yarn", factor=4)
    else:
        ropepatch.patch(model, "yarn", factor=4)
        cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
    assert torch.equal(forward_logits(model, **inputs), expected)
    ropepatch.unpatch(model)
    assert torch.equal(forward_logits(model, **inputs), original)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = ropepatch.patch(tiny_model("llama"), "yarn", factor=4).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        inputs = tiny_inputs(model, length=24)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_generate_works_past_the_trained_length() -> None:
    model = ropepatch.patch(tiny_model("llama"), "yarn", factor=4)
    inputs = tiny_inputs(model, length=model.config.max_position_embeddings // 4 - 4)
    tokens = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    step = inputs["input_ids"]
    for _ in range(12):
        step = torch.cat([step, forward_logits(model, input_ids=step)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, step)


@pytest.mark.parametrize("method", ["yarn", "self_extend"])
def test_models_built_from_one_config_object_stay_apart(method: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    first.save_pretrained(tmp_path)  # which completes the config
    ids, before = torch.arange(60)[None], config.to_dict()
    wanted = second(ids).logits
    ropepatch.patch(first, method, factor=4)
    assert config.to_dict() == before
    assert torch.equal(second(ids).logits, wanted)
    assert ropepatch.inspect(second).trained_length == 64
    second.save_pretrained(tmp_path)
    assert "ropepatch" not in (tmp_path / "config.json").read_text()
    ropepatch.patch(second, method, factor=2)
    ropepatch.unpatch(first)
    ropepatch.unpatch(second)
    assert first.config.to_dict() == second.config.to_dict() == before
    assert torch.equal(second(ids).logits, wanted)

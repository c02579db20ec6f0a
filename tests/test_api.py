"""patch, patched, unpatch, inspect and methods as users call them, with good and bad input."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import ropepatch
from ropepatch.testing import forward_logits, tiny_inputs, tiny_model


def frozen(model: nn.Module) -> tuple[Any, ...]:
    return (
        {key: value.clone() for key, value in model.named_buffers()},
        copy.deepcopy(model.config.to_dict()),
        [sorted(vars(module)) for module in model.modules()],
    )


def unchanged(model: nn.Module, before: tuple[Any, ...]) -> bool:
    buffers, config, keys = frozen(model)
    return (
        buffers.keys() == before[0].keys()
        and all(torch.equal(buffers[key], before[0][key]) for key in buffers)
        and config == before[1]
        and keys == before[2]
    )


def test_patch_returns_the_same_model_and_the_config_tells_the_truth() -> None:
    model = tiny_model("llama")
    length = model.config.max_position_embeddings
    assert ropepatch.patch(model, "yarn", factor=4) is model
    assert model.config.max_position_embeddings == 4 * length
    assert model.config.rope_parameters["rope_type"] == "yarn"
    assert model.config.rope_parameters["factor"] == 4
    assert model.config.rope_parameters["original_max_position_embeddings"] == length
    assert ropepatch.unpatch(model) is model
    assert model.config.max_position_embeddings == length


def test_the_config_after_a_patch_builds_the_same_model() -> None:
    """What the config says, plain transformers must read to the same logits: every method, its own word or not."""
    cases: list[tuple[str, dict[str, Any]]] = [
        ("linear", {"factor": 4}),
        ("ntk", {"factor": 4}),
        ("ntk_by_parts", {"factor": 4}),
        ("yarn", {"factor": 4, "beta_fast": 16}),
        ("llama3", {"factor": 4}),
        ("abf", {"rope_theta": 1e6}),
        ("longrope", {"factor": 4, "short_factor": [1.0] * 8, "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.0]}),
        ("proportional", {"partial_rotary_factor": 0.5}),
    ]
    for method, options in cases:
        model = tiny_model("llama", head_dim=16)
        ropepatch.patch(model, method, **options)
        twin = type(model)(copy.deepcopy(model.config)).eval()
        twin.load_state_dict(model.state_dict())
        # longrope picks the long list past the trained length only, and ours is static: compare there.
        inputs = tiny_inputs(model, length=model.config.max_position_embeddings // 2 + 8)
        torch.testing.assert_close(
            forward_logits(twin, **inputs), forward_logits(model, **inputs), rtol=1e-5, atol=1e-5, msg=method
        )


def test_patched_undoes_itself_also_on_error() -> None:
    model = tiny_model("llama")
    before = frozen(model)
    with ropepatch.patched(model, "ntk", factor=8) as same:
        assert same is model and ropepatch.inspect(model).method == "ntk"
    assert unchanged(model, before)
    with pytest.raises(ZeroDivisionError), ropepatch.patched(model, "ntk", factor=8):
        1 / 0  # noqa: B018
    assert unchanged(model, before)


@pytest.mark.parametrize(
    ("method", "options", "error", "words"),
    [
        ("yran", {"factor": 4}, ropepatch.UnknownNameError, "'yarn'"),
        ("yarn", {"facto": 4}, ropepatch.OptionError, "factor"),
        ("yarn", {}, ropepatch.OptionError, "factor"),
        ("yarn", {"factor": 0}, ropepatch.OptionError, "factor"),
        ("yarn", {"factor": -2}, ropepatch.OptionError, "factor"),
        ("linear", {"factor": 0.5}, ropepatch.OptionError, "factor"),
        ("linear", {"factor": float("nan")}, ropepatch.OptionError, "factor"),
        ("linear", {"factor": float("inf")}, ropepatch.OptionError, "factor"),
        ("linear", {"factor": "four"}, ropepatch.OptionError, "factor"),
        ("linear", {"factor": 2, "original_length": 0}, ropepatch.OptionError, "original_length"),
        ("linear", {"factor": 2, "on_scaled": "both"}, ropepatch.OptionError, "multiply"),
        ("linear", {"factor": 2, "layer_types": ["full"]}, ropepatch.OptionError, "full"),
    ],
)
def test_bad_input_raises_one_clear_error_and_changes_nothing(
    method: str, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = tiny_model("llama")
    before = frozen(model)
    with pytest.raises(error, match=words):
        ropepatch.patch(model, method, **options)
    assert unchanged(model, before)


def test_second_patch_and_unpatch_of_an_unpatched_model() -> None:
    model = ropepatch.patch(tiny_model("llama"), "linear", factor=2)
    before = frozen(model)
    with pytest.raises(ropepatch.AlreadyPatchedError, match="unpatch"):
        ropepatch.patch(model, "yarn", factor=4)
    assert unchanged(model, before)
    ropepatch.unpatch(model)
    with pytest.raises(ropepatch.NotPatchedError):
        ropepatch.unpatch(model)


@pytest.mark.parametrize("family", ["mamba", "gpt2", "bloom", "opt"])
def test_a_model_without_rotary_is_refused_by_what_it_has(family: str) -> None:
    model = tiny_model(family)
    before = frozen(model)
    with pytest.raises(ropepatch.UnsupportedModelError, match=family):
        ropepatch.patch(model, "yarn", factor=4)
    assert unchanged(model, before)


@pytest.mark.parametrize("thing", [None, "llama", nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(thing: Any) -> None:
    with pytest.raises(ropepatch.UnsupportedModelError):
        ropepatch.patch(thing, "linear", factor=2)


def test_a_native_scaling_needs_a_word() -> None:
    length = tiny_model("llama").config.max_position_embeddings
    native = {
        "rope_type": "yarn",
        "factor": 2.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": length // 2,
    }
    model = tiny_model("llama", rope_parameters=native)
    before = frozen(model)
    assert ropepatch.inspect(model).native_scaling == "yarn"
    assert ropepatch.inspect(model).trained_length == length // 2
    with pytest.raises(ropepatch.AlreadyScaledError, match="replace.*multiply"):
        ropepatch.patch(model, "linear", factor=4)
    assert unchanged(model, before)

    inputs = tiny_inputs(model, length=24)
    ropepatch.patch(model, "linear", factor=4, on_scaled="replace")
    plain = tiny_model("llama", max_position_embeddings=length // 2)
    ropepatch.patch(plain, "linear", factor=4)
    assert torch.equal(forward_logits(model, **inputs), forward_logits(plain, **inputs))
    ropepatch.unpatch(model)

    ropepatch.patch(model, "linear", factor=4, on_scaled="multiply")
    rotary = model.model.rotary_emb
    # A config can say this scaling on top of that one as divisors only, which may move a frequency by its last bit.
    wanted = before[0]["model.rotary_emb.inv_freq"] / 4
    torch.testing.assert_close(rotary.inv_freq, wanted, rtol=2**-23, atol=0)
    assert rotary.attention_scaling == pytest.approx(1.0 + 0.1 * torch.log(torch.tensor(2.0)).item())
    assert model.config.max_position_embeddings == 4 * length
    ropepatch.unpatch(model)
    assert unchanged(model, before)


def test_a_native_longrope_stops_rewriting_the_frequencies() -> None:
    planes = 4
    native = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * planes,
        "long_factor": [3.0] * planes,
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    }
    model = tiny_model("llama", head_dim=2 * planes, rope_parameters=native)
    before = frozen(model)
    with pytest.raises(ropepatch.UnsupportedModelError, match="replace"):
        ropepatch.patch(model, "linear", factor=2, on_scaled="multiply")
    ropepatch.patch(model, "linear", factor=2, on_scaled="replace")
    forward_logits(model, **tiny_inputs(model, length=40))
    assert torch.equal(model.model.rotary_emb.inv_freq, 10000.0 ** -(torch.arange(planes) / planes) / 2)
    ropepatch.unpatch(model)
    assert unchanged(model, before)


def test_a_dead_rotary_module_is_found_out() -> None:
    """The failure of other patchers: a module is changed that the model never calls."""
    model = tiny_model("llama")
    live = model.model.rotary_emb

    class Frozen(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.inv_freq_kept = inner.inv_freq.clone()

        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            angles = position_ids[..., None].float() * self.inv_freq_kept
            angles = torch.cat((angles, angles), -1)
            return angles.cos(), angles.sin()

    model.model.rotary_emb = Frozen(live)
    before = frozen(model)
    with pytest.raises(ropepatch.VerificationError, match="never calls"):
        ropepatch.patch(model, "linear", factor=2)
    assert unchanged(model, before)


def test_a_module_that_does_not_read_its_frequencies_is_found_out() -> None:
    model = tiny_model("llama")
    rotary = model.model.rotary_emb
    table = rotary.inv_freq.clone()

    class Cached(type(rotary)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            angles = position_ids[..., None].float() * table
            angles = torch.cat((angles, angles), -1)
            return angles.cos(), angles.sin()

    rotary.__class__ = Cached
    before = frozen(model)
    with pytest.raises(ropepatch.VerificationError, match="does not emit"):
        ropepatch.patch(model, "linear", factor=2)
    assert unchanged(model, before)
    ropepatch.patch(model, "linear", factor=2, verify=False)


def test_verification_leaves_the_random_state_and_the_mode_alone() -> None:
    model = tiny_model("gpt_neox", hidden_dropout=0.1).train()
    torch.manual_seed(3)
    ropepatch.patch(model, "linear", factor=2)
    assert model.training
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))


def test_sliding_layers_are_left_alone_unless_named() -> None:
    model = tiny_model("gemma3_text")
    rotary = model.model.rotary_emb
    local, full = rotary.sliding_attention_inv_freq.clone(), rotary.full_attention_inv_freq.clone()
    ropepatch.patch(model, "linear", factor=4)
    assert torch.equal(rotary.sliding_attention_inv_freq, local)
    assert torch.equal(rotary.full_attention_inv_freq, full / 4)
    assert model.config.rope_parameters["sliding_attention"]["rope_type"] == "default"
    ropepatch.unpatch(model)
    ropepatch.patch(model, "linear", factor=4, layer_types=["sliding_attention", "full_attention"])
    assert torch.equal(rotary.sliding_attention_inv_freq, local / 4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gptj", "roformer", "codegen"])
@pytest.mark.parametrize("method", ["linear", "ntk", "yarn", "ntk_by_parts", "llama3", "abf"])
def test_factor_one_is_the_identity_to_the_last_bit(family: str, method: str) -> None:
    model = tiny_model(family)
    inputs = tiny_inputs(model, length=24)
    logits = forward_logits(model, **inputs)
    ropepatch.patch(model, method, factor=1)
    assert torch.equal(forward_logits(model, **inputs), logits)


@pytest.mark.parametrize("family", ["gptj", "codegen", "roformer"])
def test_tables_of_sines_grow_to_the_target_length(family: str) -> None:
    model = tiny_model(family)
    length = model.config.max_position_embeddings
    ropepatch.patch(model, "linear", factor=2)
    inputs = tiny_inputs(model, length=2 * length)
    long = forward_logits(model, **inputs)
    assert torch.isfinite(long).all()
    # An even position under factor 2 is half of it without a patch: attention only sees differences of positions.
    site = ropepatch.inspect(model).sites[0]
    table = model.get_submodule(site["path"]).__getattr__(site["name"])
    ropepatch.unpatch(model)
    before = model.get_submodule(site["path"]).__getattr__(site["name"])
    torch.testing.assert_close(table[0 : 2 * length : 2], before, atol=1e-4, rtol=0)


def test_inspect_and_methods_are_plain_data() -> None:
    model = ropepatch.patch(tiny_model("llama"), "yarn", factor=4)
    report = ropepatch.inspect(model)
    assert json.loads(json.dumps(report.to_dict()))["method"] == "yarn"
    assert "yarn (factor=4" in str(report) and "rotary_emb" in str(report)
    assert json.loads(json.dumps(ropepatch.record_of(model)))["target_length"] == report.target_length
    names = [method.name for method in ropepatch.methods()]
    assert names == sorted(names) and {"linear", "yarn", "ntk"} <= set(names)
    for method in ropepatch.methods():
        assert method.summary and method.paper and method.seam in ("frequencies", "attention", "embeddings")
        assert all(option["help"] for option in method.options), method.name

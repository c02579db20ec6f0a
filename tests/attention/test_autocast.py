"""The attention seam under autocast: float32 weights computing in bfloat16, as training does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ropepatch
from ropepatch.testing import tiny_model

IDS = torch.randint(5, 120, (2, 100), generator=torch.Generator().manual_seed(0))

# One that turns, one of several segments, one with slopes, one with a general bias.
METHODS: dict[str, dict[str, Any]] = {
    "dynamic_ntk": {"factor": 2, "step": 16},
    "self_extend": {"window": 16, "factor": 3},
    "alibi": {},
    "kerple": {},
}


def loss_and_gradients(model: Any, autocast: bool, **inputs: Any) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss: Tensor = model(IDS, labels=IDS, use_cache=False, **inputs).loss
    loss.backward()
    return loss.detach(), [value.grad.clone() for value in model.parameters()]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("method", METHODS)
def test_training_in_bfloat16_follows_float32(method: str, family: str) -> None:
    model = ropepatch.patch(tiny_model(family), method, **METHODS[method]).train()
    wanted, exact = loss_and_gradients(model, autocast=False)
    got, rounded = loss_and_gradients(model, autocast=True)
    assert abs(float(got - wanted)) < 2e-2 * float(wanted)
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        assert float((ours - theirs).norm()) < 0.1 * float(theirs.norm())


def test_activation_checkpointing_makes_the_same_gradients_again() -> None:
    model = ropepatch.patch(tiny_model("llama"), "kerple").train()
    _, wanted = loss_and_gradients(model, autocast=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, got = loss_and_gradients(model, autocast=True)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_can_be_patched_under_autocast() -> None:
    one, other = tiny_model("llama"), ropepatch.patch(tiny_model("llama"), "self_extend", window=16, factor=3)
    with torch.autocast("cpu", torch.bfloat16):
        ropepatch.patch(one, "self_extend", window=16, factor=3)
    with torch.no_grad():
        assert torch.equal(one(IDS).logits, other(IDS).logits)


def test_a_cache_filled_under_autocast_goes_on() -> None:
    model = ropepatch.patch(tiny_model("llama"), "self_extend", window=16, factor=3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(IDS).logits
        cache = model(IDS[:, :60], use_cache=True).past_key_values
        rest = model(IDS[:, 60:], past_key_values=cache).logits
    assert float((whole[:, 60:] - rest).abs().max()) < 5e-2 * float(whole.abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_looser_families_can_be_patched_under_autocast(family: str) -> None:
    model = tiny_model(family)
    with torch.autocast("cpu", torch.bfloat16):
        ropepatch.patch(model, "rerope", window=8)
    assert ropepatch.inspect(model).method == "rerope"

"""Stages: which leg a step belongs to, and a live patched model that changes its options at the border of two."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ropepatch
from ropepatch.errors import NotPatchedError, OptionError
from ropepatch.testing import tiny_model
from ropepatch.training.positions import training_attention
from ropepatch.training.recipe import PatchSection, Recipe
from ropepatch.training.stages import Schedule, apply_patch, repatch


def recipe(*, patch: dict[str, Any] | None = None, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "x"},
            "patch": patch,
            "data": {"length": 16, "sources": [{"kind": "files", "path": "x"}], "isolate_documents": True},
            "train": {"batch_size": 4, **train},
        }
    )


YARN = {"method": "yarn", "options": {"factor": 2.0, "beta_fast": 16.0}}


def test_without_stages_a_run_is_one_leg() -> None:
    plan = Schedule.of(recipe(patch=YARN, max_steps=7))
    assert (plan.steps, plan.rows, len(plan.legs)) == (7, 28, 1)
    assert plan.stage_at(0).length == 16
    assert plan.options_at(6) == YARN["options"]
    assert Schedule.of(recipe(max_steps=7)).options_at(0) is None


def test_a_progressive_schedule() -> None:
    stages = [
        {"steps": 3, "length": 4096, "options": {"factor": 2.0}},
        {"steps": 1, "length": 8192},
        {"steps": 2, "length": 16384, "options": {"factor": 8.0, "beta_fast": None}},
    ]
    plan = Schedule.of(recipe(patch=YARN, stages=stages))
    assert [plan.stage_at(step).length for step in range(7)] == [4096] * 3 + [8192] + [16384] * 3
    assert [(leg.start, leg.stop) for leg in plan.legs] == [(0, 3), (3, 4), (4, 6)]
    assert plan.options_at(2) == {"factor": 2.0, "beta_fast": 16.0}
    # A stage that says nothing goes back to the section's own.
    assert plan.options_at(3) == YARN["options"]
    assert plan.options_at(4) == {"factor": 8.0}


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=5))
def test_rows_and_steps_agree(stages: list[tuple[int, int]]) -> None:
    plan = Schedule.of(recipe(stages=[{"steps": steps, "length": length} for steps, length in stages]))
    expected = [number for number, (steps, _) in enumerate(stages) for _ in range(steps)]
    assert [plan.stage_at(step).number for step in range(plan.steps)] == expected
    assert [plan.number_of_row(index) for index in range(plan.rows)] == [n for n in expected for _ in range(4)]


@pytest.mark.parametrize(
    ("train", "named"),
    [
        ({}, "max_steps"),
        ({"stages": []}, "empty"),
        ({"max_steps": 5, "stages": [{"steps": 4, "length": 8}]}, "sum"),
        ({"stages": [{"steps": 4, "length": 8, "options": {"factor": 2.0}}]}, "has none"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(train: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError, match=named):
        Schedule.of(recipe(**train))


def test_steps_are_counted_from_zero() -> None:
    with pytest.raises(OptionError, match="from 0"):
        Schedule.of(recipe(max_steps=2)).stage_at(-1)


# -- on a live model

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "yarn": ({"factor": 2.0}, {"factor": 4.0}),
    "abf": ({"rope_theta": 50_000.0}, {"rope_theta": 400_000.0}),
    "linear": ({"factor": 2.0}, {"factor": 8.0}),
    "self_extend": ({"factor": 2, "window": 16}, {"factor": 6, "window": 8}),
    "dynamic_ntk": ({"factor": 2.0, "step": 16}, {"factor": 4.0, "step": 8}),
    "alibi": ({"factor": 1.0}, {"factor": 4.0}),
}
IDS = torch.randint(5, 120, (2, 100), generator=torch.Generator().manual_seed(3))


def adapted(method: str, options: dict[str, Any], *, lora_first: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model

    def wrap(model: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["norm"])
            return get_peft_model(model, config)

    model = tiny_model("llama", hidden_size=32, num_attention_heads=4)
    if lora_first:
        model = wrap(model)
        apply_patch(model, PatchSection(method=method), options)
        return model
    apply_patch(model, PatchSection(method=method), options)
    return wrap(model)


def trainable(model: Any) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def step(model: Any, optimizer: torch.optim.Optimizer) -> float:
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(IDS).logits
    return output


@pytest.mark.parametrize("method", CASES)
def test_a_live_model_goes_on_as_a_fresh_one_would(method: str) -> None:
    """To the bit: parameters, optimizer state and the steps after the border are those of a model that was patched with
    the new options in the first place, and got the trained values and the optimizer's state."""
    old, new = CASES[method]
    model, fresh = adapted(method, old), adapted(method, new)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for _ in range(2):
        step(model, optimizer)
    objects, values = trainable(model), {name: value.clone() for name, value in trainable(model).items()}
    before = logits(model)

    assert repatch(model, PatchSection(method=method), new)
    assert all(value is objects[name] for name, value in trainable(model).items())
    assert all(torch.equal(value, values[name]) for name, value in trainable(model).items())
    assert not torch.equal(logits(model), before)

    fresh.load_state_dict(model.state_dict())
    other = torch.optim.AdamW(trainable(fresh).values(), lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(logits(model), logits(fresh))
    for _ in range(2):
        assert step(model, optimizer) == step(fresh, other)
    ours, theirs = trainable(model), trainable(fresh)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert ropepatch.inspect(model).to_dict() == ropepatch.inspect(fresh).to_dict()
    ropepatch.unpatch(model)
    ropepatch.unpatch(fresh)
    assert torch.equal(logits(model), logits(fresh))


def test_the_order_of_patch_and_adapter_does_not_matter() -> None:
    old, new = CASES["yarn"]
    one, other = adapted("yarn", old), adapted("yarn", old, lora_first=True)
    for model in (one, other):
        repatch(model, PatchSection(method="yarn"), new)
    assert torch.equal(logits(one), logits(other))


def test_it_may_happen_while_attention_is_prepared() -> None:
    """Plain attention through the seam's kernels, for isolated documents, stays so across the border."""
    old, new = CASES["yarn"]
    model, documents = adapted("yarn", old), torch.tensor([[1] * 40 + [2] * 60] * 2)
    positions = torch.cat((torch.arange(40), torch.arange(60)))[None].expand(2, -1)
    with training_attention(model, recipe(max_steps=1)), torch.no_grad():
        repatch(model, PatchSection(method="yarn"), new)
        got = model(IDS, attention_mask=documents, position_ids=positions).logits
    fresh = adapted("yarn", new)
    assert torch.equal(logits(model), logits(fresh))
    with training_attention(fresh, recipe(max_steps=1)), torch.no_grad():
        assert torch.equal(got, fresh(IDS, attention_mask=documents, position_ids=positions).logits)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_it_may_happen_under_autocast(family: str) -> None:
    """What float32 weights are held to would refuse the rounding of bfloat16."""
    section = PatchSection(method="self_extend")
    model, fresh = tiny_model(family), tiny_model(family)
    apply_patch(fresh, section, {"factor": 4, "window": 8})
    with torch.autocast("cpu", torch.bfloat16):
        apply_patch(model, section, {"factor": 2, "window": 8})
        repatch(model, section, {"factor": 4, "window": 8})
        with training_attention(model, recipe(max_steps=1)):
            pass
    ropepatch.unpatch(fresh)
    with torch.autocast("cpu", torch.bfloat16), training_attention(fresh, recipe(max_steps=1)):
        pass
    repatched = logits(model)
    apply_patch(fresh, section, {"factor": 4, "window": 8})
    assert torch.equal(repatched, logits(fresh))


def test_options_in_force_are_left_alone() -> None:
    model = adapted("yarn", {"factor": 2.0})
    record = ropepatch.api.record_of(model)
    # Spelled out or not, they are the same options.
    assert not repatch(model, PatchSection(method="yarn"), {"factor": 2.0, "beta_fast": 32.0})
    assert ropepatch.api.record_of(model) == record


def test_the_section_is_kept() -> None:
    section = PatchSection(method="self_extend", original_length=32, layers=[1], base={"method": "ntk", "factor": 2})
    model, fresh = (tiny_model("llama") for _ in range(2))
    apply_patch(model, section, {"factor": 2, "window": 8})
    repatch(model, section, {"factor": 3, "window": 8})
    apply_patch(fresh, section, {"factor": 3, "window": 8})
    assert torch.equal(logits(model), logits(fresh))
    assert ropepatch.api.record_of(model) == ropepatch.api.record_of(fresh)


def test_what_a_method_has_learned_is_not_thrown_away() -> None:
    section = PatchSection(method="t5_bias")
    model = tiny_model("llama")
    apply_patch(model, section, {"max_distance": 32})
    before = logits(model)
    with pytest.raises(OptionError, match="learns parameters"):
        repatch(model, section, {"max_distance": 64})
    assert torch.equal(logits(model), before)
    assert not repatch(model, section, {"max_distance": 32})


@pytest.mark.parametrize("options", [{"factor": 0.5}, {"fctor": 2.0}, {"window": 4096, "factor": 2}])
def test_after_a_refusal_the_model_is_patched_as_before(options: dict[str, Any]) -> None:
    section = PatchSection(method="self_extend")
    model = tiny_model("llama")
    apply_patch(model, section, {"factor": 2, "window": 16})
    before, record = logits(model), ropepatch.api.record_of(model)
    with pytest.raises(OptionError):
        repatch(model, section, options)
    assert torch.equal(logits(model), before)
    assert ropepatch.api.record_of(model) == record


def test_a_model_that_is_not_patched() -> None:
    with pytest.raises(NotPatchedError):
        repatch(tiny_model("llama"), PatchSection(method="yarn"), {"factor": 2.0})

"""Shifted groups, held against a mask for each head, and the oracle of the attention seam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ropepatch
from ropepatch.attention import reference
from ropepatch.attention.layer import Layer
from ropepatch.attention.scheme import unrotated
from ropepatch.attention.visibility import INVISIBLE, Visibility
from ropepatch.errors import OptionError, UnsupportedModelError
from ropepatch.methods.alibi import AlibiBias, alibi_slopes
from ropepatch.testing import tiny_model
from ropepatch.training.positions import Collator, training_attention
from ropepatch.training.recipe import PatchSection, Recipe
from ropepatch.training.shifted import ShiftedGroups
from ropepatch.training.stages import apply_patch, repatch

VOCABULARY = 128


def visible(length: int, group: int, shifted: bool, documents: list[int] | None = None) -> Tensor:
    """Pairs by their definition, one after the other, bool [T, T]."""
    seen = torch.zeros(length, length, dtype=torch.bool)

    def number(token: int) -> int:
        if not shifted:
            return token // group
        return 0 if token < group // 2 else 1 + (token - group // 2) // group

    for query in range(length):
        for key in range(query + 1):
            same = documents is None or documents[query] == documents[key]
            seen[query, key] = number(query) == number(key) and same
    return seen


def visibility(length: int, documents: list[int] | None = None) -> Visibility:
    slots = torch.arange(length)
    numbers = torch.tensor([documents]) if documents is not None else None
    return Visibility(slots[None], slots[None], slots, slots, numbers, numbers)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@settings(max_examples=50)
@given(
    length=st.integers(1, 40),
    group=st.integers(2, 48),
    heads=st.sampled_from([(2, 1), (4, 2), (4, 4), (3, 1), (9, 3), (6, 2)]),
    cut=st.integers(0, 40),
    kind=st.sampled_from(["plain", "slopes", "sinks", "softcap", "bias"]),
)
def test_each_head_sees_its_groups(length: int, group: int, heads: tuple[int, int], cut: int, kind: str) -> None:
    count, key_heads = heads
    documents = [int(token >= cut) for token in range(length)] if 0 < cut < length else None
    q, k, v = draw(1, count, length, 8), draw(1, key_heads, length, 8), draw(1, key_heads, length, 8)
    bias: Any = AlibiBias(alibi_slopes(count)) if kind == "slopes" else _Learned() if kind == "bias" else None
    layer = Layer(
        unrotated(bias),
        0.3,
        softcap=2.0 if kind == "softcap" else None,
        sinks=draw(count) if kind == "sinks" else None,
        learned=draw(count) if kind == "bias" else None,
    )
    got = ShiftedGroups(group)(q, k, v, layer, visibility(length, documents))
    for head in range(count):
        own = head // (count // key_heads)
        wanted = reference.attend(
            q[0, head : head + 1],
            k[0, own : own + 1],
            v[0, own : own + 1],
            unrotated(_OneHead(bias, head) if bias is not None else None),
            q_positions=torch.arange(length),
            k_positions=torch.arange(length),
            visible=visible(length, group, head >= count // 2, documents),
            scaling=0.3,
            softcap=layer.softcap,
            sinks=layer.sinks[head : head + 1] if layer.sinks is not None else None,
            module=layer.learned,
        )
        torch.testing.assert_close(got[0, head].double(), wanted[0], rtol=1e-4, atol=1e-5)


class _Learned:
    """A bias that is no slope: the head's own number x the root of the distance."""

    slopes = None

    def __call__(self, q_positions: Tensor, k_positions: Tensor, module: Any) -> Tensor:
        distance = (q_positions[:, :, None] - k_positions[:, None, :]).clamp(min=0).float().sqrt()
        return -module[:, None, None].abs() * distance[:, None]


class _OneHead:
    slopes = None

    def __init__(self, whole: Any, head: int) -> None:
        self.whole, self.head = whole, head

    def __call__(self, q_positions: Tensor, k_positions: Tensor, module: Any) -> Tensor:
        bias: Tensor = self.whole(q_positions, k_positions, module)
        return bias[:, self.head : self.head + 1]


def test_padding_stays_unseen() -> None:
    q, k, v = draw(1, 2, 6, 8), draw(1, 2, 6, 8), draw(1, 2, 6, 8)
    layer = Layer(unrotated(), 0.3)
    padded = visibility(6, [0, 0, 0, 0, INVISIBLE, INVISIBLE])
    got = ShiftedGroups(4)(q, k, v, layer, padded)
    wanted = ShiftedGroups(4)(q[:, :, :4], k[:, :, :4], v[:, :, :4], layer, visibility(4))
    torch.testing.assert_close(got[:, :, :4], wanted)
    assert bool((got[:, :, 4:] == 0).all())


def test_the_first_half_group_sees_nothing_of_the_end() -> None:
    """The published form wraps around: shifted, the last half group and the first one are one group."""
    q, k, v = draw(1, 2, 16, 8), draw(1, 2, 16, 8), draw(1, 2, 16, 8)
    layer = Layer(unrotated(), 0.3)
    before = ShiftedGroups(8)(q, k, v, layer, visibility(16))
    after = ShiftedGroups(8)(q, k + (torch.arange(16) >= 12)[:, None], v, layer, visibility(16))
    assert torch.equal(before[:, :, :12], after[:, :, :12])
    assert not torch.equal(before[:, :, 12:], after[:, :, 12:])


# -- in models


def recipe(group: int, **data: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "x"},
            "data": {"length": 32, "sources": [{"kind": "files", "path": "x"}], **data},
            "train": {"max_steps": 1, "batch_size": 1, "shifted_groups": {"group": group}},
        }
    )


def batch_of(asked: Recipe, numbered: bool, documents: list[int]) -> dict[str, Tensor]:
    ids = torch.randint(5, VOCABULARY - 8, (len(documents),), generator=torch.Generator().manual_seed(1)).tolist()
    collate = Collator(asked, numbered=numbered)
    return collate([{"input_ids": ids, "labels": ids, "documents": documents, "index": 0}])


def with_a_mask_for_each_head(model: Any, batch: dict[str, Tensor], group: int, documents: list[int] | None) -> Any:
    heads = model.config.num_attention_heads
    length = batch["input_ids"].shape[1]
    masks = [visible(length, group, head >= heads // 2, documents) for head in range(heads)]
    return model(
        batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=torch.stack(masks)[None],
        labels=batch["labels"],
        use_cache=False,
    )


METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "yarn": {"factor": 4},
    "self_extend": {"window": 8, "factor": 4},
    "dynamic_ntk": {"factor": 2, "step": 8},
    "alibi": {},
    "kerple": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_model_trains_with_groups(method: str) -> None:
    """Logits and gradients are those of the same model with a quadratic mask for each head."""
    model, options = tiny_model("llama", max_position_embeddings=16), METHODS[method]
    if options is not None:
        ropepatch.patch(model, method, **options)
    model.train()
    asked, wanted, got = recipe(12), {}, {}
    with training_attention(model, asked) as numbered:
        batch = batch_of(asked, numbered, [1] * 32)
        output = model(**batch, use_cache=False)
        output.loss.backward()
        got = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    oracle = with_a_mask_for_each_head(model, batch, 12, None)
    oracle.loss.backward()
    wanted = {name: value.grad.clone() for name, value in model.named_parameters()}
    torch.testing.assert_close(output.logits, oracle.logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(**batch, use_cache=False).logits, output.logits, atol=1e-2)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_groups_within_isolated_documents() -> None:
    model, documents = tiny_model("llama", max_position_embeddings=32), [1] * 14 + [2] * 18
    asked = recipe(12, isolate_documents=True)
    with training_attention(model, asked) as numbered, torch.no_grad():
        batch = batch_of(asked, numbered, documents)
        got = model(**batch).logits
    with torch.no_grad():
        wanted = with_a_mask_for_each_head(model, batch, 12, documents).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_a_stage_may_begin_meanwhile() -> None:
    """Another patch in force within the block is trained with groups as well."""
    section, asked = PatchSection(method="self_extend"), recipe(12)
    model, fresh = (tiny_model("llama", max_position_embeddings=16) for _ in range(2))
    apply_patch(model, section, {"factor": 2, "window": 8})
    apply_patch(fresh, section, {"factor": 4, "window": 8})
    with training_attention(model, asked) as numbered, torch.no_grad():
        batch = batch_of(asked, numbered, [1] * 32)
        repatch(model, section, {"factor": 4, "window": 8})
        got = model(**batch).logits
    with torch.no_grad():
        wanted = with_a_mask_for_each_head(fresh, batch, 12, None).logits
        assert torch.equal(model(**batch).logits, fresh(**batch).logits)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_layers_share_what_a_call_works_out() -> None:
    """Plans are made once a call and group, not once a layer: four groups, and five of the shifted."""
    made: list[int] = []
    from ropepatch.attention import plan

    model, asked = tiny_model("llama", num_hidden_layers=4), recipe(8)
    original = plan._blocks

    def counted(*args: Any) -> Any:
        made.append(1)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch, training_attention(model, asked) as numbered:
        patch.setattr(plan, "_blocks", counted)
        model(**batch_of(asked, numbered, [1] * 32), use_cache=False)
    assert len(made) == 4 + 5


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(OptionError, match="half"):
        ShiftedGroups(1)
    one = draw(1, 1, 4, 8)
    with pytest.raises(UnsupportedModelError, match="one head"):
        ShiftedGroups(4)(one, one, one, Layer(unrotated(), 0.3), visibility(4))
    model, asked = tiny_model("llama"), recipe(8)
    with training_attention(model, asked), torch.no_grad():
        cache = model(torch.arange(5, 15)[None], use_cache=True).past_key_values
        with pytest.raises(UnsupportedModelError, match="without a cache"):
            model(torch.arange(5, 7)[None], past_key_values=cache)

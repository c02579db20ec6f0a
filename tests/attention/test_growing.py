"""A growing layer holds what transformers' own holds, whatever is done to it, and copies only when it is full."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

import ropepatch
from ropepatch.attention.growing import growing_layer
from ropepatch.testing import tiny_model

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), st.integers(1, 400)),
        st.tuples(st.just("cut"), st.integers(1, 300)),
        st.tuples(st.just("rows"), st.permutations([0, 1])),
        st.tuples(st.just("reset"), st.none()),
    ),
    min_size=1,
    max_size=12,
)


@given(STEPS, st.integers(0, 2**16))
def test_holds_what_a_dynamic_layer_holds(steps: list[tuple[str, Any]], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    ours, theirs = growing_layer(), DynamicLayer()
    for what, number in steps:
        if what == "read":
            keys, values = (torch.randn(2, 1, number, width, generator=random) for width in (3, 2))
            found, wanted = ours.update(keys, values), theirs.update(keys, values)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        elif what == "cut":
            if number < theirs.get_seq_length():
                ours.crop(-number), theirs.crop(-number)
        elif what == "rows":
            ours.reorder_cache(torch.tensor(number)), theirs.reorder_cache(torch.tensor(number))
        else:
            ours.reset(), theirs.reset()
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(5) == theirs.get_mask_sizes(5)
        if theirs.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


def test_single_tokens_are_written_in_place() -> None:
    layer = growing_layer()
    layer.update(torch.zeros(1, 1, 100, 4), torch.zeros(1, 1, 100, 4))
    begun = layer.keys.data_ptr()
    for number in range(200):
        layer.update(*[torch.full((1, 1, 1, 4), float(number))] * 2)
        assert layer.keys.data_ptr() == begun
    assert layer.keys[0, 0, 100:, 0].tolist() == list(range(200))


@pytest.mark.parametrize(("method", "options"), [("self_extend", {"factor": 2}), ("dca", {}), ("dynamic_ntk", {})])
@torch.no_grad()
def test_rotated_keys_beside_it_follow_what_is_cut_and_written_over(method: str, options: dict[str, Any]) -> None:
    """Methods of the attention seam keep rotated keys beside a cache; those of tokens that were cut off must go."""
    model = ropepatch.patch(tiny_model("llama"), method, original_length=64, **options)
    random = torch.Generator().manual_seed(0)
    ids, other = (torch.randint(10, 100, (1, 120), generator=random) for _ in range(2))
    cache = DynamicCache(config=model.config)
    cache.layers = [growing_layer() for _ in cache.layers]

    def read(tokens: Tensor) -> Tensor:
        parts = [model(part, past_key_values=cache).logits for part in tokens.split(1, dim=1)]
        return torch.cat(parts, dim=1)

    model(ids[:, :80], past_key_values=cache)
    read(ids[:, 80:])
    assert cache.ropepatch_notes.memos
    # Token by token over what was cut off, and then a longer call over it.
    cache.crop(-60)
    wanted = model(torch.cat((ids[:, :60], other[:, 60:]), dim=1)).logits
    torch.testing.assert_close(read(other[:, 60:]), wanted[:, 60:], rtol=0, atol=1e-4)
    cache.crop(-50)
    found = model(ids[:, 70:], past_key_values=cache).logits
    wanted = model(torch.cat((ids[:, :60], other[:, 60:70], ids[:, 70:]), dim=1)).logits
    torch.testing.assert_close(found, wanted[:, 70:], rtol=0, atol=1e-4)
    torch.testing.assert_close(
        read(other[:, :5]),
        model(torch.cat((ids[:, :60], other[:, 60:70], ids[:, 70:], other[:, :5]), dim=1)).logits[:, -5:],
        rtol=0,
        atol=1e-4,
    )

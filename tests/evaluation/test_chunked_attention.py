"""The two-part attention against one masked softmax, and against transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import model
from transformers import DynamicCache

from ropepatch.evaluation.chunked_attention import NAME, chunked_attention, past_and_own


@given(
    n=st.integers(1, 70),
    past=st.integers(1, 90),
    key_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    dim=st.sampled_from([2, 8, 20, 64]),
    batch=st.integers(1, 2),
    scale=st.none() | st.floats(0.01, 2),
)
@settings(max_examples=60)
def test_equals_a_masked_softmax(
    n: int, past: int, key_heads: int, group: int, dim: int, batch: int, scale: float | None
) -> None:
    torch.manual_seed(n * 100 + past)
    query = torch.randn(batch, key_heads * group, n, dim)
    key, value = (torch.randn(batch, key_heads, past + n, dim) for _ in range(2))
    found = past_and_own(query, key, value, scale=scale)
    q, k, v = query.double(), *(t.double().repeat_interleave(group, 1) for t in (key, value))
    scores = q @ k.mT * (dim**-0.5 if scale is None else scale)
    hidden = torch.ones(n, past + n).triu(past + 1).bool()
    expected = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=1e-4)


def test_bfloat16_is_off_by_rounding_only() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, n, 32).bfloat16() for n in (64, 200, 200))
    mask = torch.ones(64, 200).tril(136).bool()
    exact = torch.nn.functional.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask)
    found = past_and_own(query, key, value)
    assert found.dtype == torch.bfloat16
    # Two roundings of outputs, each by at most half of 2^-7 of the largest value.
    assert (found.float() - exact).abs().max() <= 2**-7 * value.float().abs().max()


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_chunks_give_the_same_logits(kind: str) -> None:
    net = model(kind)
    ids = torch.randint(5, 500, (1, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = net(ids).logits
        with chunked_attention(net) as selected:
            assert selected
            cache = DynamicCache()
            parts = [
                net(part, past_key_values=cache, use_cache=True).logits for part in ids.split([30, 41, 1, 18], dim=1)
            ]
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-4, rtol=1e-4)


def test_padding_still_counts() -> None:
    """The mask is left out only where it says nothing."""
    net = model("llama")
    ids = torch.randint(5, 500, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        expected = net(ids, attention_mask=mask).logits
        with chunked_attention(net):
            found = net(ids, attention_mask=mask).logits
    torch.testing.assert_close(found, expected)


def test_one_model_only_and_put_back_after_an_error() -> None:
    net, other = model("llama"), model("llama")
    before = copy.deepcopy(vars(net.config))

    def fail() -> None:
        with chunked_attention(net):
            assert net.config._attn_implementation == NAME
            assert other.config._attn_implementation == "sdpa"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert vars(net.config) == before


def test_other_attention_is_left_alone() -> None:
    net = model("llama", attn_implementation="eager")
    with chunked_attention(net) as selected:
        assert not selected
        assert net.config._attn_implementation == "eager"

"""Encoders: keys after the query count too. Both kernels against the pair-by-pair oracle, and the biases' forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from ropepatch.attention import blocks, chunked, flex, reference
from ropepatch.attention.layer import Layer
from ropepatch.attention.rotation import Layout
from ropepatch.attention.scheme import Rotary, Scheme, rotated, unrotated
from ropepatch.attention.visibility import Visibility
from ropepatch.errors import OptionError, UnsupportedModelError
from ropepatch.methods._attention import LayerGeometry
from ropepatch.methods._base import METHODS
from ropepatch.methods._options import parse_options

HEADS, KEY_HEADS, DIM = 4, 2, 16
LAYER = LayerGeometry(64, HEADS, DIM, both_ways=True)


def built(name: str, **options: Any) -> tuple[Scheme, Any]:
    entry: Any = METHODS.get(name)
    parsed = parse_options(entry, options)
    return entry.build(LAYER, parsed), entry.learned(LAYER, parsed) if entry.learned else None


SCHEMES: dict[str, Any] = {
    "rotated": lambda: (rotated(Rotary(0.5 ** torch.arange(4.0)), both_ways=True), None),
    "unrotated": lambda: (unrotated(both_ways=True), None),
    "alibi": lambda: built("alibi"),
    "kerple": lambda: built("kerple"),
    "t5_bias": lambda: built("t5_bias", buckets=8, max_distance=40),
    "sandwich": lambda: built("sandwich", bar_d=16),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "BLOCK", 24)
    monkeypatch.setattr(blocks, "BLOCK", 20)
    monkeypatch.setattr("ropepatch.attention.plan._NARROW", 8)


def tokens(left: int = 0, right: int = 0, length: int = 90, documents: bool = False) -> Visibility:
    """Two rows: one with padding on its sides, one without (of three documents, when asked)."""
    slots = torch.arange(length)
    numbers = torch.zeros(2, length, dtype=torch.long)
    numbers[0, :left] = numbers[0, length - right :] = -1
    if documents:
        numbers[1] = torch.repeat_interleave(torch.arange(3), torch.tensor([40, 1, length - 41]))
    starts = torch.where(torch.nn.functional.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True), slots, 0)
    positions = slots - starts.cummax(1).values
    if not (left or right or documents):
        return Visibility(slots[None], slots[None], slots, slots, causal=False)
    return Visibility(positions, positions, slots, slots, numbers, numbers, causal=False)


def heads(length: int = 90) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, HEADS, length, DIM, generator=generator)
    return q, *(torch.randn(2, KEY_HEADS, length, DIM, generator=generator) for _ in "kv")


def oracle(q: Tensor, k: Tensor, v: Tensor, layer: Layer, seen: Visibility) -> Tensor:
    """What each token sees is written out here: its own document, all of it."""
    length = q.shape[2]
    documents = seen.q_documents if seen.q_documents is not None else torch.zeros(2, length, dtype=torch.long)
    rows = []
    for row in range(2):
        visible = (documents[row][:, None] == documents[row][None]) & (documents[row] >= 0)
        positions = seen.q_positions.expand(2, -1)[row]
        rows.append(
            reference.attend(
                q[row],
                k[row].repeat_interleave(HEADS // KEY_HEADS, 0),
                v[row].repeat_interleave(HEADS // KEY_HEADS, 0),
                layer.scheme,
                q_positions=positions,
                k_positions=positions,
                rotary=layer.rotary,
                layout=layer.layout,
                visible=visible,
                causal=False,
                scaling=layer.scaling,
                module=layer.learned,
            )
        )
    return torch.stack(rows)


def layer_of(name: str) -> Layer:
    scheme, learned = SCHEMES[name]()
    return Layer(scheme, DIM**-0.5, None, Layout(0, 8), learned=learned)


def test_the_oracle_is_plain_attention_where_nothing_hides() -> None:
    q, k, v = heads()
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    wanted = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    scheme, positions = unrotated(both_ways=True), torch.arange(90)
    got = reference.attend(q[0], k[0], v[0], scheme, q_positions=positions, k_positions=positions, causal=False)
    torch.testing.assert_close(got, wanted[0])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(
    "words", [{}, {"left": 30}, {"right": 30}, {"left": 7, "right": 11}, {"documents": True, "left": 5}]
)
def test_forward_and_backward(name: str, words: dict[str, Any]) -> None:
    layer, seen = layer_of(name), tokens(**words)
    wanted_inputs = [x.clone().requires_grad_() for x in heads()]
    wanted = oracle(*wanted_inputs, layer, seen)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    (wanted * weights).sum().backward()
    expected = [wanted.detach(), *(x.grad for x in wanted_inputs)]
    kernels = [blocks.attend] if layer.scheme.bias is not None else [chunked.attend, blocks.attend]
    for attend in kernels:
        inputs = [x.clone().requires_grad_() for x in heads()]
        got = attend(*inputs, layer, seen)
        (got * weights).sum().backward()
        for mine, theirs in zip([got, *(x.grad for x in inputs)], expected, strict=True):
            assert float((mine.detach().double() - theirs).abs().max() / theirs.abs().max()) < 3e-6


@pytest.mark.parametrize("name", ["rotated", "unrotated"])
def test_the_fused_path(name: str) -> None:
    layer, seen = layer_of(name), tokens(left=20)
    got = flex.attend(*heads(), layer, seen, kernel=flex_attention)
    assert got is not None
    assert float((got.double() - oracle(*heads(), layer, seen)).abs().max()) < 1e-5


def test_no_pair_needs_a_look_where_nothing_hides() -> None:
    """One rectangle without a mask a block: memory stays linear."""
    from ropepatch.attention.plan import make_plan

    scheme = rotated(Rotary(torch.ones(4)), both_ways=True)
    for block in make_plan(tokens(), scheme, 24):
        (task,) = block.tasks
        assert (task.start, task.stop, task.lows, task.causal, task.irregular) == (0, 90, None, False, False)


def test_t5_counts_as_its_encoder_does() -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    module = built("t5_bias", buckets=12, max_distance=50)[1]
    positions = torch.arange(130)[None]
    distance = positions[0][None] - positions[0][:, None]
    rows = T5Attention._relative_position_bucket(distance, bidirectional=True, num_buckets=12, max_distance=50)
    assert module(positions, positions)[0].equal(module.table[rows].permute(2, 0, 1))


@pytest.mark.parametrize("name", ["alibi", "kerple", "sandwich"])
def test_these_do_not_tell_left_from_right(name: str) -> None:
    scheme, module = built(name)
    positions = torch.arange(50)[None]
    bias = scheme.bias(positions, positions, module)[0]
    torch.testing.assert_close(bias, bias.transpose(1, 2), rtol=0, atol=1e-4)
    assert bool((bias[:, 0, 1:] < bias[:, 0, :1]).all())


def test_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="look ahead"):
        built("fire")
    with pytest.raises(OptionError, match="either way"):
        built("t5_bias", buckets=2)
    with pytest.raises(OptionError, match="in an encoder"):
        built("alibi", logn=True)

"""Relative biases: distances are scaled before they are looked up, and nothing else about the model changes."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from transformers import DebertaV2Config, DebertaV2ForMaskedLM

import ropepatch
from ropepatch.errors import OptionError, UnsupportedModelError, VerificationError
from ropepatch.testing import tiny_model

T5_LIKE = ("t5", "mt5", "umt5", "switch_transformers")


def build(kind: str) -> Any:
    if kind in ("xlnet", "cpmant"):
        return tiny_model(kind)
    if kind == "deberta-v2":
        torch.manual_seed(0)
        # Buckets are no field of the config's class: as published checkpoints do, they are given beside it.
        config = DebertaV2Config(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            relative_attention=True,
            position_biased_input=False,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            max_relative_positions=32,
        )
        return DebertaV2ForMaskedLM(config).eval()
    return tiny_model(kind, "encoder-decoder")


def inputs(model: Any, length: int = 40) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 60, (2, length), generator=generator)
    if model.config.is_encoder_decoder:
        return {"input_ids": ids, "decoder_input_ids": ids[:, : length // 2].flip(0)}
    return {"input_ids": ids}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**inputs(model))[0]


def t5_bucket(distance: int, buckets: int, largest: float, *, both_ways: bool) -> int:
    """The law of T5's paper and code for one distance (key less query), in plain arithmetic."""
    offset = 0
    if both_ways:
        buckets //= 2
        offset = buckets if distance > 0 else 0
        distance = abs(distance)
    else:
        distance = max(0, -distance)
    exact = buckets // 2
    if distance < exact:
        return offset + distance
    # float32, as the model computes it: at a bucket's edge the last bit decides.
    ratio = torch.log(torch.tensor(float(distance)) / exact) / math.log(largest / exact) * (buckets - exact)
    return offset + min(buckets - 1, exact + int(ratio))


@torch.no_grad()
@pytest.mark.parametrize("kind", T5_LIKE)
@pytest.mark.parametrize(("method", "factor"), [("linear", 4), ("linear", 2.5), ("log_buckets", 4)])
def test_the_bias_of_a_pair_is_that_of_its_scaled_distance(kind: str, method: str, factor: float) -> None:
    model = ropepatch.patch(build(kind), method, factor=factor)
    for stack, both_ways in ((model.encoder, True), (model.decoder, False)):
        attention = stack.block[0].layer[0].SelfAttention
        table = attention.relative_attention_bias.weight
        found = attention.compute_bias(60, 60)[0]
        largest = model.config.relative_attention_max_distance
        for i in range(0, 60, 7):
            for j in range(60):
                distance, reach = j - i, largest
                if method == "linear":
                    distance = int(math.copysign(abs(distance) // factor, distance))
                else:
                    reach = round(largest * factor)
                bucket = t5_bucket(distance, len(table), reach, both_ways=both_ways)
                assert found[:, i, j].equal(table[bucket]), (i, j)


@pytest.mark.parametrize("kind", [*T5_LIKE, "longt5", "xlnet", "cpmant", "deberta-v2"])
def test_linear_takes_effect_and_is_undone_to_the_bit(kind: str) -> None:
    model = build(kind)
    before, keys = logits(model), list(model.state_dict())
    ropepatch.patch(model, "linear", factor=1)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    ropepatch.unpatch(model)
    ropepatch.patch(model, "linear", factor=3)
    assert not torch.allclose(logits(model), before)
    assert list(model.state_dict()) == keys
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert logits(copied).equal(logits(model))
    ropepatch.unpatch(model)
    assert logits(model).equal(before)
    # The copy is a patched model of its own.
    assert not logits(copied).equal(before)
    assert logits(ropepatch.unpatch(copied)).equal(before)


@torch.no_grad()
def test_debertas_distances() -> None:
    model = build("deberta-v2")
    encoder = model.deberta.encoder
    hidden = torch.zeros(1, 30, 4)
    own = encoder.get_rel_pos(hidden)[0]
    with ropepatch.patched(model, "linear", factor=2):
        scaled = encoder.get_rel_pos(hidden)[0]
    for i in range(30):
        for j in range(30):
            d = abs(i - j) // 2
            wanted = own[d, 0] if i > j else own[0, d]
            assert scaled[i, j] == wanted
    with ropepatch.patched(model, "log_buckets", factor=2):
        stretched = encoder.get_rel_pos(hidden)[0]
    near = (torch.arange(30)[:, None] - torch.arange(30)).abs() <= 4
    assert stretched[near].equal(own[near])
    assert bool((stretched.abs() <= own.abs()).all()) and not stretched.equal(own)


@torch.no_grad()
def test_xlnets_sines_are_those_of_the_divided_distance() -> None:
    model = build("xlnet")
    with ropepatch.patched(model, "linear", factor=4):
        scaled = model.transformer.relative_positional_encoding(16, 16)[:, 0]
    d = model.config.d_model
    frequencies = 10000.0 ** (-torch.arange(0, d, 2).float() / d)
    for row, distance in enumerate(range(16, -16, -1)):
        angle = distance / 4 * frequencies
        torch.testing.assert_close(scaled[row], torch.cat((angle.sin(), angle.cos())))


@torch.no_grad()
@pytest.mark.parametrize("method", ["linear", "log_buckets"])
def test_cached_generation_is_a_full_forward(method: str) -> None:
    model = ropepatch.patch(build("t5"), method, factor=4)
    given = inputs(model)
    whole = model(**given).logits
    states = model.get_encoder()(given["input_ids"])
    cache, steps = None, []
    for t in range(given["decoder_input_ids"].shape[1]):
        one = given["decoder_input_ids"][:, t : t + 1]
        out = model(encoder_outputs=states, decoder_input_ids=one, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=0, atol=1e-4)


def test_inspection_and_reload(tmp_path: Any) -> None:
    model = ropepatch.patch(build("t5"), "log_buckets", factor=8, original_length=512)
    found = ropepatch.inspect(model)
    assert (found.mechanism, found.method, found.trained_length, found.target_length) == (
        "relative_bias",
        "log_buckets",
        512,
        4096,
    )
    ropepatch.save_pretrained(model, tmp_path)
    again = ropepatch.from_pretrained(tmp_path)
    assert logits(again).equal(logits(model))


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    model = build("xlnet")
    before = logits(model)
    with pytest.raises(UnsupportedModelError, match="logarithmic buckets"):
        ropepatch.patch(model, "log_buckets", factor=2)
    with pytest.raises(UnsupportedModelError, match="relative_bias ones"):
        ropepatch.patch(model, "yarn", factor=2)
    with pytest.raises(OptionError, match="rotary"):
        ropepatch.patch(model, "linear", factor=2, base="ntk")
    assert logits(model).equal(before)
    with pytest.raises(UnsupportedModelError, match="relative_bias positions"):
        ropepatch.patch(tiny_model("llama"), "log_buckets", factor=2)


def test_a_bias_that_nobody_reads_is_an_error() -> None:
    model = build("t5")
    before = logits(model)
    attention = model.encoder.block[0].layer[0].SelfAttention
    attention.compute_bias = lambda *_, **__: torch.zeros(1, model.config.num_heads, 1, 1)
    with pytest.raises(VerificationError, match="does not ask encoder"):
        ropepatch.patch(model, "linear", factor=2)
    del attention.compute_bias
    assert logits(model).equal(before)

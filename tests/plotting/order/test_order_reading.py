"""What is read off a live model is what the model uses, before a patch and under it."""

from __future__ import annotations

import pytest
import torch

import ropepatch
from ropepatch.errors import UnsupportedModelError, UsageError
from ropepatch.plotting.order import numbers
from ropepatch.plotting.order.reading import attentions, native_biases, tables
from ropepatch.testing import tiny_model


def test_frequencies_and_gain_before_and_under_a_patch() -> None:
    model = tiny_model("llama")
    (plain,) = attentions(model)
    assert plain.rotary.inv_freq.equal(model.model.rotary_emb.inv_freq) and plain.rotary.gain == 1
    with ropepatch.patched(model, "yarn", factor=4):
        (scaled,) = attentions(model)
        assert scaled.rotary.inv_freq.equal(model.model.rotary_emb.inv_freq)
        assert scaled.rotary.gain == pytest.approx(model.model.rotary_emb.attention_scaling)
    # What was read stays as it was.
    assert not scaled.rotary.inv_freq.equal(plain.rotary.inv_freq)


def test_a_remap_is_read_from_the_seam() -> None:
    model = tiny_model("llama")
    own = attentions(model)[0].rotary.inv_freq
    with ropepatch.patched(model, "rerope", window=8):
        (found,) = attentions(model)
    assert found.layers == model.config.num_hidden_layers
    assert found.rotary.inv_freq.equal(own)
    relative = numbers.scaled_distances(found.scheme, torch.tensor([30]), torch.arange(31)).relative
    assert relative.tolist() == [[min(30 - j, 8) for j in range(31)]]


def test_learned_biases_come_with_their_parameters() -> None:
    model = tiny_model("llama")
    with ropepatch.patched(model, "kerple"):
        found = attentions(model)
        bias = numbers.bias_by_distance(found[0].scheme, found[0].learned, 9, torch.arange(10))
    assert bias.shape == (model.config.num_attention_heads, 10)
    assert bool((bias.diff(dim=1) < 0).all())


@pytest.mark.parametrize("kind", ["bloom", "mpt"])
def test_slopes_of_native_alibi(kind: str) -> None:
    model = tiny_model(kind)
    (found,) = attentions(model)
    bias = numbers.bias_by_distance(found.scheme, None, 20, torch.tensor([0, 1, 20]))
    assert bias[:, 0].tolist() == [0.0] * len(bias)
    torch.testing.assert_close(bias[:, 2], 20 * bias[:, 1])
    heads = len(bias)
    if heads & (heads - 1) == 0:
        assert float(bias[0, 1]) == pytest.approx(-(2 ** (-8 / heads)))


def test_the_native_bias_of_t5_is_what_its_scores_get() -> None:
    """Against the bias that the model's own forward adds, picked by pairs."""
    model = tiny_model("t5", "encoder-decoder").eval()
    encoder, decoder = native_biases(model)[:2]
    assert "encoder" in encoder.where
    assert "decoder" in decoder.where
    for found, part, causal in ((encoder, model.encoder, False), (decoder, model.decoder, True)):
        seen = {}

        def keep(_module: object, _args: object, output: object, seen: dict[str, torch.Tensor] = seen) -> None:
            seen["bias"] = output[1]  # type: ignore[index]

        handle = found.module.register_forward_hook(keep)
        extra = {"encoder_hidden_states": torch.zeros(1, 2, model.config.d_model)} if causal else {}
        with torch.no_grad():
            part(input_ids=torch.arange(1, 41)[None], use_cache=False, **extra)
        handle.remove()
        distances, bias = found.over(40)
        assert distances.tolist() == list(range(0 if causal else -39, 40))
        for column, distance in enumerate(distances.tolist()):
            query = max(distance, 0) if distance >= 0 else 0
            expected = seen["bias"][0, :, query, query - distance]
            torch.testing.assert_close(bias[:, column], expected)


def test_the_native_bias_follows_a_patch() -> None:
    model = tiny_model("t5", "encoder-decoder").eval()
    plain = native_biases(model)[0].over(60)[1]
    ropepatch.patch(model, "linear", factor=2)
    scaled = native_biases(model)[0].over(60)[1]
    middle = 59
    assert torch.equal(scaled[:, middle::2], plain[:, middle : middle + 30])
    with pytest.raises(UsageError, match="a matrix"):
        native_biases(model)[0].over(1 << 20)


def test_tables_of_gpt2() -> None:
    model = tiny_model("gpt2")
    (table,) = tables(model)
    assert table.mechanism == "learned"
    assert table.rows.equal(model.transformer.wpe.weight.detach())


def test_what_a_model_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="no position table.*mechanism rotary"):
        tables(tiny_model("llama"))
    with pytest.raises(UnsupportedModelError, match=r"no rotation.*mechanism learned"):
        attentions(tiny_model("gpt2"))

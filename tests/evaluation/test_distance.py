"""Where heads look, held against eager attention weights, the seam's float64 oracle, and closed forms."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import tokenizer
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ropepatch
from ropepatch.attention import reference
from ropepatch.attention.interface import WatchedCall, watching
from ropepatch.errors import PromptError, UnsupportedModelError, UsageError
from ropepatch.evaluation.distance import DistanceProfile, attention_distance
from ropepatch.testing import forward_logits, tiny_inputs, tiny_model

LENGTH, QUERIES = 150, 9
"""Past the trained length of the tiny models, 64, and past the 16 tokens that their local layers see."""


def tokens(model: Any, length: int = LENGTH) -> Tensor:
    return tiny_inputs(model, length=length)["input_ids"]


def count(weights: Tensor, profile: DistanceProfile) -> dict[str, np.ndarray]:
    """A layer's numbers pair by pair, from its whole matrix of weights [H, N, N]."""
    heads, rows, trained = weights.shape[0], profile.queries, profile.trained_length or 0
    shares = np.zeros((heads, len(profile.buckets)))
    first, beyond, logs, rest, total = (np.zeros(heads) for _ in range(5))
    for h in range(heads):
        for i in rows:
            for j in range(i + 1):
                weight = float(weights[h, i, j])
                total[h] += weight
                if j < 4:
                    first[h] += weight
                    continue
                distance = i - j
                shares[h, 0 if distance == 0 else 1 + int(math.log2(distance))] += weight
                beyond[h] += weight if distance >= trained else 0.0
                logs[h] += weight * math.log2(1 + distance)
                rest[h] += weight
    n = len(rows)
    return {
        "shares": shares / n,
        "first_tokens": first / n,
        "learned_sink": 1 - total / n,
        "beyond_trained": beyond / n,
        "mean_distance": 2 ** (logs / rest) - 1,
    }


def assert_counted(profile: DistanceProfile, matrices: list[Tensor]) -> None:
    assert len(profile.layers) == len(matrices) > 0
    for layer, weights in zip(profile.layers, matrices, strict=True):
        for name, wanted in count(weights, profile).items():
            np.testing.assert_allclose(getattr(layer, name), wanted, rtol=1e-5, atol=1e-5, err_msg=name)
        total = layer.shares.sum(1) + layer.first_tokens + layer.learned_sink
        np.testing.assert_allclose(total, 1.0, atol=1e-6)


# --- unpatched models, and those patched in the frequencies seam: eager attention weights --------------------------

EAGER = {
    "llama": {},
    "gemma2": {"attn_logit_softcapping": 2.0},  # and sliding windows
    "gpt_oss": {},  # learned sinks, sliding windows
    "qwen3": {},
    "gpt_neox": {},
    "gpt2": {"n_positions": 160},
    "opt": {"max_position_embeddings": 160},
}


def eager_weights(model: Any, ids: Tensor) -> list[Tensor]:
    plain = type(model)._from_config(copy.deepcopy(model.config), attn_implementation="eager").eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        return [weights[0] for weights in plain(ids, output_attentions=True).attentions]


@pytest.mark.parametrize("family", EAGER)
def test_unpatched_models_show_their_eager_weights(family: str) -> None:
    model = tiny_model(family, **EAGER[family])
    ids = tokens(model)
    # Larger than as made: weights that are nearly uniform would hide a mistake.
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.add_(4)
            elif weight.dim() == 2 and not any(word in name for word in ("embed", "wte", "wpe")):
                weight.mul_(2 if family == "gpt_oss" else 5)
    wanted = eager_weights(model, ids)
    assert max(float(weights.amax()) for weights in wanted) > 0.3
    profile = attention_distance(model, ids, queries=QUERIES)
    assert_counted(profile, wanted)
    sinks = [bool((layer.learned_sink > 1e-3).any()) for layer in profile.layers]
    assert any(sinks) == (family == "gpt_oss")


def test_a_patch_of_the_frequencies_seam_shows() -> None:
    model = tiny_model("llama")
    ids = tokens(model)
    before = attention_distance(model, ids, queries=QUERIES)
    ropepatch.patch(model, "linear", factor=4)
    # A copy built from the patched config has the same frequencies.
    assert_counted(profile := attention_distance(model, ids, queries=QUERIES), eager_weights(model, ids))
    assert np.abs(profile.layers[0].shares - before.layers[0].shares).max() > 1e-6
    assert (profile.trained_length, profile.title) == (64, "llama, linear, 150 tokens")


# --- models patched in the attention seam: the oracle of the seam --------------------------------------------------

PATCHED: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "self_extend", {"factor": 4, "window": 16}),
    ("llama", "lm_infinite", {"window": 20, "sinks": 3}),
    ("llama", "dynamic_ntk", {"factor": 2, "step": 16}),
    ("llama", "alibi", {}),
    ("llama", "kerple", {}),
    ("llama", "nope", {"scale": 3.0, "logn": True}),
    ("gemma2", "rerope", {"window": 20}),
    ("gpt_oss", "dca", {"chunk": 24, "largest": 40, "layers": [0, 1]}),
    ("gptj", "leaky_rerope", {"window": 20, "k": 4.0}),
    ("bloom", "alibi", {"factor": 2, "original_length": 64}),
    ("mpt", "t5_bias", {"original_length": 64}),
]


def oracle(call: WatchedCall) -> Tensor:
    """The whole matrix of weights: what attention makes of values that are one-hot."""
    heads, length = call.query.shape[1], call.key.shape[2]
    places = torch.arange(length)
    near = places[None, :] > places[:, None] - (call.seen.window or length)
    layer = call.layer
    return reference.attend(
        call.query[0],
        call.key[0].repeat_interleave(heads // call.key.shape[1], 0),
        torch.eye(length).expand(heads, -1, -1),
        layer.scheme,
        q_positions=places,
        k_positions=places,
        rotary=layer.rotary,
        layout=layer.layout,
        visible=near,
        scaling=layer.scaling,
        softcap=layer.softcap,
        sinks=layer.sinks,
        module=layer.learned,
    ).detach()


@pytest.mark.parametrize(("family", "method", "options"), PATCHED, ids=lambda value: str(value))
def test_patched_models_show_the_scores_of_the_scheme(family: str, method: str, options: dict[str, Any]) -> None:
    model = tiny_model(family)
    ids = tokens(model)
    ropepatch.patch(model, method, on_scaled="replace" if family == "gpt_oss" else None, **options)
    calls: list[WatchedCall] = []
    with watching(calls.append), torch.no_grad():
        model(ids, use_cache=False)
    assert_counted(attention_distance(model, ids, queries=QUERIES), [oracle(call) for call in calls])


# --- closed forms ----------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(length=st.integers(2, 200), queries=st.integers(1, 40))
def test_attention_that_is_uniform_counts_keys(length: int, queries: int) -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    torch.nn.init.zeros_(model.model.layers[0].self_attn.q_proj.weight)
    profile = attention_distance(model, tokens(model, length), queries=queries)
    assert len(profile.queries) <= queries
    assert length // 2 <= min(profile.queries) <= max(profile.queries) < length
    (layer,) = profile.layers
    wanted = np.zeros(len(profile.buckets))
    for number, low in enumerate(profile.buckets):
        high = 0 if low == 0 else 2 * low - 1
        for i in profile.queries:
            far = min(high, i - 4)
            wanted[number] += max(0, far - low + 1) / (i + 1) / len(profile.queries)
    first = np.mean([min(4, i + 1) / (i + 1) for i in profile.queries])
    np.testing.assert_allclose(layer.shares, np.tile(wanted, (4, 1)), atol=1e-6)
    np.testing.assert_allclose(layer.first_tokens, first, atol=1e-6)
    assert profile.buckets[0] == 0 and profile.buckets[-1] < length <= 2 * max(1, profile.buckets[-1])


def test_nothing_is_seen_beyond_a_window() -> None:
    model = tiny_model("llama")
    with ropepatch.patched(model, "lm_infinite", window=16, sinks=4):
        profile = attention_distance(model, tokens(model))
    for layer in profile.layers:
        beyond = np.asarray(profile.buckets) >= 16
        assert (layer.shares[:, beyond] == 0).all() and (layer.shares[:, ~beyond].sum(1) > 0.5).all()
        assert (layer.first_tokens > 0).all() and (layer.beyond_trained == 0).all()  # type: ignore[operator]


# --- what goes in and comes out --------------------------------------------------------------------------------------


def test_a_tokenizer_reads_the_text_from_its_start() -> None:
    model, words = tiny_model("llama", vocab_size=500), tokenizer("byte_level_bos")
    text = "The grass is green. The sky is blue. " * 9
    ids = words(text)["input_ids"]
    by_text = attention_distance(model, words, text=text, length=50)
    for given_ids in (ids[:50], np.asarray(ids[:50]), torch.tensor([ids])):
        by_ids = attention_distance(model, given_ids, length=50)
        assert by_ids.to_dict() == by_text.to_dict()
    assert by_text.length == 50


def test_the_tables_say_the_same() -> None:
    model = tiny_model("gpt_oss")
    profile = attention_distance(model, tokens(model), queries=QUERIES)
    plain = json.loads(json.dumps(profile.to_dict(), allow_nan=False))
    assert plain["buckets"] == [0, 1, 2, 4, 8, 16, 32, 64, 128]
    np.testing.assert_array_equal(plain["layers"][1]["shares"], profile.layers[1].shares)
    table = profile.to_pandas()
    assert list(table["layer"]) == [0] * 4 + [1] * 4
    parts = [f"from_{low}" for low in profile.buckets] + ["first_tokens", "learned_sink"]
    np.testing.assert_allclose(table[parts].sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(table["mean_distance"], np.concatenate([x.mean_distance for x in profile.layers]))


def test_a_head_that_sees_the_first_tokens_only_has_no_mean_distance() -> None:
    model = tiny_model("llama")
    profile = attention_distance(model, tokens(model, 4))
    assert all(layer["mean_distance"] == [None] * 4 for layer in profile.to_dict()["layers"])
    assert all(np.isnan(layer.mean_distance).all() for layer in profile.layers)


def test_an_unknown_trained_length_is_left_out() -> None:
    model = tiny_model("bloom")
    ropepatch.patch(model, "alibi")
    profile = attention_distance(model, tokens(model, 20))
    assert profile.trained_length is None
    assert profile.to_dict()["layers"][0]["beyond_trained"] is None
    assert profile.to_pandas()["beyond_trained"].isna().all()


@pytest.mark.parametrize("method", [None, "self_extend"])
def test_the_model_is_left_as_it_was(method: str | None) -> None:
    model = tiny_model("gemma2")
    ids = tokens(model)
    if method:
        ropepatch.patch(model, method, factor=2)
    model.train()
    model.model.layers[0].eval()
    modes, config = [m.training for m in model.modules()], copy.deepcopy(vars(model.config))
    attention_distance(model, ids)
    with pytest.raises(IndexError):
        attention_distance(model, ids + 1000)
    assert [m.training for m in model.modules()] == modes
    assert vars(model.config) == config
    model.eval()
    after = forward_logits(model, input_ids=ids)
    if method:
        ropepatch.unpatch(model)
        ropepatch.patch(model, method, factor=2)
    assert torch.equal(forward_logits(model, input_ids=ids), after)


def test_half_precision_is_read_in_float32() -> None:
    exact, half = tiny_model("llama"), tiny_model("llama").to(torch.bfloat16)
    wanted, got = (attention_distance(model, tokens(model)) for model in (exact, half))
    for one, other in zip(wanted.layers, got.layers, strict=True):
        np.testing.assert_allclose(other.shares, one.shares, atol=5e-3)
        np.testing.assert_allclose(other.shares.sum(1) + other.first_tokens, 1.0, atol=1e-6)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in numbers."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return out


@pytest.mark.parametrize("method", [None, "self_extend"])
def test_memory_is_linear_in_the_length(method: str | None) -> None:
    model = tiny_model("gemma2")
    if method:
        ropepatch.patch(model, method, factor=64)
    sizes = []
    for length in (1024, 2048):
        with Largest() as largest:
            attention_distance(model, tokens(model, length), queries=4)
        sizes.append(largest.size)
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[1] < 2048 * 2048


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "more", "error", "words"),
    [
        ([tokenizer("byte_level")], {}, UsageError, "needs a text"),
        ([[5, 6, 7]], {"text": "so"}, UsageError, "already"),
        ([[5, 6, 7]], {"length": 4}, PromptError, r"2\.\.3"),
        ([[5]], {}, PromptError, "so many tokens"),
        ([[[5, 6], [7, 8]]], {}, PromptError, "one text"),
        ([[0.5, 0.5]], {}, PromptError, "whole numbers"),
        ([[5, 6, 7]], {"queries": 0}, UsageError, "queries"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_error(
    arguments: list[Any], more: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        attention_distance(tiny_model("llama"), *arguments, **more)


@pytest.mark.parametrize(
    ("family", "kind", "words"),
    [
        ("bloom", "causal-lm", "patch.*alibi"),
        ("gptj", "causal-lm", "cannot be watched"),
        ("mamba", "causal-lm", "interface"),
        ("bert", "encoder", "both ways"),
        ("t5", "encoder-decoder", "decoder-only"),
        ("gpt2", "causal-lm", "positions for 64 tokens"),
    ],
)
def test_models_without_such_weights_are_refused(family: str, kind: str, words: str) -> None:
    model = tiny_model(family, kind)
    length = 100 if family == "gpt2" else 40
    ids = tiny_inputs(model, length=length)["input_ids"]
    config = copy.deepcopy(vars(model.config))
    with pytest.raises(UnsupportedModelError, match=words):
        attention_distance(model, ids)
    assert vars(model.config) == config

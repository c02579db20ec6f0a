"""Every kind of cache, and everything that is done to caches: all give the logits of one forward."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache

import ropepatch
from ropepatch.attention.kept import SPARE
from ropepatch.errors import CacheError
from ropepatch.testing import tiny_model

LENGTH = 160
TOLERANCE = 2e-4
IDS = torch.randint(10, 100, (1, LENGTH), generator=torch.Generator().manual_seed(5))
OTHER = torch.randint(10, 100, (1, LENGTH), generator=torch.Generator().manual_seed(6))
SINKS, WINDOW = 3, 20

METHODS: dict[str, dict[str, Any]] = {
    "dynamic_ntk": {"factor": 2, "step": 16},
    "self_extend": {"window": 16, "factor": 3},
    "dca": {"chunk": 24, "largest": 40},
    "alibi": {},
    "kerple": {},
    "streaming": {"sinks": SINKS, "window": WINDOW},
}
# Those that never let go of a key; the other has tests of its own below.
KEEPING = [method for method in METHODS if method != "streaming"]
# Every kind of cache layer: full, sliding beside full, sliding alone, and a latent one.
FAMILIES = ("llama", "gemma2", "mistral", "deepseek_v3")


def build(family: str) -> Any:
    """With a window wide enough for every method's rule to show in it: a patch without effect is refused."""
    return tiny_model(family, sliding_window=48) if family == "mistral" else tiny_model(family)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=METHODS)
def model(request: pytest.FixtureRequest) -> Any:
    return ropepatch.patch(tiny_model("llama"), request.param, **METHODS[request.param])


@pytest.fixture
def grouped() -> Any:
    return ropepatch.patch(tiny_model("llama"), "self_extend", **METHODS["self_extend"])


@pytest.fixture
def streaming() -> Any:
    return ropepatch.patch(tiny_model("llama"), "streaming", **METHODS["streaming"])


def whole(model: Any, ids: Tensor = IDS) -> Tensor:
    found: Tensor = model(ids, use_cache=False).logits
    return found


def through(model: Any, cache: Any, ids: Tensor, start: int, *stops: int, **more: Any) -> Tensor:
    """Logits of the tokens from `start` on, in parts that end at `stops`."""
    parts = [
        model(ids[:, begin:end], past_key_values=cache, use_cache=True, **more).logits
        for begin, end in pairwise((start, *stops))
    ]
    return torch.cat(parts, dim=1)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


# -- kinds of caches


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_static_cache(family: str, method: str) -> None:
    """Its layers are written in place, and have places that are still empty."""
    model = ropepatch.patch(build(family), method, **METHODS[method])
    cache = StaticCache(model.config, max_cache_len=LENGTH + 9)
    stops = (70, 71, 72, 73, 110, 150, *range(151, LENGTH + 1))
    assert apart(through(model, cache, IDS, 0, *stops), whole(model)) <= TOLERANCE
    cache.reset()
    assert apart(through(model, cache, OTHER, 0, 40, 41, 42, 80), whole(model, OTHER[:, :80])) <= TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_a_static_cache_with_padding_and_positions(method: str) -> None:
    model = ropepatch.patch(tiny_model("llama"), method, **METHODS[method])
    rows, mask = torch.cat((IDS, OTHER)), torch.ones(2, LENGTH, dtype=torch.int64)
    mask[0, :15] = 0
    cache, parts = StaticCache(model.config, max_cache_len=LENGTH + 9), []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for start, stop in pairwise((0, 90, 120, *range(150, LENGTH + 1))):
        more = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        parts.append(model(rows[:, start:stop], past_key_values=cache, **more).logits)
    found = torch.cat(parts, 1)
    assert apart(found[:1, 15:], whole(model, IDS[:, 15:])) <= TOLERANCE
    assert apart(found[1:], whole(model, OTHER)) <= TOLERANCE


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mistral"])
@pytest.mark.parametrize("method", METHODS)
def test_sliding_layers(family: str, method: str) -> None:
    """All layers changed, the sliding ones too; they hold fewer keys than full ones."""
    model = build(family)
    layers = list(range(model.config.num_hidden_layers))
    ropepatch.patch(model, method, layers=layers, **METHODS[method])
    cache = DynamicCache(config=model.config)
    stops = (50, 51, 52, 53, 90, 140, *range(150, LENGTH + 1))
    assert apart(through(model, cache, IDS, 0, *stops), whole(model)) <= TOLERANCE


def test_sliding_layers_beside_truncated_ones_of_the_same_size() -> None:
    """A sliding layer that happens to hold as many keys as a truncated one holds other keys."""
    model = tiny_model("gemma2", sliding_window=SINKS + WINDOW)
    layers = list(range(model.config.num_hidden_layers))
    ropepatch.patch(model, "streaming", layers=layers, **METHODS["streaming"])
    cache = DynamicCache(config=model.config)
    assert apart(through(model, cache, IDS, 0, 80, *range(81, LENGTH + 1)), whole(model)) <= TOLERANCE
    assert {layer.keys.shape[2] for layer in cache.layers} == {SINKS + WINDOW - 1}


@pytest.mark.parametrize("backend", ["fp8", "quanto", "hqq"])
@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_cache(method: str, backend: str) -> None:
    """A few bits a key: as near to one forward as the quantisation of the unpatched model's cache leaves it."""
    # Backends quantise groups of 64 numbers.
    model, stops = tiny_model("llama", hidden_size=256, num_attention_heads=4, num_key_value_heads=2), (40, 41, 42, 64)
    plain = apart(through(model, quantised(model, backend), IDS, 0, *stops), whole(model, IDS[:, :64]))
    ropepatch.patch(model, method, **METHODS[method])
    cache = quantised(model, backend)
    assert apart(through(model, cache, IDS, 0, *stops), whole(model, IDS[:, :64])) <= 3 * plain + TOLERANCE
    assert plain > TOLERANCE, "nothing was quantised"


def quantised(model: Any, backend: str) -> Any:
    bits = {"quanto": {"nbits": 4, "residual_length": 16}, "hqq": {"nbits": 8, "residual_length": 16}}
    try:
        return QuantizedCache(backend, model.config, **bits.get(backend, {}))
    except (ValueError, TypeError, KeyError, ImportError) as error:
        pytest.skip(f"needs a transformers and a package that quantise with {backend}: {error}")


# -- what is done to a cache


@pytest.mark.parametrize("model", KEEPING, indirect=True)
def test_cut_back_and_grown_again_with_other_tokens(model: Any) -> None:
    """Single tokens in between, so that rotated keys are remembered, and must be forgotten."""
    cache = DynamicCache()
    through(model, cache, IDS, 0, 100, 101, 102, 103)
    cache.crop(-40)
    mixed = torch.cat((IDS[:, :63], OTHER[:, 63:]), dim=1)
    stops = (64, 65, 80, 110, 111)
    assert apart(through(model, cache, mixed, 63, *stops), whole(model, mixed[:, :111])[:, 63:]) <= TOLERANCE
    cache.crop(-1)
    last = mixed.clone()
    last[:, 110] = 7
    assert apart(through(model, cache, last, 110, 111), whole(model, last[:, :111])[:, 110:]) <= TOLERANCE


def test_cut_back_and_grown_again_with_other_positions(grouped: Any) -> None:
    """A jump that was cut off is forgotten, and positions go on from where the cache ends."""
    cache = DynamicCache()
    through(grouped, cache, IDS, 0, 60)
    grouped(IDS[:, 60:70], past_key_values=cache, position_ids=torch.arange(10)[None] + 100)
    grouped(IDS[:, 70:71], past_key_values=cache)
    cache.crop(-11)
    assert apart(through(grouped, cache, IDS, 60, 61, 62, 90), whole(grouped, IDS[:, :90])[:, 60:]) <= TOLERANCE


@pytest.mark.parametrize("model", KEEPING, indirect=True)
def test_a_mask_that_changes_between_calls_moves_the_past(model: Any) -> None:
    """Keys are cached as they are: hiding the first tokens later on is as if they had been hidden as keys all along."""
    model.config.num_hidden_layers = 1
    model.model.layers = model.model.layers[:1]
    mask = torch.ones(1, 102, dtype=torch.int64)
    mask[:, :10] = 0
    cache = DynamicCache()
    through(model, cache, IDS, 0, 100, 101)
    found = model(IDS[:, 101:102], past_key_values=cache, attention_mask=mask).logits
    wanted = model(IDS[:, :102], attention_mask=mask, use_cache=False).logits[:, -1:]
    assert apart(found, wanted) <= TOLERANCE


def test_a_copy_goes_its_own_way(model: Any) -> None:
    cache = DynamicCache()
    through(model, cache, IDS, 0, 100, 101)
    twin = copy.deepcopy(cache)
    mixed = torch.cat((IDS[:, :101], OTHER[:, 101:]), dim=1)
    for own, ids in ((twin, mixed), (cache, IDS)):
        assert apart(through(model, own, ids, 101, 102, 130, 131), whole(model, ids[:, :131])[:, 101:]) <= TOLERANCE


@pytest.mark.parametrize("how", ["select", "repeat", "reorder"])
def test_rows_are_moved(model: Any, how: str) -> None:
    cache, rows = DynamicCache(), torch.cat((IDS, OTHER))
    through(model, cache, rows, 0, 100, 101, 102)
    if how == "select":
        cache.batch_select_indices(torch.tensor([1]))
        rows = OTHER
    elif how == "repeat":
        cache.batch_repeat_interleave(2)
        rows = torch.cat((IDS, IDS, OTHER, OTHER))
    else:
        cache.reorder_cache(torch.tensor([1, 0]))
        rows = torch.cat((OTHER, IDS))
    found = through(model, cache, rows, 102, 103, 104, 130)
    assert apart(found, whole(model, rows[:, :130])[:, 102:]) <= TOLERANCE


def test_rows_with_positions_of_their_own_cannot_be_moved(grouped: Any) -> None:
    """Nothing tells a model which row went where; padding by a mask is no such case, for the mask comes each time."""
    rows, jumps = torch.cat((IDS, OTHER))[:, :50], torch.stack((torch.arange(50), torch.arange(50) * 2))
    for move in (
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2),
    ):
        cache = DynamicCache()
        grouped(rows, position_ids=jumps, attention_mask=torch.ones_like(rows), past_key_values=cache)
        move(cache)
        with pytest.raises(CacheError):
            grouped(IDS[:, :1].expand(cache.layers[0].keys.shape[0], -1), past_key_values=cache)


def test_a_cache_is_used_again_after_a_reset(model: Any) -> None:
    cache = DynamicCache()
    through(model, cache, IDS, 0, 100, 101, 102)
    cache.reset()
    if cache.layers[0].keys is not None:
        pytest.skip("needs a transformers whose reset empties a dynamic cache")
    assert apart(through(model, cache, OTHER, 0, 100, 101, 102), whole(model, OTHER[:, :102])) <= TOLERANCE


def test_a_copied_model_goes_on_with_the_cache(model: Any) -> None:
    cache = DynamicCache()
    through(model, cache, IDS, 0, 100, 101)
    twin = copy.deepcopy(model)
    assert apart(through(twin, cache, IDS, 101, 102, 130), whole(model, IDS[:, :130])[:, 101:]) <= TOLERANCE


# -- generation


PADDED = torch.cat((IDS, OTHER))[:, :90]
MASK = torch.ones(2, 90, dtype=torch.int64)
MASK[0, :11] = 0


def generate(model: Any, **how: Any) -> Tensor:
    how = {"attention_mask": MASK, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **how}
    found: Tensor = model.generate(PADDED[: how["attention_mask"].shape[0]], **how)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_generation_with_a_static_cache(family: str, method: str) -> None:
    """transformers makes the masks before it calls the model."""
    model = ropepatch.patch(build(family), method, **METHODS[method])
    wanted = generate(model, use_cache=False)
    assert torch.equal(generate(model, cache_implementation="static", disable_compile=True), wanted)
    assert torch.equal(generate(model), wanted)


def test_beam_search(model: Any) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(generate(model, **beams), generate(model, **beams, use_cache=False))


def test_a_prompt_in_chunks(model: Any) -> None:
    assert torch.equal(generate(model, prefill_chunk_size=32), generate(model, use_cache=False))


@pytest.mark.parametrize("how", ["prompt lookup", "assistant"])
def test_assisted_generation(model: Any, how: str) -> None:
    """The cache is cut back whenever a guess was wrong."""
    # No least length: older transformers forget it while they guess.
    one = {"attention_mask": MASK[:1], "max_new_tokens": 20, "min_new_tokens": None}
    wanted = generate(model, **one, use_cache=False)
    more = {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1}
    if how == "assistant":
        more = {"assistant_model": ropepatch.patch(tiny_model("llama", seed=1), "alibi")}
    # Older transformers may end with one token too many.
    assert torch.equal(generate(model, **one, **more)[:, : wanted.shape[1]], wanted)


# -- a cache that lets go


def held(cache: Any) -> int:
    (keys,) = {layer.keys.shape[2] for layer in cache.layers}
    return int(keys)


@pytest.mark.parametrize("method", ["streaming", "lm_infinite"])
def test_a_truncated_cache_gives_the_logits_of_one_forward(method: str) -> None:
    model = ropepatch.patch(tiny_model("llama"), method, **METHODS["streaming"])
    cache, draw = DynamicCache(), random.Random(0)
    stops = sorted(draw.sample(range(1, 130), 12)) + list(range(131, LENGTH + 1))
    found = []
    for start, stop in pairwise((0, *stops)):
        found.append(model(IDS[:, start:stop], past_key_values=cache).logits)
        assert held(cache) == min(stop, SINKS + WINDOW - 1)
        assert cache.get_seq_length() == stop
    assert apart(torch.cat(found, 1), whole(model)) <= TOLERANCE


def test_each_row_keeps_its_own_first_tokens(streaming: Any) -> None:
    """Under padding the first tokens of a row are not those of its slots, and padding takes no place in its window."""
    cache, parts = DynamicCache(), []
    for start, stop in pairwise((0, 30, 60, 90, *range(91, 121))):
        mask = torch.ones(2, stop, dtype=torch.int64)
        mask[0, :15] = 0
        more = {"attention_mask": mask, "past_key_values": cache}
        parts.append(streaming(torch.cat((IDS, OTHER))[:, start:stop], **more).logits)
        assert held(cache) <= 2 * SINKS + WINDOW - 1
    found = torch.cat(parts, 1)
    assert apart(found[:1, 15:], whole(streaming, IDS[:, 15:120])) <= TOLERANCE
    assert apart(found[1:], whole(streaming, OTHER[:, :120])) <= TOLERANCE


def test_each_document_has_its_own_first_tokens(streaming: Any) -> None:
    positions = torch.cat([torch.arange(n) for n in (65, 95)])[None]
    cache, parts = DynamicCache(), []
    for start, stop in pairwise((0, 40, 90, *range(100, LENGTH + 1))):
        more = {"position_ids": positions[:, start:stop], "past_key_values": cache}
        parts.append(streaming(IDS[:, start:stop], **more).logits)
    assert held(cache) == SINKS + WINDOW - 1
    wanted = torch.cat((whole(streaming, IDS[:, :65]), whole(streaming, IDS[:, 65:])), 1)
    assert apart(torch.cat(parts, 1), wanted) <= TOLERANCE


@pytest.mark.parametrize("removed", [1, 7, SPARE])
def test_a_truncated_cache_is_cut_back(streaming: Any, removed: int) -> None:
    """As far as it remembers what it has let go of last."""
    cache = DynamicCache()
    through(streaming, cache, IDS, 0, 120, 121, 140)
    cache.crop(-removed)
    start = 140 - removed
    mixed = torch.cat((IDS[:, :start], OTHER[:, start:]), dim=1)
    found = through(streaming, cache, mixed, start, start + 1, start + 2, 150)
    assert apart(found, whole(streaming, mixed[:, :150])[:, start:]) <= TOLERANCE
    assert held(cache) == SINKS + WINDOW - 1


def test_a_truncated_cache_cannot_be_cut_back_to_what_is_gone(streaming: Any) -> None:
    cache = DynamicCache()
    through(streaming, cache, IDS, 0, 120)
    with pytest.raises(CacheError, match="cut back"):
        cache.crop(-SPARE - 1)


def test_two_thousand_tokens_in_constant_memory(streaming: Any) -> None:
    stream(streaming, 2_000)


@pytest.mark.slow
def test_a_hundred_thousand_tokens_in_constant_memory() -> None:
    model = tiny_model("llama", num_hidden_layers=1)
    stream(ropepatch.patch(model, "streaming", **METHODS["streaming"]), 100_000)


def stream(model: Any, length: int) -> None:
    """Tokens one by one; the bytes of the cache stay the same, and the last logits are those of a forward over all."""
    ids = torch.randint(10, 100, (1, length), generator=torch.Generator().manual_seed(8))
    cache = DynamicCache()
    model(ids[:, :200], past_key_values=cache)
    sizes, last = set(), []
    for place in range(200, length):
        logits = model(ids[:, place : place + 1], past_key_values=cache).logits
        if place == 300 or place % 500 == 499:
            sizes.add(sum(x.numel() * x.element_size() for x in tensors_of(cache)))
        last = [*last[-9:], logits]
    assert len(sizes) == 1
    assert held(cache) == SINKS + WINDOW - 1
    assert apart(torch.cat(last, 1), model(ids, use_cache=False, logits_to_keep=10).logits) <= TOLERANCE


def tensors_of(thing: Any, seen: dict[int, Any] | None = None) -> Iterator[Tensor]:
    """All tensors that an object holds, at any depth, each once."""
    seen = {} if seen is None else seen
    if id(thing) in seen:
        return
    seen[id(thing)] = thing  # Held on to: an id may be given to another object.
    if isinstance(thing, Tensor):
        yield thing
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
    for part in (*parts, *vars(thing).values()) if hasattr(thing, "__dict__") else parts:
        yield from tensors_of(part, seen)


def test_rotated_keys_of_steps_gone_by_are_dropped() -> None:
    model = ropepatch.patch(tiny_model("llama"), "dynamic_ntk", step=16)
    cache = DynamicCache(config=model.config)
    for place in range(130):
        model(IDS[:, place : place + 1], past_key_values=cache)
    memos = cache.ropepatch_notes.memos.values()  # type: ignore[attr-defined]
    assert memos
    assert all(len(memo.buffers) == 1 for memo in memos)

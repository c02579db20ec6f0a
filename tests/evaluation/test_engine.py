"""The engine against plain transformers: `model.generate`, and one full forward for each prompt."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import model

import ropepatch
from ropepatch.errors import RopepatchError, UnsupportedModelError
from ropepatch.evaluation.cache import Reader
from ropepatch.evaluation.engine import Engine, Outcome, Query, end_tokens
from ropepatch.evaluation.prompt import Ids

NEW = 6
KINDS = {"llama": True, "gemma3": True, "gpt2": True, "falcon": True, "mamba": False}


def _greedy(net: Any, prompt: list[int], new: int = NEW) -> list[int]:
    ids = torch.tensor([prompt])
    output = net.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0)
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def _forced(net: Any, prompt: list[int], answer: list[int]) -> tuple[bool, float]:
    logits = net(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    target = torch.tensor(answer)
    return bool((logits.argmax(-1) == target).all()), float(logits.log_softmax(-1)[range(len(answer)), target].sum())


def _query(prompt: list[int], answer: list[int], most_tokens: int = NEW, enough: Any = None) -> Query:
    return Query(np.asarray(prompt, dtype=np.int32), np.asarray(answer, dtype=np.int32), most_tokens, enough)


def _queries(net: Any) -> list[Query]:
    """Prompts that share prefixes; answers that are right, wrong at once, wrong in the middle, wrong at the end."""
    draw = np.random.default_rng(7)
    trunk = draw.integers(5, 500, 90).tolist()
    prompts = [trunk[:cut] + draw.integers(5, 500, more).tolist() for cut in (0, 20, 60, 90) for more in (1, 13, 40)]
    prompts.append(prompts[8])  # one twice, with the same answer
    queries = []
    for i, prompt in enumerate(prompts):
        answer = _greedy(net, prompt, 4)
        if i % 4:
            spot = i % 4 if i % 4 < 3 else 0
            answer[spot] = (answer[spot] + 1) % 500
        queries.append(_query(prompt, answer))
    return queries


def _check(net: Any, queries: list[Query], outcomes: list[Outcome]) -> None:
    assert sorted(outcome.index for outcome in outcomes) == list(range(len(queries)))
    for outcome in outcomes:
        prompt, answer = queries[outcome.index].prompt.tolist(), queries[outcome.index].answer.tolist()
        forced, logprob = _forced(net, prompt, answer)
        assert outcome.forced == forced
        assert outcome.logprob == pytest.approx(logprob, abs=1e-3)
        expected = _greedy(net, prompt)
        wanted = len(answer) if forced else NEW
        assert outcome.generated[:wanted] == expected[:wanted]


@pytest.mark.parametrize("chunk_size", [7, 4096])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_transformers(kind: str, chunk_size: int) -> None:
    net = model(kind)
    queries = _queries(net)
    with Engine(net, chunk_size) as engine:
        outcomes = list(engine.run(queries))
        assert engine.reuse == KINDS[kind]
        assert (engine.reason is None) == KINDS[kind]
    _check(net, queries, outcomes)
    assert {outcome.forced for outcome in outcomes} == {True, False}
    sequences = [tuple(q.sequence.tolist()) for q in queries]
    assert engine.work.sum_of_prompts == sum(map(len, sequences))
    assert engine.work.trie_size == len({s[: n + 1] for s in sequences for n in range(len(s))})
    if engine.reuse:
        assert engine.work.tokens_computed == engine.work.trie_size
    else:
        assert engine.work.tokens_computed >= engine.work.sum_of_prompts


def test_computes_each_token_once_by_the_models_own_count() -> None:
    """Counted at the embedding, not by the engine."""
    net = model("llama")
    queries = [q for q in _queries(net) if _forced(net, q.prompt.tolist(), q.answer.tolist())[0]]
    with Engine(net, 16) as engine:
        visits = engine.prepare(queries)
        seen: list[int] = []
        hook = net.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].numel()))
        outcomes = list(engine.run(queries, visits=visits))
        hook.remove()
    assert all(outcome.forced for outcome in outcomes)
    assert sum(seen) == engine.work.trie_size < engine.work.sum_of_prompts
    assert max(seen) <= 16 + 5  # a chunk, and the rows of the answer


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(5, 7), min_size=1, max_size=12), st.lists(st.integers(5, 7), min_size=1, max_size=3)
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 5),
)
@settings(max_examples=25)
def test_any_overlap_of_prompts_and_answers(cases: list[tuple[list[int], list[int]]], chunk_size: int) -> None:
    """A tiny alphabet: prompts are prefixes of each other, of answers, equal with other answers."""
    net = model("llama", vocab_size=8)
    queries = [_query(prompt, answer) for prompt, answer in cases]
    with Engine(net, chunk_size) as engine:
        _check(net, queries, list(engine.run(queries)))
    assert engine.reuse


@pytest.mark.parametrize("left", [0, 1, 3, 20])
def test_generation_ends_where_the_table_of_positions_does(left: int) -> None:
    net = model("gpt2")
    prompt = np.random.default_rng(5).integers(5, 500, net.config.n_positions - left).tolist()
    expected = _greedy(net, prompt, min(NEW, left + 1))
    with Engine(net) as engine:
        outcome = next(iter(engine.run([_query(prompt, [(expected[0] + 1) % 500])])))
        assert engine.reuse
    assert outcome.generated == expected


def test_one_engine_for_several_lists() -> None:
    net = model("llama")
    queries = _queries(net)
    with Engine(net, 32) as engine:
        for part in (queries[:6], queries[6:], queries[2:9]):
            _check(net, part, list(engine.run(part)))
    assert engine.work.tokens_computed == engine.work.trie_size
    assert net.config._attn_implementation == "sdpa"


def test_patched_attention_is_put_back() -> None:
    net = model("llama")
    before = dict(vars(net.config))
    queries = _queries(net)
    with Engine(net) as engine:
        outcomes = engine.run(queries)
        next(outcomes)
        assert net.config._attn_implementation != "sdpa"
        outcomes.close()
    assert vars(net.config) == before
    assert net.config._attn_implementation == "sdpa"


def test_training_mode_is_put_back() -> None:
    net = model("llama").train()
    net.model.layers[0].eval()
    before = [module.training for module in net.modules()]
    with Engine(net) as engine:
        list(engine.run([_query([5, 6, 7], [8], 1)]))
        assert not net.training
    assert [module.training for module in net.modules()] == before


def test_generation_stops_at_an_end_token_and_when_enough() -> None:
    net = model("llama")
    prompt = list(range(10, 40))
    greedy = _greedy(net, prompt)
    wrong = _query(prompt, [(greedy[0] + 1) % 500])
    with Engine(net) as engine:
        (outcome,) = engine.run([wrong], end_tokens=frozenset([greedy[2]]))
        assert outcome.generated == greedy[: greedy.index(greedy[2]) + 1]
        (outcome,) = engine.run([dataclasses.replace(wrong, enough=lambda generated: len(generated) == 4)])
        assert outcome.generated == greedy[:4]


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_the_checkpoints_penalties_do_not_count(kind: str) -> None:
    net = model(kind)
    queries = _queries(net)
    net.generation_config.repetition_penalty = 50.0
    own = net.generation_config
    with Engine(net) as engine:
        outcomes = list(engine.run(queries))
    assert net.generation_config is own
    net.generation_config.repetition_penalty = 1.0
    _check(net, queries, outcomes)


def test_rope_that_depends_on_length_is_not_reused() -> None:
    scaling = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    options: dict[str, Any] = {"max_position_embeddings": 64, "rope_parameters": scaling}
    draw = np.random.default_rng(3)
    prompts = [draw.integers(5, 500, n).tolist() for n in (80, 200, 70)]
    # A fresh model for each: this embedding also remembers the longest input it has seen.
    queries = [_query(prompt, _greedy(model("llama", **options), prompt, 3)) for prompt in prompts]
    net = model("llama", **options)
    with Engine(net) as engine:
        outcomes = list(engine.run(queries))
    assert not engine.reuse
    assert engine.reason is not None
    assert "dynamic" in engine.reason
    for outcome in outcomes:
        assert outcome.generated[:3] == queries[outcome.index].answer.tolist()
    short = [_query(prompt[:40], [1]) for prompt in prompts]
    with Engine(net) as engine:  # below the length where it sets in
        _check(net, short, list(engine.run(short)))
    assert engine.reuse


@pytest.mark.parametrize("kind", ["gpt2"])
def test_longer_than_the_table_of_positions(kind: str) -> None:
    net = model(kind, n_positions=50)
    with Engine(net) as engine:
        engine.prepare([_query([1] * 50, [1])])
        with pytest.raises(UnsupportedModelError, match="positions for 50 tokens"):
            engine.prepare([_query([1] * 50, [1, 2])])


def test_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    net = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="decoder-only"):
        Engine(net)


def _fail(net: Any, error: Exception, when: Any) -> Any:
    """Make the model's forward raise for blocks for which `when(tokens)` holds, deep inside, half-way through."""

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if when(hidden.shape[1]):
            raise error

    return net.model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried ..."),
    ],
)
def test_out_of_memory_halves_the_chunk(error: Exception) -> None:
    net = model("llama")
    queries = _queries(net)
    expected = [_forced(net, q.prompt.tolist(), q.answer.tolist()) for q in queries]
    with Engine(net, 128) as engine:
        visits = engine.prepare(queries)
        hook = _fail(net, error, lambda tokens: tokens > 40)
        outcomes = list(engine.run(queries, visits=visits))
        hook.remove()
    assert [o.forced for o in sorted(outcomes, key=lambda o: o.index)] == [forced for forced, _ in expected]
    _check(net, queries, outcomes)


def test_out_of_memory_for_good_keeps_what_is_done() -> None:
    net = model("llama")
    queries = [_query([5, 6, 7, 8], [9]), _query(list(range(100, 200)), [9])]
    with Engine(net, 64) as engine:
        visits = engine.prepare(queries)
        hook = _fail(net, MemoryError(), lambda tokens: tokens > 8)
        outcomes = engine.run(queries, visits=visits)
        assert next(outcomes).index == 0
        with pytest.raises(RopepatchError, match="Out of memory on a prompt of 100 tokens"):
            next(outcomes)
        hook.remove()


def test_other_errors_are_not_swallowed() -> None:
    net = model("llama")
    queries = _queries(net)
    with Engine(net) as engine:
        visits = engine.prepare(queries)
        hook = _fail(net, RuntimeError("a shape is wrong"), lambda tokens: True)
        with pytest.raises(RuntimeError, match="a shape is wrong"):
            list(engine.run(queries, visits=visits))
        hook.remove()


def test_reader_gives_the_logits_of_a_plain_forward() -> None:
    net = model("gemma3")
    ids: Ids = np.arange(5, 105, dtype=np.int32)
    with torch.no_grad():
        wanted = net(torch.from_numpy(ids.astype("int64"))[None]).logits[0]
        reader = Reader(net, chunk_size=9, unmasked=False)
        torch.testing.assert_close(reader.extend(ids[:70], keep=5), wanted[65:70], atol=1e-4, rtol=1e-4)
        reader.rewind(31)  # further back than the sliding window of 24
        torch.testing.assert_close(reader.extend(ids[31:], keep=69), wanted[31:], atol=1e-4, rtol=1e-4)
        reader.rewind(0)
        torch.testing.assert_close(reader.extend(ids[:40], keep=1), wanted[39:40], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "options", "reuse"),
    [
        ("self_extend", {"factor": 2, "window": 24}, True),
        ("alibi", {}, True),
        ("dynamic_ntk", {}, True),
        ("streaming", {"sinks": 2, "window": 30}, False),
        ("streaming", {"sinks": 2, "window": 30, "truncate": False}, True),
    ],
)
def test_models_patched_in_the_attention_seam(method: str, options: dict[str, Any], reuse: bool) -> None:
    """Prefixes are shared where the cache can be cut back; a patch that drops tokens from it takes the plain way."""
    net = ropepatch.patch(model("llama"), method, original_length=64, **options)
    queries = _queries(net)
    with Engine(net) as engine:
        visits = engine.prepare(queries)
        assert engine.reuse == reuse
        assert reuse or "truncate=false" in str(engine.reason)
        _check(net, queries, list(engine.run(queries, visits=visits)))


def test_end_tokens() -> None:
    net = model("llama")
    net.generation_config.eos_token_id = [3, 4]
    assert end_tokens(net) == {3, 4}
    net.generation_config.eos_token_id = 5
    assert end_tokens(net) == {5}
    net.generation_config.eos_token_id = None
    net.config.eos_token_id = None
    assert end_tokens(net) == frozenset()

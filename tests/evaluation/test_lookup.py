"""Guesses against a search by hand, and what the engine generates with them against `model.generate`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import model
from torch import nn

import ropepatch
from ropepatch.evaluation.engine import Engine, Query
from ropepatch.evaluation.lookup import FEWEST, MOST, Guesser

NEW = 48


def guesser(text: list[int], room: int = 100) -> Guesser:
    return Guesser(np.asarray(text, dtype=np.int32), room)


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=6), st.integers(0, 6))
@settings(max_examples=200)
def test_guesses_are_what_followed_the_last_time(prompt: list[int], added: list[int], left: int) -> None:
    made = guesser(prompt, len(added) + left)
    for token in added:
        made.add(token)
    text = prompt + added
    found = [i for i in range(len(text) - 3) if text[i : i + 3] == text[-3:]]
    most = min(MOST // 2, left - 1)
    assert made.guess().tolist() == (text[found[-1] + 3 :][:most] if found and most > 0 else [])


def test_guesses_become_more_where_they_are_right_and_fewer_where_they_are_not() -> None:
    made = guesser([*range(50), 0, 1, 2])
    assert len(made.guess()) == MOST // 2
    for guessed, right, then in [(8, 8, 16), (16, 16, 16), (16, 8, 16), (16, 7, 8), (8, 0, 4), (4, 0, FEWEST)]:
        made.learn(guessed, right)
        assert len(made.guess()) == then


def test_guesses_pause_where_they_go_on_being_wrong() -> None:
    made = guesser([*range(50), 0, 1, 2])
    made.learn(8, 0)
    made.learn(4, 0)
    assert len(made.guess()) == FEWEST

    def forwards_without(right: int) -> int:
        made.learn(FEWEST, right)
        return next(n for n in range(100) if len(made.guess()))

    assert [forwards_without(0) for _ in range(5)] == [2, 4, 8, MOST, MOST]
    assert [forwards_without(1), forwards_without(0), forwards_without(0)] == [0, 2, 4]


def test_no_guess_is_neither_right_nor_wrong() -> None:
    made = guesser([*range(50), 0, 1, 2])
    made.learn(8, 0)
    for _ in range(5):
        made.learn(0, 0)
    assert len(made.guess()) == 4


def _calls(net: nn.Module) -> list[int]:
    """The tokens of every forward from now on, by the model's own embedding."""
    seen: list[int] = []
    net.get_input_embeddings().register_forward_hook(lambda m, args, out: seen.append(args[0].numel()))
    return seen


@pytest.mark.parametrize("method", [None, "self_extend", "rerope", "dca", "dynamic_ntk", "ntk_by_parts"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_generates_what_the_model_generates_alone(kind: str, method: str | None) -> None:
    # A small vocabulary: the text soon goes round in circles, so that guesses are right, and not always.
    net = model(kind, vocab_size=16)
    if method is not None:
        options = {"factor": 4} if method in ("self_extend", "ntk_by_parts") else {}
        ropepatch.patch(net, method, original_length=64, **options)
    draw = np.random.default_rng(3)
    prompts = [draw.integers(3, 16, n).tolist() for n in (40, 90, 130)]
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW,
            pad_token_id=0,
            eos_token_id=[],
        )
        expected.append(output[0, len(prompt) :].tolist())
    # No answer is right, so all is generated.
    queries = [
        Query(np.asarray(prompt, dtype=np.int32), np.asarray([(new[0] + 1) % 16], dtype=np.int32), NEW)
        for prompt, new in zip(prompts, expected, strict=True)
    ]
    with Engine(net) as engine:
        visits = engine.prepare(queries)
        seen = _calls(net)
        outcomes = list(engine.run(queries, visits=visits))
        assert engine.reuse
    assert [outcome.generated for outcome in sorted(outcomes, key=lambda o: o.index)] == expected
    assert len(seen) < 0.75 * NEW * len(prompts)
    assert engine.work.tokens_computed + engine.work.tokens_decoded == sum(seen)


def test_stops_at_the_very_token_that_is_enough() -> None:
    net = model("llama", vocab_size=16)
    prompt = np.random.default_rng(3).integers(3, 16, 40).astype(np.int32)
    with Engine(net) as engine:
        whole = next(iter(engine.run([Query(prompt, np.asarray([0], dtype=np.int32), NEW)]))).generated
        assert len(whole) == NEW
        for n in (1, 2, 7, 20, 21, 22, 23, 40):
            query = Query(prompt, np.asarray([0], dtype=np.int32), NEW, lambda generated, n=n: len(generated) >= n)
            assert next(iter(engine.run([query]))).generated == whole[:n]
        end = whole[30]
        stopped = next(
            iter(engine.run([Query(prompt, np.asarray([0], dtype=np.int32), NEW)], end_tokens=frozenset([end])))
        )
        assert stopped.generated == whole[: whole.index(end) + 1]

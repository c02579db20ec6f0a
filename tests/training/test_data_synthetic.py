"""Made-up retrieval tasks: exact length, true answers, nothing by accident, depths, and tokens as of the whole text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_material import TOKENIZERS, recipe, synthetic, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from ropepatch.evaluation.task import Grid, Place
from ropepatch.evaluation.tasks.passkey import INSTRUCTION, PasskeyTask
from ropepatch.training.data import build
from ropepatch.training.data.synthetic import words
from ropepatch.training.data.synthetic.source import holds

WORDS = re.compile(r"[A-Za-z]+|\d|[^\sA-Za-z\d]")


def _rows(task: str, tokens: str, length: int, *, seed: int = 0, steps: int = 12, batch: int = 2, **more: Any) -> Any:
    cache = more.pop("cache", None)
    whole = recipe(synthetic(task, **more), length=length, seed=seed, steps=steps, batch=batch, cache=cache)
    return build(whole, tokenizer(tokens))


def _text(row: dict[str, Any], tokens: str) -> str:
    return str(tokenizer(tokens).decode(row["input_ids"], skip_special_tokens=True))


def _said(row: dict[str, Any], tokens: str) -> list[str]:
    """The words of the answers that the labels hold, one a run of labels."""
    runs: list[list[int]] = [[]]
    for label in row["labels"]:
        if label == -100:
            runs.append([])
        else:
            runs[-1].append(label)
    decoded = [tokenizer(tokens).decode(run, skip_special_tokens=True) for run in runs if run]
    return ["".join(WORDS.findall(text)) for text in decoded]


def _expected(text: str) -> list[str]:
    """What must be answered, worked out from the words of the text alone, as a reader would."""
    flat = " ".join(WORDS.findall(text)).replace("\n", " ")
    flat = re.sub(r"(?<=\d) (?=\d)", "", flat)
    number_of = dict(re.findall(r"The number of the (\w+ \w+) is (\d+) \.", flat))
    next_of = dict(re.findall(r"From the (\w+ \w+) the way leads to the (\w+ \w+) \.", flat))
    if "pass key" in flat:
        keys = re.findall(r"The pass key is (\d+) \. Remember it \. (\d+) is the pass key \.", flat)
        assert len(keys) == 1 and keys[0][0] == keys[0][1]
        return [keys[0][0]]
    asked = re.findall(r"What is the number of the (\w+ \w+) \?", flat)
    if asked:
        return [number_of[name] for name in asked]
    (name,) = re.findall(r"Where does the way from the (\w+ \w+) lead \?", flat)
    walk = ""
    while name in next_of:
        name = next_of[name]
        walk += f"the {name} ,"
    return [f"{walk}number{number_of[name]}".replace(" ", "")]


@pytest.mark.parametrize("tokens", TOKENIZERS)
@pytest.mark.parametrize("length", [160, 517])
def test_length_is_exact_and_labels_are_the_true_answers(tokens: str, length: int) -> None:
    for row in _rows("mixed", tokens, length, steps=6):
        assert len(row["input_ids"]) == length
        assert row["documents"] == [1] * length
        answers = _expected(_text(row, tokens))
        assert answers and _said(row, tokens) == answers
        assert row["labels"][-1] == row["input_ids"][-1] == tokenizer(tokens).eos_token_id


@pytest.mark.parametrize("tokens", TOKENIZERS)
def test_tokens_are_those_of_the_whole_text(tokens: str) -> None:
    tok = tokenizer(tokens)
    same = 0
    rows = list(_rows("mixed", tokens, 400, steps=12))
    for row in rows:
        lead = 1 if tokens == "bos" else 0
        ids = row["input_ids"][lead:-1]
        same += tok(tok.decode(ids), add_special_tokens=False)["input_ids"] == ids
    # Where the haystack is cut for the exact length, two tokens may stand that the tokenizer would have joined.
    assert same >= {"fused": 0.7, "metaspace": 0.7}.get(tokens, 1) * len(rows)


def test_all_tokens_count_where_that_is_asked_for() -> None:
    for row in _rows("mixed", "bytes", 300, answer_only=False):
        assert row["labels"] == row["input_ids"]


def test_answers_lie_at_all_depths_both_ends_included() -> None:
    depths = []
    for row in _rows("passkey", "words", 600, steps=64):
        text = _text(row, "words")
        at = text.index("The pass key is")
        first, last = len(INSTRUCTION), text.rindex("What is the pass key")
        depths.append((at - first) / (last - first))
    assert min(depths) < 0.03
    assert max(depths) > 0.85
    counts, _ = np.histogram(depths, bins=4, range=(0, 1))
    assert counts.min() > 128 / 8


def test_the_passkey_is_worded_as_the_suite_words_it() -> None:
    """The haystack aside, which begins with another of its sentences."""
    suite = PasskeyTask(tokenizer("bytes"), Grid((400,), (0.5,), 1))
    asked = tokenizer("bytes").decode(suite.build(Place("passkey", 400, 0.5, 0)).ids)
    trained = _text(_rows("passkey", "bytes", 400)[1], "bytes")

    def frame(text: str) -> list[str]:
        lines = text.split("\n")
        return [re.sub(r"\d+", "N", line) for line in (lines[0], lines[2], lines[-1])]

    assert frame(trained)[:2] == frame(asked)[:2]
    assert frame(trained)[2] == f"{frame(asked)[2]} N"


@pytest.mark.parametrize("task", ["key_value", "multi_hop"])
def test_the_other_tasks_are_worded_apart_from_every_suite(task: str) -> None:
    from ropepatch.evaluation import needles
    from ropepatch.evaluation.tasks import key_value, passkey

    text = _text(_rows(task, "words", 500)[1], "words").lower()
    for said in (needles.INSTRUCTION, key_value.INSTRUCTION, key_value.REPLY, passkey.QUESTION, "special magic", "VAR"):
        assert " ".join(WORDS.findall(said.lower())) not in text


@given(seed=st.integers(0, 2**31), task=st.sampled_from(["key_value", "multi_hop"]))
def test_no_name_and_no_number_stands_for_two(seed: int, task: str) -> None:
    row = _rows(task, "words", 500, seed=seed, steps=1, batch=1)[0]
    text = re.sub(r"(?<=\d) (?=\d)", "", _text(row, "words"))
    facts = re.findall(r"The number of the (\w+ \w+) is (\d+)", text)
    assert len({name for name, _ in facts}) == len({number for _, number in facts}) == len(facts)
    ways = re.findall(r"From the (\w+ \w+) the way leads to the (\w+ \w+)", text)
    assert len({a for a, _ in ways}) == len({b for _, b in ways}) == len(ways)


def test_rows_differ_and_seeds_differ() -> None:
    first = [row["input_ids"] for row in _rows("mixed", "bytes", 300)]
    assert len({tuple(ids) for ids in first}) == len(first)
    assert [row["input_ids"] for row in _rows("mixed", "bytes", 300, seed=1)] != first
    assert [row["input_ids"] for row in _rows("mixed", "bytes", 300)] == first


def test_facts_stand_between_the_sentences_of_a_real_text(tmp_path: Path) -> None:
    sentences = [f"Sentence {n} says that {n} is a number, e.g. a count." for n in range(900)]
    (tmp_path / "a.txt").write_text(" ".join(sentences))
    begins = set()
    for row in _rows("key_value", "bytes", 400, haystack=str(tmp_path / "a.txt"), cache=str(tmp_path / "cache")):
        text = _text(row, "bytes")
        assert _said(row, "bytes") == _expected(text)
        hay = text.split("\n")[1]
        hay = re.sub(r" ?The number of the \w+ \w+ is \d+\.", "", hay)
        begins.add(hay.split(" says")[0])
        # What is left is the text itself, cut at its end.
        assert hay.strip() in " ".join(sentences)
        for place in re.finditer(r"(.{6}) The number of the", text.split("\n")[1]):
            assert place[1].endswith((".", ". "))
    assert len(begins) > 10


def test_a_haystack_never_holds_an_answer(tmp_path: Path) -> None:
    # Half of all numbers of 5 digits stand in it.
    (tmp_path / "a.txt").write_text(" ".join(f"Mark {n}." for n in range(10_000, 11_500)))
    for row in _rows("passkey", "bytes", 300, haystack=str(tmp_path / "a.txt"), cache=str(tmp_path / "cache")):
        text = _text(row, "bytes")
        (key,) = _expected(text)
        assert text.count(key) == 3


@given(
    st.lists(st.integers(0, 3), max_size=12), st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), min_size=1)
)
def test_a_sequence_is_found_where_it_is(ids: list[int], sequences: list[list[int]]) -> None:
    brute = any(ids[at : at + len(s)] == s for s in sequences for at in range(len(ids) - len(s) + 1))
    assert holds(np.asarray(ids, dtype=np.int64), sequences) == brute


@pytest.mark.parametrize("task", ["passkey", "key_value", "multi_hop"])
def test_the_words_of_a_task_are_all_there_are(task: str) -> None:
    known = set(WORDS.findall(" ".join(words(task))))
    for row in _rows(task, "words", 700):
        assert tokenizer("words").unk_token_id not in row["input_ids"]
        assert set(WORDS.findall(_text(row, "words"))) <= known

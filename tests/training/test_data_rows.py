"""Rows of texts: packing, order, epochs, stages, and that a row depends on the recipe and its index alone."""

from __future__ import annotations

import itertools
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_material import files, recipe, synthetic, tokenizer, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from ropepatch.errors import OptionError, PromptError
from ropepatch.training.data import build
from ropepatch.training.data.packing import CutWindows, choose
from ropepatch.training.data.plan import Plan
from ropepatch.training.data.store import Store, Writer
from ropepatch.training.rows import Share


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_documents(tmp_path / "texts", 40)
    return tmp_path / "texts"


def _build(tmp_path: Path, *sources: dict[str, Any], tokens: str = "bytes", **options: Any) -> Any:
    return build(recipe(*sources, cache=str(tmp_path / "cache"), **options), tokenizer(tokens))


def _pieces(row: dict[str, Any]) -> list[list[int]]:
    """The documents of a row, by its numbers."""
    pairs = zip(row["documents"], row["input_ids"], strict=True)
    return [[token for _, token in group] for _, group in itertools.groupby(pairs, key=lambda pair: pair[0])]


def test_a_row_is_full_and_says_what_the_contract_says(corpus: Path, tmp_path: Path) -> None:
    rows = _build(tmp_path, files(corpus), length=48, steps=5, batch=3)
    assert len(rows) == 15
    for index, row in enumerate(rows):
        assert sorted(row) == ["documents", "index", "input_ids", "labels"]
        assert row["index"] == index
        assert row["labels"] == row["input_ids"]
        assert row["documents"] == [1] * 48
        assert all(type(value) is int for value in row["input_ids"])


@pytest.mark.parametrize("tokens", ["bytes", "bos", "metaspace"])
def test_windows_hold_whole_documents_in_order_with_begin_and_end(corpus: Path, tmp_path: Path, tokens: str) -> None:
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    tok = tokenizer(tokens)
    lead = [tok.bos_token_id] if tokens == "bos" else []
    known = [[*lead, *tok(text, add_special_tokens=False)["input_ids"], tok.eos_token_id] for text in texts]
    rows = _build(tmp_path, files(corpus), length=100, steps=6, isolate_documents=True, tokens=tokens)
    for row in rows:
        pieces = _pieces(row)
        assert [number for number, _ in itertools.groupby(row["documents"])] == list(range(1, len(pieces) + 1))
        for piece in pieces[1:-1]:
            assert piece in known
        assert any(document[-len(pieces[0]) :] == pieces[0] for document in known) or len(pieces) == 1
        assert any(document[: len(pieces[-1])] == pieces[-1] for document in known) or len(pieces) == 1


def _store(folder: Path, lengths: list[int]) -> Store:
    """Every token of it is another number."""
    folder.mkdir()
    numbers = itertools.count()
    with Writer(folder, 2**20, marked=False) as writer:
        for length in lengths:
            writer.add([next(numbers) for _ in range(length)])
    writer.finish({})
    return Store(folder)


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    stages=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=1, max_size=3),
    seed=st.integers(0, 5),
)
def test_each_epoch_is_every_token_once(
    lengths: list[int], stages: list[tuple[int, int]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = _store(tmp_path_factory.mktemp("store") / "s", lengths)
    total = sum(lengths)
    plan = Plan(tuple(count for count, _ in stages), tuple(min(length, total) for _, length in stages))
    chosen = choose(store, "x", least=1, long=None, times=1)
    made = CutWindows(store, chosen, plan, what=(seed,), where="x", isolate=True)
    # All windows laid out in the order in which they take from the line: the line itself, epoch after epoch.
    starts = sorted(made._start(number) for number in range(len(plan)))
    assert [start for start, _ in starts] == [0, *itertools.accumulate(length for _, length in starts)][: len(starts)]
    by_start = {made._start(number)[0]: made.window(number).ids.tolist() for number in range(len(plan))}
    line = [token for start in sorted(by_start) for token in by_start[start]]
    for epoch in range(0, len(line), total):
        counts = Counter(line[epoch : epoch + total])
        assert max(counts.values(), default=1) == 1
        assert len(line) < epoch + total or len(counts) == total
        # Documents are whole: a token that does not begin one follows the one before it.
        begins = {0, *itertools.accumulate(lengths)}
        part = line[epoch : epoch + total]
        assert all(b in begins or b == a + 1 for a, b in itertools.pairwise(part))


def test_windows_of_a_long_document_do_not_follow_each_other(tmp_path: Path) -> None:
    store = _store(tmp_path / "s", [10_000])
    made = CutWindows(
        store, choose(store, "x", least=1, long=None, times=1), Plan((100,), (50,)), what=(0,), where="x", isolate=False
    )
    firsts = [int(made.window(number).ids[0]) for number in range(100)]
    assert sum(b == a + 50 for a, b in itertools.pairwise(firsts)) < 10


def test_orders_differ_by_epoch_seed_and_source(corpus: Path, tmp_path: Path) -> None:
    def ids(**options: Any) -> list[Any]:
        return [row["input_ids"] for row in _build(tmp_path, files(corpus), length=200, **options)]

    first = ids(steps=40, batch=2)
    assert ids(steps=40, batch=2) == first
    assert ids(steps=40, batch=2, seed=1) != first
    twice = _build(tmp_path, files(corpus), files(corpus), length=200, steps=4, batch=2)
    assert twice[0]["input_ids"] != twice[1]["input_ids"]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_processes_together_read_the_same_rows(corpus: Path, tmp_path: Path, groups: int) -> None:
    sources = (files(corpus), synthetic("key_value", weight=0.5))
    whole = list(_build(tmp_path, *sources, length=128, steps=4))
    read: dict[int, Any] = {}
    for group in range(groups):
        rows = _build(tmp_path, *sources, length=128, steps=4)  # each process builds its own
        share = Share(steps=4, batch_size=4, group=group, groups=groups)
        for first_step in (0, 2):  # and a resumed one too
            for micro in share.micro_batches(first_step):
                for index in micro:
                    assert read.setdefault(index, rows[index]) == rows[index]
    assert [read[index] for index in range(len(whole))] == whole


def test_rows_survive_pickling_without_their_tokens(corpus: Path, tmp_path: Path) -> None:
    rows = _build(tmp_path, files(corpus), synthetic(weight=0.5), length=300)
    state = pickle.dumps(rows)
    copy = pickle.loads(state)
    assert [copy[index] for index in (5, 2, 9)] == [rows[index] for index in (5, 2, 9)]
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_stages_have_their_lengths_and_go_on_through_the_text(tmp_path: Path) -> None:
    write_documents(tmp_path / "texts", 200)
    rows = _build(tmp_path, files(tmp_path / "texts"), batch=2, stages=[(3, 100), (2, 200)], isolate_documents=True)
    assert [len(row["input_ids"]) for row in rows] == [100] * 6 + [200] * 4
    pieces = Counter(tuple(piece) for row in rows for piece in _pieces(row)[1:-1])
    assert max(pieces.values()) == 1  # no whole document was seen in both


def test_short_documents_are_left_out_and_long_ones_taken_more_often(tmp_path: Path) -> None:
    store = _store(tmp_path / "s", [3, 10, 20, 4, 30])
    assert choose(store, "x", least=4, long=None, times=3).tolist() == [1, 2, 3, 4]
    assert choose(store, "x", least=1, long=20, times=3).tolist() == [0, 1, 2, 2, 2, 3, 4, 4, 4]
    with pytest.raises(PromptError, match=r"(?i)no document of x has .*Given: 31\. Allowed: at most 30"):
        choose(store, "x", least=31, long=None, times=1)


def test_sources_share_windows_by_weight(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} " * 2000)
    rows = _build(tmp_path, files(tmp_path / "a.txt", weight=3), files(tmp_path / "b.txt"), tokens="bytes", steps=10)
    kinds = ["a" if "a" in tokenizer().decode(row["input_ids"]) else "b" for row in rows]
    assert kinds.count("a") == 30
    assert all(abs(kinds[:n].count("a") - 0.75 * n) < 1 for n in range(1, 41))


def test_a_text_that_is_too_short(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three")
    with pytest.raises(PromptError, match=r"too little text: \d+ tokens in all, and one window needs 64"):
        _build(tmp_path, files(tmp_path / "a.txt"), length=64)


def test_how_long_to_train_must_be_said(corpus: Path) -> None:
    whole = recipe(files(corpus))
    with pytest.raises(OptionError, match="how long to train"):
        build(whole.model_copy(update={"train": whole.train.model_copy(update={"max_steps": None})}), tokenizer())


def test_tables_and_folders_give_a_document_a_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = [f"{n} {n} {n}" for n in range(20)]
    folder = tmp_path / "data" / "deep"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"body": text, "id": 1}) for text in texts[:10]) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.table({"body": texts[10:]}), folder / "b.parquet")
    rows = _build(
        tmp_path, files(tmp_path / "data", column="body"), length=20, steps=20, batch=1, isolate_documents=True
    )
    whole = [tokenizer().decode(piece[:-1]) for row in rows for piece in _pieces(row)[1:-1]]
    assert set(whole) <= set(texts)
    assert len(set(whole)) > 10


def test_a_folder_that_datasets_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="needs the package datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "set").mkdir()
    texts = [f"{n} {n} {n}" for n in range(30)]
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = {"kind": "dataset", "name": str(tmp_path / "set")}
    rows = _build(tmp_path, source, length=20, isolate_documents=True)
    assert {tokenizer().decode(piece[:-1]) for row in rows for piece in _pieces(row)[1:-1]} <= set(texts)
    kept = sorted((tmp_path / "cache").iterdir())
    assert list(_build(tmp_path, source, length=20, isolate_documents=True)) == list(rows)
    assert sorted((tmp_path / "cache").iterdir()) == kept
    with pytest.raises(PromptError, match=r"has no column 'body'\. Allowed: text"):
        _build(tmp_path, {**source, "column": "body"})
    with pytest.raises(PromptError, match=r"(?i)cannot load the data set .*split"):
        _build(tmp_path, {**source, "split": "test"})
    with pytest.raises(PromptError, match="(?i)cannot load the data set"):
        _build(tmp_path, {**source, "name": str(tmp_path / "nowhere")})


def test_the_reference_of_python_is_there_anyway(tmp_path: Path) -> None:
    rows = _build(tmp_path, files("stdlib"), length=256, steps=1, isolate_documents=True)
    assert "Python" in "".join(tokenizer().decode(row["input_ids"]) for row in rows) or len(rows) == 4

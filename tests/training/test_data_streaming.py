"""Streams: the same windows whenever they are asked for, epoch after epoch."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from data_material import recipe, tokenizer

from ropepatch.errors import PromptError
from ropepatch.training.data import build

pytest.importorskip("datasets", reason="needs the package datasets")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "set").mkdir()
    texts = [" ".join([str(n)] * (1 + n % 7)) for n in range(60)]
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"kind": "dataset", "name": str(tmp_path / "set"), "streaming": True}


def _rows(source: dict[str, Any], **options: Any) -> Any:
    return build(recipe(source, **{"length": 24, "steps": 12, "isolate_documents": True, **options}), tokenizer())


def test_windows_are_full_and_documents_whole(source: dict[str, Any]) -> None:
    rows = list(_rows(source))
    for row in rows:
        assert len(row["input_ids"]) == 24
        assert row["documents"] == sorted(row["documents"])
    line = tokenizer().decode([token for row in rows for token in row["input_ids"]])
    documents = line.split("</s>")[:-1]
    assert all(len(set(text.split())) == 1 for text in documents)
    # Every document once before any comes again, and in another order.
    first, second = documents[:60], documents[60:120]
    assert len(set(first)) == 60
    assert len(second) > 30 and len(set(second)) == len(second)
    assert first[: len(second)] != second


def test_a_row_is_the_same_in_any_order_and_process(source: dict[str, Any]) -> None:
    rows = _rows(source)
    whole = list(rows)
    assert [rows[index] for index in (40, 3, 2, 41)] == [whole[index] for index in (40, 3, 2, 41)]
    assert _rows(source)[30] == whole[30]  # a resumed run
    assert pickle.loads(pickle.dumps(rows))[7] == whole[7]
    assert [row["input_ids"] for row in _rows(source, seed=1)] != [row["input_ids"] for row in whole]


def test_short_documents_are_left_out(source: dict[str, Any]) -> None:
    ids = [token for row in _rows(source, min_tokens=9, isolate_documents=False) for token in row["input_ids"]]
    assert all(len(text.split()) > 2 for text in tokenizer().decode(ids).split("</s>")[:-1])
    with pytest.raises(PromptError, match="(?i)no document of data.min_tokens"):
        _rows(source, min_tokens=90)

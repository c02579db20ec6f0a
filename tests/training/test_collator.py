"""Batches: which positions and which mask rows get, for each thing that a recipe can ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ropepatch.errors import OptionError
from ropepatch.training.positions import Collator, generator_of, pose_positions, random_positions
from ropepatch.training.recipe import Recipe


def recipe(length: int = 16, *, isolate: bool = False, seed: int = 0, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "x"},
            "data": {
                "length": length,
                "sources": [{"kind": "files", "path": "x"}],
                "isolate_documents": isolate,
            },
            "train": {"max_steps": None if "stages" in train else 4, "batch_size": 2, "seed": seed, **train},
        }
    )


def row(index: int, documents: list[int]) -> dict[str, Any]:
    tokens = list(range(100 * index, 100 * index + len(documents)))
    labels = [token if number else -100 for token, number in zip(tokens, documents, strict=True)]
    return {"input_ids": tokens, "labels": labels, "documents": documents, "index": index}


POSE = {"kind": "pose", "target_length": 64}


def test_a_plain_batch() -> None:
    rows = [row(0, [1] * 16), row(1, [1] * 10 + [2] * 4 + [0] * 2)]
    batch = Collator(recipe())(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids", "attention_mask"}
    assert all(value.dtype == torch.int64 and value.shape == (2, 16) for value in batch.values())
    assert batch["input_ids"].tolist() == [entry["input_ids"] for entry in rows]
    assert batch["labels"].tolist() == [entry["labels"] for entry in rows]
    assert torch.equal(batch["position_ids"], torch.arange(16).expand(2, -1))
    assert bool((batch["attention_mask"] == 1).all())


def test_isolated_documents_start_anew_and_have_no_mask() -> None:
    batch = Collator(recipe(isolate=True))([row(0, [1, 1, 1, 2, 3, 3, 0, 0])])
    assert "attention_mask" not in batch
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 0, 1]]


@pytest.mark.parametrize("numbered", [False, True])
def test_an_isolated_document_does_not_foretell_the_next_one(numbered: bool) -> None:
    """Labels are not shifted: that of a document's first token is the loss of the token before it."""
    entry = row(1, [1, 1, 1, 2, 3, 3, 0, 0])
    batch = Collator(recipe(isolate=True), numbered=numbered)([entry])
    assert batch["labels"].tolist() == [[-100, 101, 102, -100, -100, 105, -100, -100]]
    assert Collator(recipe())([entry])["labels"].tolist() == [entry["labels"]]


def test_numbered_documents_stand_in_the_mask() -> None:
    documents = [1, 1, 1, 2, 3, 3, 0, 0]
    batch = Collator(recipe(isolate=True), numbered=True)([row(0, documents)])
    assert batch["attention_mask"].tolist() == [documents]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 0, 1]]


@pytest.mark.parametrize("kind", ["pose", "random"])
def test_skipped_positions_are_those_of_seed_and_row(kind: str) -> None:
    collate = Collator(recipe(seed=5, positions={**POSE, "kind": kind}))
    batch = collate([row(3, [1] * 16), row(9, [1] * 16)])
    for line, index in zip(batch["position_ids"], (3, 9), strict=True):
        generator = generator_of(5, index)
        expected = pose_positions(16, 64, 2, generator) if kind == "pose" else random_positions(16, 64, generator)
        assert torch.equal(line, expected)
    assert bool((batch["attention_mask"] == 1).all())


def test_a_row_gets_the_same_positions_in_any_batch() -> None:
    collate, rows = Collator(recipe(positions=POSE)), [row(index, [1] * 16) for index in range(6)]
    whole = collate(rows)["position_ids"]
    for index in (4, 1):
        assert torch.equal(collate([rows[index]])["position_ids"][0], whole[index])
    assert len({tuple(line) for line in whole.tolist()}) > 1


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(0, 6),
    st.sampled_from(["pose", "random"]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_skipping_stays_below_the_target(sizes: list[int], padding: int, kind: str, isolate: bool, index: int) -> None:
    documents = [number for number, size in enumerate(sizes, start=1) for _ in range(size)] + [0] * padding
    target = len(documents) + index % 30
    settings = recipe(len(documents), isolate=isolate, positions={"kind": kind, "chunks": 3})
    positions = Collator(settings, target, numbered=True)([row(index, documents)])["position_ids"][0]
    assert int(positions.min()) >= 0
    assert int(positions.max()) < target
    groups = torch.tensor(documents) if isolate else torch.zeros(len(documents))
    for number in groups.unique():
        own = positions[groups == number]
        assert bool((own.diff() > 0).all())
        if kind == "pose":
            assert int(own[0]) == 0


def test_the_target_is_the_recipes_else_the_patchs() -> None:
    rows = [row(index, [1] * 8) for index in range(300)]
    stated = Collator(recipe(8, positions={"kind": "random", "target_length": 20}), 1000)(rows)["position_ids"]
    patched = Collator(recipe(8, positions={"kind": "random"}), 40)(rows)["position_ids"]
    assert int(stated.max()) == 19
    assert int(patched.max()) == 39


def test_each_stage_has_its_target() -> None:
    stages = [{"steps": 50, "length": 8}, {"steps": 50, "length": 8}]
    collate = Collator(recipe(8, stages=stages, positions={"kind": "random"}), [10, 30])
    early = collate([row(index, [1] * 8) for index in range(100)])["position_ids"]
    late = collate([row(index, [1] * 8) for index in range(100, 200)])["position_ids"]
    assert int(early.max()) == 9
    assert int(late.max()) == 29


def test_what_cannot_be_is_refused_before_any_row() -> None:
    with pytest.raises(OptionError, match=r"target_length"):
        Collator(recipe(positions={"kind": "pose"}))
    with pytest.raises(OptionError, match=r"target_length"):
        Collator(recipe(positions={"kind": "pose"}), [None])
    with pytest.raises(OptionError, match="training_attention"):
        Collator(recipe(isolate=True, positions=POSE))
    with pytest.raises(OptionError, match="each stage"):
        Collator(recipe(positions={"kind": "pose"}), [64, 64])


def test_rows_of_one_length_and_within_the_target() -> None:
    with pytest.raises(OptionError, match="one length"):
        Collator(recipe())([row(0, [1] * 8), row(1, [1] * 9)])
    with pytest.raises(OptionError, match="target"):
        Collator(recipe(positions={"kind": "pose", "target_length": 8}))([row(0, [1] * 16)])

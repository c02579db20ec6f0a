"""Slices of a sequence: every token once, the same work for all, labels that need no neighbour."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ropepatch.attention.visibility import INVISIBLE
from ropepatch.errors import OptionError, UsageError
from ropepatch.training.parallel.context import ContextParallel
from ropepatch.training.parallel.sharded import shard
from ropepatch.training.parallel.slices import IGNORED, balanced_slots, contiguous_slots, whole_of

sizes = st.integers(1, 6)


@given(size=sizes, chunk=st.integers(1, 9))
def test_slices_hold_every_token_once_in_order(size: int, chunk: int) -> None:
    length = 2 * size * chunk
    for slots in (balanced_slots(length, size), contiguous_slots(length, size)):
        assert sorted(torch.cat(slots).tolist()) == list(range(length))
        assert all(len(part) == length // size and bool((part.diff() > 0).all()) for part in slots)


@given(size=sizes, chunk=st.integers(1, 9))
def test_balanced_slices_see_equally_many_keys(size: int, chunk: int) -> None:
    seen = [int((part + 1).sum()) for part in balanced_slots(2 * size * chunk, size)]
    assert len(set(seen)) == 1


@given(size=sizes, length=st.integers(2, 40), seed=st.integers(0, 99))
def test_slices_predict_what_the_whole_predicts(size: int, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50, (2, length), generator=generator)
    whole = whole_of({"input_ids": ids, "labels": ids}, 2 * size)
    pairs = set()
    for slots in balanced_slots(whole.input_ids.shape[1], size):
        part = whole.slice(slots)
        for row, tokens in enumerate(part["input_ids"]):
            for slot, token, label in zip(slots, tokens, part["shifted_labels"][row], strict=True):
                if label != IGNORED:
                    pairs.add((row, int(slot), int(token), int(label)))
    assert pairs == {(r, i, int(ids[r, i]), int(ids[r, i + 1])) for r in range(2) for i in range(length - 1)}


def test_padding_is_seen_by_nothing() -> None:
    ids = torch.arange(1, 6)[None]
    masked = whole_of({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 4)
    assert masked.attention_mask is not None
    assert masked.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    assert masked.documents is None
    plain = whole_of({"input_ids": ids}, 4)
    assert plain.documents is not None
    assert plain.documents.tolist() == [[0] * 5 + [INVISIBLE] * 3]


def test_documents_begin_where_positions_jump() -> None:
    ids, positions = torch.ones(1, 6, dtype=torch.int64), torch.tensor([[0, 1, 2, 0, 1, 7]])
    found = whole_of({"input_ids": ids, "position_ids": positions}, 2).documents
    assert found is not None
    assert found.tolist() == [[0, 0, 0, 1, 1, 2]]
    assert whole_of({"input_ids": ids}, 2).documents is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"token_type_ids": torch.ones(1, 4)},
        {"attention_mask": torch.ones(1, 1, 4, 4)},
        {"position_ids": torch.arange(3)[None]},
        {"labels": torch.ones(1, 4), "shifted_labels": torch.ones(1, 4)},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_what_cannot_be_split_is_refused(wrong: dict[str, torch.Tensor]) -> None:
    with pytest.raises(OptionError, match="split over processes"):
        whole_of({"input_ids": torch.ones(1, 4, dtype=torch.int64), **wrong}, 4)


def test_one_process_shares_nothing() -> None:
    with pytest.raises(UsageError, match="needs several processes.*torchrun"):
        ContextParallel.start(2)
    with pytest.raises(UsageError, match="needs several processes"):
        shard(torch.nn.Linear(2, 2))

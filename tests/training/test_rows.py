"""Which rows a process reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ropepatch.errors import OptionError
from ropepatch.training.rows import Share, StepSampler, loader


@given(
    steps=st.integers(1, 6),
    micro=st.integers(1, 3),
    groups=st.integers(1, 4),
    times=st.integers(1, 3),
    first=st.integers(0, 6),
)
def test_every_step_reads_its_own_rows_whoever_shares_them(
    steps: int, micro: int, groups: int, times: int, first: int
) -> None:
    batch = micro * groups * times
    shares = [Share(steps, batch, micro, group, groups) for group in range(groups)]
    read = [list(StepSampler(share, min(first, steps))) for share in shares]
    assert all(len(rows) == micro for batches in read for rows in batches)
    for step in range(min(first, steps), steps):
        place = (step - min(first, steps)) * times
        together = [row for batches in read for rows in batches[place : place + times] for row in rows]
        assert sorted(together) == list(range(step * batch, (step + 1) * batch))
    # The Trainer counts its steps by the length, which is that of the whole run.
    assert {len(StepSampler(share, first)) for share in shares} == {steps * times}


def test_a_batch_that_the_processes_cannot_share_is_refused() -> None:
    with pytest.raises(OptionError, match=r"multiple of train\.micro_batch_size.*next multiple is 12"):
        Share(3, 10, 2, 0, 3)


def test_the_loader_hands_out_rows_and_refuses_too_few() -> None:
    rows = [{"index": index} for index in range(12)]
    share = Share(3, 4, 2, 1, 2)
    found = list(loader(rows, share, lambda batch: [row["index"] for row in batch], first_step=1))
    assert found == [[6, 7], [10, 11]]
    with pytest.raises(OptionError, match="fewer windows"):
        loader(rows[:-1], share, list)

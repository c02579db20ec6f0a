"""When a run stops before its last step."""

from __future__ import annotations

import pytest

from ropepatch.training.early_stop import has_stalled
from ropepatch.training.recipe import EarlyStop

RULE = EarlyStop(window=2, patience=2, min_delta=0.1)


def lines(*losses: float, every: int = 1) -> list[dict[str, float]]:
    return [{"step": every * number, "loss": loss} for number, loss in enumerate(losses, start=1)]


@pytest.mark.parametrize(
    ("losses", "stalled"),
    [
        ([], False),
        ([3, 3], False),
        ([3, 3, 3, 3], False),
        ([3, 3, 3, 3, 3], False),  # the third window is not full
        ([3, 3, 3, 3, 3, 3], True),
        ([3, 3, 2, 2, 1, 1], False),
        ([3, 3, 2.95, 2.95, 2.91, 2.91], True),  # each within min_delta of the best
        ([3, 3, 3, 3, 2, 2, 2, 2], False),  # it fell in between
        ([3, 3, 2, 4, 2, 4, 3, 3], True),  # windows are averaged
    ],
)
def test_windows_without_a_fall(losses: list[float], stalled: bool) -> None:
    assert has_stalled(lines(*losses), RULE) is stalled


def test_steps_that_are_not_logged_count() -> None:
    assert not has_stalled(lines(3, 3, every=2), RULE)
    assert has_stalled(lines(3, 3, 3, every=2), RULE)

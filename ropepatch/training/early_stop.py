"""When training stops before its last step: the loss has not fallen for a while."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ropepatch.training.recipe import EarlyStop


def has_stalled(lines: Iterable[Mapping[str, Any]], rule: EarlyStop) -> bool:
    """Whether the loss, averaged over whole windows of steps, has not fallen by `min_delta` for `patience` windows.

    A pure function of what was logged, so that a resumed run decides as an unbroken one.

    Args:
        lines: `step` (from 1) and `loss` of logged steps.
        rule: the recipe's.
    """
    windows: dict[int, list[float]] = {}
    last = 0
    for line in lines:
        windows.setdefault((line["step"] - 1) // rule.window, []).append(line["loss"])
        last = max(last, line["step"])
    means = [
        sum(losses) / len(losses) for number, losses in sorted(windows.items()) if (number + 1) * rule.window <= last
    ]
    best, waited = float("inf"), 0
    for mean in means:
        if mean < best - rule.min_delta:
            best, waited = mean, 0
        else:
            waited += 1
    return waited >= rule.patience

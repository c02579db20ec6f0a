"""A progress bar in units of work, not of trials: a long prompt takes more than its share, a shared prefix nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ropepatch.evaluation.cache import unheard
from ropepatch.evaluation.trie import token_cost


@contextmanager
def progress_bar(source: Any, total: float, quadratic: float, show: bool) -> Iterator[None]:
    """Show how far `source` is while it computes.

    Args:
        source: its `on_tokens` is called with (start, end) for every block of positions that it computes.
        total: all work, in the units of `token_cost`.
        quadratic: as for `token_cost`.
        show: False for no bar.
    """
    if not show:
        yield
        return
    with _bar() as bar:
        task = bar.add_task("evaluating", total=total)
        source.on_tokens = lambda start, end: bar.advance(task, token_cost(start, end, quadratic=quadratic))
        try:
            yield
        finally:
            source.on_tokens = unheard


@contextmanager
def time_bar(seconds: float, show: bool) -> Iterator[Callable[[float, int], None]]:
    """Show how much of a time budget is used.

    Args:
        seconds: the budget.
        show: False for no bar.

    Yields:
        A function to tell the seconds used and the trials run so far.
    """
    if not show:
        yield lambda *_: None
        return
    with _bar() as bar:
        task = bar.add_task("evaluating", total=seconds)

        def tell(used: float, trials: int) -> None:
            words = f"evaluating, {trials} trial{'' if trials == 1 else 's'}"
            bar.update(task, completed=min(used, seconds), description=words)

        yield tell


def say(text: str) -> None:
    """A line to the person who waits."""
    print(text, file=sys.stderr, flush=True)


def quadratic_cost(model: Any) -> float:
    """The work of one query-key pair over all layers, relative to one token's work in the weights."""
    config = model.config.get_text_config(decoder=True)
    parameters: int = sum(p.numel() for p in model.parameters())
    return float(2 * config.num_hidden_layers * config.hidden_size / parameters)


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    return Progress(
        *columns, TextColumn("left"), TimeRemainingColumn(), console=Console(stderr=True), speed_estimate_period=120
    )

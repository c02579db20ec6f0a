"""A progress bar of a training run, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def training_bar(steps: int, done: int, show: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show how far a run is.

    Args:
        steps, done: optimizer steps in all, and before this call.
        show: False for no bar.

    Yields:
        A function to tell each line of the log.
    """
    if not show:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("training", total=steps, completed=done)

        def tell(line: dict[str, Any]) -> None:
            words = f"training, loss {line['loss']:.3f}, {line['tokens_per_s']:,.0f} tokens/s"
            bar.update(task, completed=line["step"], description=words)

        yield tell

"""What a method of the `embeddings` seam needs: the table it starts from, its rule, and its registration.

A rule is one function from a `PositionTable`, a number of rows and the options to new rows. The maths is pure: CPU
tensors in, CPU tensors out, float32 at both ends. `linear` and `nope` carry a rule beside what they do elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ropepatch.methods._base import METHODS, MethodOptions
from ropepatch.methods._sinusoid import Sinusoid


@dataclass(frozen=True)
class PositionTable:
    """The rows of a table that positions read.

    Attributes:
        rows: [L, d], float32, CPU; row p is that of position p.
        law: how they were computed; None where they were learned.
        start: the row of the whole table that position 0 reads, which is where the law counts from.
    """

    rows: Tensor
    law: Sinusoid | None = None
    start: int = 0


Compute = Callable[[PositionTable, int, Any], Tensor]
Grid = Callable[[Tensor, tuple[int, int], Any], Tensor]


@dataclass(frozen=True)
class TableRule:
    """What a method makes of a position table.

    Attributes:
        compute: (table, length, options) to rows [length, d], float32.
        grid: (rows [height, width, d], (new height, new width), options) to rows of the new size; None: the method has
            no form on two axes.
        only: options that speak of tables alone, refused where the model has none.
        without: options that a table has no use for, refused where it is one.
        becomes: the mechanism that it puts in the place of the model's own, or None.
        attends: the method's scheme goes into the attention of the model, in the place of the table.
        defaults: values that options of None take on a table.
    """

    compute: Compute
    grid: Grid | None = None
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    becomes: str | None = None
    attends: bool = False
    defaults: tuple[tuple[str, Any], ...] = ()

    @property
    def silent(self) -> bool:
        """Nothing is read from the table any more, whatever becomes of its rows."""
        return self.compute is zeros


def zeros(table: PositionTable, length: int, options: Any) -> Tensor:
    """Rows that add nothing."""
    del options
    return torch.zeros(length, table.rows.shape[-1])


@dataclass(frozen=True)
class TableMethod:
    """A registered method that position tables alone have."""

    name: str
    aliases: tuple[str, ...]
    options: type[MethodOptions]
    table: TableRule
    paper: str
    summary: str
    mechanisms: tuple[str, ...]
    finetune: str = ""
    rope_type: None = None
    seam: ClassVar[str] = "embeddings"


def table_method(
    name: str,
    *,
    options: type[MethodOptions],
    paper: str,
    summary: str,
    aliases: tuple[str, ...] = (),
    mechanisms: tuple[str, ...] = ("learned", "sinusoidal"),
    finetune: str = "",
    becomes: str | None = None,
) -> Callable[[Compute], Compute]:
    """Register the decorated function as a method of the `embeddings` seam, as `frequency_method` does."""

    def register(compute: Compute) -> Compute:
        rule = TableRule(compute, becomes=becomes)
        method = TableMethod(name, aliases, options, rule, paper, summary, mechanisms, finetune)
        METHODS.register(name, aliases=aliases)(method)
        return compute

    return register

"""What the methods share that put relative positions in the place of a position table."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from ropepatch.methods._attention import SchemeOptions
from ropepatch.methods._base import MAX_FACTOR
from ropepatch.methods._tables import TableRule, zeros


def swap_rule(*only: str, **defaults: Any) -> TableRule:
    """The table is silenced, and the method's scheme goes into the attention; arguments as in `TableRule`."""
    return TableRule(zeros, only=only, attends=True, defaults=tuple(defaults.items()))


class SwapOptions(SchemeOptions):
    """Options of a swap that has no use for a factor but to say how long a table becomes."""

    factor: float = Field(
        default=1.0,
        ge=1.0,
        le=MAX_FACTOR,
        description="target length / trained length, of a model with a position table; nothing limits others",
    )

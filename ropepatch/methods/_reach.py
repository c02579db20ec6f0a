"""What methods share that are exact within a window and divide what lies beyond it."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from ropepatch.errors import OptionError
from ropepatch.methods._attention import LayerGeometry, SchemeOptions
from ropepatch.methods._base import MAX_FACTOR

# How far these methods aim where the caller does not say: in trained lengths.
DEFAULT_FACTOR = 4.0


class ReachOptions(SchemeOptions):
    """A window, and the divisor beyond it: by an option of the subclass, which `divisor` names, or by `factor`."""

    divisor: ClassVar[str]

    window: int | None = Field(
        default=None,
        ge=1,
        description="tokens: smaller distances are exact; below the trained length, by default half of it",
    )
    factor: float | None = Field(
        default=None,
        ge=1,
        le=MAX_FACTOR,
        description="target length / trained length; takes the smallest divisor that reaches it; "
        "4 where neither is given",
    )

    @model_validator(mode="before")
    @classmethod
    def _default(cls, given: Any) -> Any:
        unsaid = given.get("factor") is None and given.get(cls.divisor) is None
        return {**given, "factor": DEFAULT_FACTOR} if unsaid else given

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.factor is not None and getattr(self, self.divisor) is not None:
            meaning = type(self).model_fields[self.divisor].description
            raise ValueError(f"give {self.divisor} ({meaning}) or factor (target / trained), not both")
        return self


def half_window(layer: LayerGeometry, window: int | None, longest: int) -> int:
    """`window` in tokens, or half of the trained length where it is None.

    Raises:
        OptionError: the window is above `longest`.
    """
    chosen = max(1, layer.length // 2) if window is None else window
    if chosen > longest:
        raise OptionError(
            f"window does not fit the trained length of {layer.length} tokens",
            given=chosen,
            allowed=f"1..{longest}" if longest > 0 else "nothing: the trained length is too short",
        )
    return chosen


def window_of(layer: LayerGeometry, options: ReachOptions) -> int:
    """The window in tokens.

    Raises:
        OptionError: it is not below the trained length.
    """
    return half_window(layer, options.window, layer.length - 1)


def reach(layer: LayerGeometry, options: ReachOptions) -> int:
    """How many tokens meet trained distances only: w + (L - w) x divisor, or factor x L where that was asked for."""
    if options.factor is not None:
        return round(layer.length * options.factor)
    w = window_of(layer, options)
    given: float = getattr(options, options.divisor)
    return math.floor(w + (layer.length - w) * given)


def divisor(layer: LayerGeometry, options: ReachOptions) -> float:
    """The divisor as given, or the smallest that reaches factor x L, at least 1."""
    given: float | None = getattr(options, options.divisor)
    w = window_of(layer, options)
    return given if given is not None else max(1.0, (reach(layer, options) - w) / (layer.length - w))

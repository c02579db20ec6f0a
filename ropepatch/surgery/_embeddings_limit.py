"""An input that is longer than the position table: one clear error before the model runs, not a crash inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ropepatch.errors import UsageError

_IDS = ("input_ids", "inputs_embeds")


@dataclass(frozen=True)
class LengthLimit:
    """A hook before the forward of the part of a model that reads a table.

    Attributes:
        limit: positions that the table has.
        last_id: position ids of a caller are below this: the rows, less those before the first where the model adds
            them itself.
        names: of the forward's parameters, in order.
    """

    limit: int
    last_id: int
    names: tuple[str, ...]

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        if torch.compiler.is_compiling():
            return
        given = dict(zip(self.names, args, strict=False)) | kwargs
        ids = given.get("position_ids")
        # Position ids say how far a row reaches: a packed row may be longer than the table.
        if isinstance(ids, Tensor) and ids.numel():
            _refuse(int(ids.max()) + 1, self.last_id, "position ids")
            return
        tokens = next((given[name] for name in _IDS if isinstance(given.get(name), Tensor)), None)
        if tokens is not None and tokens.dim() > 1:
            _refuse(tokens.shape[1] + _cached(given.get("past_key_values")), self.limit, "tokens")


def _cached(cache: Any) -> int:
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    return int(length)


def _refuse(given: int, limit: int, what: str) -> None:
    if given > limit:
        raise UsageError(
            "the input reaches beyond the model's position table",
            given=f"{given} {what}",
            allowed=f"up to {limit}",
            hint="unpatch and patch again with a larger factor",
        )

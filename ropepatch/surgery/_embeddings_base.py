"""What every way of changing a position table has in common: what is reported, and what is looked at before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ropepatch.errors import UnsupportedModelError
from ropepatch.families._meta import refuse_meta
from ropepatch.families._site import Site
from ropepatch.methods._base import MethodOptions
from ropepatch.methods._tables import PositionTable


@dataclass(frozen=True)
class Patched:
    """What was done.

    Attributes:
        changes: in the order they were made.
        sites: the tables as plain dicts, and the attention modules where a method goes on in these.
        mechanism: what the tables were.
        becomes: what knows of positions now, where that is another mechanism.
        options: as they apply to tables.
        original_length, target_length: of the first table, in tokens; of an image, in patches along its longer side.
        plain: whether transformers builds the same model from the changed config and weights.
        warnings: what the user should know.
    """

    changes: list[Any]
    sites: list[dict[str, Any]]
    mechanism: str
    original_length: int
    target_length: int
    plain: bool
    warnings: list[str]
    becomes: str | None
    options: MethodOptions


def key_of(path: str, name: str) -> str:
    """A table's key in the state dict."""
    return f"{path}.{name}" if path else name


def usable_table(host: nn.Module, site: Site, held: Tensor | None) -> Tensor:
    """`held`, the table found at a site.

    Raises:
        UnsupportedModelError: there is none, or it cannot be replaced by a longer one.
    """
    if held is None or held.dim() != 2 or isinstance(held, DTensor):
        raise UnsupportedModelError(
            f"the table at {site.where} cannot be replaced: it is wrapped, sharded or not one row a position",
            given=type(host.get_submodule(site.path)).__name__,
            hint="patch before adapters and wrappers are put on the table",
        )
    refuse_meta(held, site.where)
    return held


def refuse_shared(host: nn.Module, tables: Sequence[tuple[str, str]]) -> None:
    """See that each table, (path, name), is a tensor of its own.

    Raises:
        UnsupportedModelError: two are one, or something that is no position table shares one.
    """
    places = {key_of(path, name) for path, name in tables}
    held = {id(getattr(host.get_submodule(path), name)): path for path, name in tables}
    for name, parameter in host.named_parameters(remove_duplicate=False):
        if id(parameter) in held and name not in places:
            raise UnsupportedModelError(
                f"the position table {held[id(parameter)]} is tied to {name}, which is none", hint="untie them first"
            )
    if len(held) < len(tables):
        raise UnsupportedModelError(
            "two modules share one position table: " + ", ".join(sorted(places)),
            hint="give each a copy of its own first",
        )


def follows_law(table: PositionTable, rows: Tensor) -> bool:
    """Whether these rows are more of the model's own law, which it computes itself when its config asks for as many."""
    if table.law is None:
        return False
    own = table.law.rows(torch.arange(len(rows)) + table.start, rows.shape[-1])
    return torch.allclose(own, rows, rtol=0, atol=2e-2 * table.law.scale)

"""Reformer: learned tables along two axes whose sizes multiply to the length, or one plain learned table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ropepatch.families._registry import family
from ropepatch.families._site import Site, dtype_name
from ropepatch.families._tables import table_sites


@family("reformer")
def reformer_sites(host: nn.Module) -> Iterator[Site]:
    """One site an axis."""
    config: Any = host.config
    if not config.axial_pos_embds:
        yield from table_sites(host)
        return
    for path, module in host.named_modules():
        if path.endswith("position_embeddings.weights"):
            for name, weight in module.named_parameters(recurse=False):
                yield Site(
                    path=path,
                    name=name,
                    mechanism="learned",
                    kind="table",
                    length=config.max_position_embeddings,
                    dtype=dtype_name(weight),
                    note="one axis of a product of tables",
                )

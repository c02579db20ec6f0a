"""How long an input a model can take, and whether its positions depend on the input's length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from ropepatch.errors import UnsupportedModelError
from ropepatch.families import discover, host_of
from ropepatch.families._native import PER_CALL_TYPES
from ropepatch.families._tables import first_row


class Table(NamedTuple):
    """A table of learned positions: how many tokens it has positions for, and where it is."""

    length: int
    where: str


def _position_table(model: nn.Module) -> Table | None:
    """The shortest table of learned positions; None for a model without. Tables of other kinds grow by themselves."""
    host = host_of(model)
    tables = []
    for site in discover(host):
        module = host.get_submodule(site.path) if site.kind == "table" else None
        if site.part == "text" and isinstance(module, nn.Embedding):
            tables.append(Table(module.num_embeddings - first_row(host, site.path), site.where))
    return min(tables, default=None)


def check_length(model: nn.Module, tokens: int) -> int | None:
    """Refuse an input that is longer than the model's table of learned positions.

    Returns:
        The table's length, in tokens; None for a model without.

    Raises:
        UnsupportedModelError: names the table and its length.
    """
    table = _position_table(model)
    if table is None:
        return None
    if tokens > table.length:
        raise UnsupportedModelError(
            f"the model has positions for {table.length} tokens only ({table.where})",
            given=f"{tokens} tokens, answer included",
            hint="evaluate shorter lengths, or make the table longer: --patch linear --set factor=2",
        )
    return table.length


def length_dependent_rope(model: Any, tokens: int) -> str | None:
    """The name of a native rotary scaling that looks at the length of the input, if `tokens` is enough to trigger it.

    Such a model (transformers' `dynamic` and `longrope`) gives other logits when it reads a text in pieces, so what it
    has read cannot be reused.
    """
    config = model.config.get_text_config(decoder=True)
    for scaling in _scalings(getattr(config, "rope_parameters", None)):
        kind = scaling.get("rope_type")
        # One list in both places is a static choice, which is how a patch without a word of its own is written.
        if kind in PER_CALL_TYPES and (kind != "longrope" or scaling["short_factor"] != scaling["long_factor"]):
            lengths = (scaling.get("original_max_position_embeddings"), config.max_position_embeddings)
            if tokens > min(length for length in lengths if length is not None):
                return str(kind)
    return None


def _scalings(parameters: Any) -> Iterator[dict[str, Any]]:
    if isinstance(parameters, dict):
        if "rope_type" in parameters:
            yield parameters
        else:  # one set for each layer type
            for inner in parameters.values():
                yield from _scalings(inner)

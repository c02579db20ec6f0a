"""How long an input a model can take, and whether its positions depend on the input's length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ropepatch.errors import UnsupportedModelError
from ropepatch.families import discover, host_of
from ropepatch.families._native import PER_CALL_TYPES
from ropepatch.families._tables import first_row


def check_length(model: nn.Module, tokens: int) -> int | None:
    """Refuse an input that is longer than the model's table of learned positions, the shortest if it has several.

    Returns:
        How many tokens it has positions for; None for a model without such a table.

    Raises:
        UnsupportedModelError: names the table and its length.
    """
    host = host_of(model)
    # Tables of other kinds grow by themselves.
    tables = [
        (module.num_embeddings - first_row(host, site.path), site.where)
        for site in discover(host)
        if site.part == "text"
        and site.kind == "table"
        and isinstance(module := host.get_submodule(site.path), nn.Embedding)
    ]
    if not tables:
        return None
    length, where = min(tables)
    if tokens > length:
        raise UnsupportedModelError(
            f"the model has positions for {length} tokens only ({where})",
            given=f"{tokens} tokens, answer included",
            hint="evaluate shorter lengths, or make the table longer: --patch linear --set factor=2",
        )
    return length


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

"""Pegasus-X computes its sinusoidal rows in every forward: no table holds them, and nothing limits the length."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ropepatch.families._registry import family
from ropepatch.families._site import Site


@family("pegasus_x")
def pegasus_x_sites(host: nn.Module) -> Iterator[Site]:
    """The module of the encoder and that of the decoder."""
    for path, _ in host.named_modules():
        if path.rpartition(".")[2] == "embed_positions":
            yield Site(path=path, name="", mechanism="sinusoidal", kind="table", note="computed in every forward")

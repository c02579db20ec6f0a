"""Time-series models whose positions do not look like a table."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ropepatch.families._registry import family
from ropepatch.families._site import Site, dtype_name


@family("patchtst", "patchtsmixer")
def patch_sites(host: nn.Module) -> Iterator[Site]:
    """A row a patch. Its sines and cosines are centred and scaled, so that their squares no longer tell them."""
    sines = getattr(host.config, "positional_encoding_type", None) == "sincos"
    for path, module in host.named_modules():
        for name, table in module.named_parameters(recurse=False):
            if name == "position_enc":
                yield Site(
                    path=path,
                    name=name,
                    mechanism="sinusoidal" if sines else "learned",
                    kind="table",
                    length=table.shape[0],
                    dtype=dtype_name(table),
                )


@family("timesfm")
def timesfm_sites(host: nn.Module) -> Iterator[Site]:
    """TimesFM 1 computes its rows in every forward, from a buffer of inverse time scales; TimesFM 2 has none."""
    for path, module in host.named_modules():
        if "inv_timescales" in dict(module.named_buffers(recurse=False)):
            yield Site(path=path, name="", mechanism="sinusoidal", kind="table", note="computed in every forward")

"""GPT-J and CodeGen: a finished sin | cos table as a buffer of every attention module, at rope_theta 10000."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ropepatch.families._registry import family
from ropepatch.families._site import Site, dtype_name


@family("gptj", "codegen")
def gptj_sites(host: nn.Module) -> Iterator[Site]:
    """One site an attention module. The rotated part of a head is the table's width, interleaved in pairs."""
    for path, module in host.named_modules():
        for name, table in module.named_buffers(recurse=False):
            if name == "embed_positions":
                yield Site(
                    path=path,
                    name=name,
                    mechanism="rotary",
                    kind="sincos_table",
                    head_dim=getattr(module, "head_dim", None),
                    rotary_dim=table.shape[1],
                    rope_theta=10000.0,
                    rope_type="default",
                    length=table.shape[0],
                    dtype=dtype_name(table),
                )

"""RoFormer: one frozen embedding of sin | cos rows, shared by all layers, as wide as a head."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ropepatch.families._registry import family
from ropepatch.families._site import Site, dtype_name


@family("roformer")
def roformer_sites(host: nn.Module) -> Iterator[Site]:
    """The frozen table of the encoder."""
    for path, module in host.named_modules():
        if isinstance(module, nn.Embedding) and path.rpartition(".")[2] == "embed_positions":
            yield Site(
                path=path,
                name="weight",
                mechanism="rotary",
                kind="sincos_table",
                head_dim=module.embedding_dim,
                rotary_dim=module.embedding_dim,
                rope_theta=10000.0,
                rope_type="default",
                length=module.num_embeddings,
                dtype=dtype_name(module.weight),
            )

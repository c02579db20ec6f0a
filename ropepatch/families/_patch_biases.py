"""Biases between image patches that are no table under one of the usual names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ropepatch.families._rotary import part_of
from ropepatch.families._site import Site, dtype_name

_COORDINATES = "relative_coords_table"
_NOTES = {
    # SAM, ViTDet, GOT-OCR2: a row for each offset along one axis, multiplied by the query.
    "rel_pos_h": "interpolated by the model itself where an image is larger",
    "rel_pos_w": "interpolated by the model itself where an image is larger",
    # LeViT: a number for each offset, looked up by a list of a fixed size.
    "attention_biases": "for one size of images",
}


def patch_bias_sites(host: nn.Module) -> Iterator[Site]:
    """Biases computed from coordinates (Swin v2), and learned ones along each axis or for a fixed list of offsets."""
    for path, module in host.named_modules():
        if _COORDINATES in module._buffers and hasattr(module, "continuous_position_bias_mlp"):
            yield _site(host, path, _COORDINATES, "computed from the offsets by a network")
        for name, note in _NOTES.items():
            if name in module._parameters:
                yield _site(host, path, name, note)


def _site(host: nn.Module, path: str, name: str, note: str) -> Site:
    return Site(
        path=path,
        name=name,
        mechanism="relative_bias",
        kind="bias",
        part=part_of(host, path),
        dtype=dtype_name(getattr(host.get_submodule(path), name)),
        note=note,
    )

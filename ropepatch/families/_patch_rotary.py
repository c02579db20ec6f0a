"""Rotary positions over the rows and columns of image patches (Qwen-VL, Pixtral, SAM 3, DINOv3).

They take images of any size: nothing in them is as long as a trained length, and what a method makes of a line of
tokens means nothing on two axes. They are shown, and left as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn

from ropepatch.families._rotary import owners_of, part_of
from ropepatch.families._site import Site, dtype_name

_SEEN = ("vision", "image", "video")
_IMAGES = {"pixel_values", "grid_thw"}
_OTHER_INPUTS = {"input_ids", "inputs_embeds", "input_values", "input_features"}
_NOTE = "they turn by rows and columns of image patches"


def with_patch_rotary(host: nn.Module, sites: Iterable[Site]) -> Iterator[Site]:
    """`sites`, those that turn by image patches marked as fixed, and frequencies of patches that are no sites yet.

    Towers of older transformers keep them without a gain, and DINOv3 turns by the pixels that it is given.
    """
    found = list(sites)
    for site in found:
        seen = site.kind == "frequencies" and _is_seen(host, site.path)
        yield replace(site, kind="fixed", note=_NOTE) if seen else site
    known = {site.path for site in found}
    for path, module in host.named_modules():
        buffer = module._buffers.get("inv_freq")
        if buffer is not None and path not in known and _is_seen(host, path):
            config: Any = getattr(module, "config", None)
            by_pixels = "pixel_values" in inspect.signature(type(module).forward).parameters
            yield Site(
                path=path,
                name="inv_freq",
                mechanism="rotary",
                kind="fixed",
                part=part_of(host, path),
                head_dim=getattr(module, "head_dim", None),
                rope_theta=getattr(config, "rope_theta", None),
                dtype=dtype_name(buffer),
                note=_NOTE + (", counted from -1 to 1 whatever the size of the image" if by_pixels else ""),
            )


def _is_seen(host: nn.Module, path: str) -> bool:
    part = part_of(host, path)
    return part in _SEEN or (part != "audio" and _reads_patches(host, path))


def _reads_patches(host: nn.Module, path: str) -> bool:
    """Whether the smallest part of the model around a module reads images or embeds patches, and reads nothing else."""
    owner = host.get_submodule(owners_of(host, path)[0])
    inputs = set(inspect.signature(type(owner).forward).parameters)
    if inputs & _OTHER_INPUTS:
        return False
    return bool(inputs & _IMAGES) or any(
        name.rpartition(".")[2].startswith("patch_") for name, _ in owner.named_modules()
    )

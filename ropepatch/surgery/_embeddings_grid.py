"""Tables of positions on a grid of image patches (ViT, DeiT, CLIP's vision tower, SigLIP, DINOv2, SAM): longer on both
axes.

The length of such a model is counted in patches along one side of its images. The patched model takes larger images as
it took its own; its config and attributes say the new size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ropepatch.errors import OptionError, UnsupportedModelError, VerificationError
from ropepatch.families._meta import refuse_meta
from ropepatch.families._rotary import owner_of
from ropepatch.families._site import Site
from ropepatch.methods._base import MethodOptions
from ropepatch.surgery import _relative_grid
from ropepatch.surgery._changes import Change, FreezeChange, TableChange, revert_all
from ropepatch.surgery._embeddings_base import Patched
from ropepatch.surgery._embeddings_check import reads
from ropepatch.surgery._image_size import (
    PATCHES,
    Grid,
    enlarged,
    grid_of,
    processor_warning,
    resize_images,
    run_on_image,
)

# Rows before the patches: class, distillation and register tokens.
_MOST_EXTRA = 16


@dataclass(frozen=True)
class Found:
    """A table as it stands.

    Attributes:
        path, name: where it is.
        extra: rows before those of the patches.
        grid: the patches.
    """

    path: str
    name: str
    extra: int
    grid: Grid


def takes(host: Any, text: Sequence[Site]) -> bool:
    """Whether the model reads images, and its tables are of their patches."""
    return getattr(host, "main_input_name", "") == "pixel_values" and all(_embeddings(host, site) for site in text)


def apply(
    host: nn.Module,
    text: Sequence[Site],
    method: Any,
    options: MethodOptions,
    *,
    original_length: int | None,
    verify: bool,
) -> Patched:
    """As `embeddings.apply`, for images `options.factor` times as high and as wide.

    Raises:
        UnsupportedModelError: the rows are no grid of patches, or the method has no form on two axes.
        OptionError: a factor that splits a patch.
        VerificationError: the model does not read the new rows.
    """
    if method.table.grid is None:
        raise UnsupportedModelError(
            f"{method.name!r} has no form for positions on two axes", hint="'linear' interpolates along both"
        )
    if original_length is not None:
        raise OptionError("the trained length of an image model is its grid of patches", given=original_length)
    found = [_found(host, site) for site in text]
    sizes = [enlarged(item.grid.size, options.factor) for item in found]  # type: ignore[attr-defined]
    planned = _beside(
        host, method, options, grown=any(size != i.grid.size for size, i in zip(sizes, found, strict=True))
    )
    changes: list[Change] = []
    try:
        if planned:
            _relative_grid.enlarge(host, planned, changes)
        for item, size in zip(found, sizes, strict=True):
            _change(host, item, size, method.table.grid, options, changes)
            if method.table.silent:
                changes.append(FreezeChange.apply(host, item.path, item.name))
        if verify:
            for item, size in zip(found, sizes, strict=True):
                _check(host, item, size)
            if planned:
                _relative_grid.check(host, planned)
    except BaseException:
        revert_all(host, changes)
        raise
    described: list[dict[str, Any]] = [
        {"path": item.path, "name": item.name, "mechanism": "learned", "first_row": item.extra, "length": list(size)}
        for item, size in zip(found, sizes, strict=True)
    ]
    described += _relative_grid.described(planned)
    warnings = [processor_warning(Grid(sizes[0], found[0].grid.patch))]
    if getattr(method, "finetune", ""):
        warnings.append(method.finetune)
    return Patched(
        changes=changes,
        sites=described,
        mechanism="learned",
        original_length=max(found[0].grid.size),
        target_length=max(sizes[0]),
        plain=True,
        warnings=warnings,
        becomes=method.table.becomes,
        options=options,
    )


def _beside(host: nn.Module, method: Any, options: MethodOptions, *, grown: bool) -> list[_relative_grid.Planned]:
    """What becomes of biases over windows beside the table (BEiT, Swin)."""
    if "relative_bias" in method.mechanisms:
        return _relative_grid.plan(host, method.table.grid, options)
    if grown and _relative_grid.windows(host):
        raise UnsupportedModelError(
            f"{method.name!r} makes the table of the model larger, and has no form for the biases beside it",
            hint="'linear' makes both larger",
        )
    return []


def _embeddings(host: nn.Module, site: Site) -> Any:
    """The module that adds the table to embedded patches, or None."""
    for path in (site.path, site.path.rpartition(".")[0]):
        module = host.get_submodule(path)
        if any(hasattr(module, name) for name in PATCHES):
            return module
    return None


def _found(host: nn.Module, site: Site) -> Found:
    config: Any = host.get_submodule(owner_of(host, site.path)).config
    table: Tensor = getattr(host.get_submodule(site.path), site.name)
    refuse_meta(table, site.where)
    grid = grid_of(config)
    if grid is None:
        raise UnsupportedModelError(f"the config does not say what grid of patches {site.where} is for")
    size = grid.size
    rows = table.numel() // table.shape[-1]
    extra = rows - size[0] * size[1]
    if not 0 <= extra <= _MOST_EXTRA or (_has_axes(table) and table.shape[-3:-1] != size):
        raise UnsupportedModelError(
            f"the rows of {site.where} are no grid of patches",
            given=f"{rows} rows",
            allowed=f"{size[0]} x {size[1]} patches of an image and a few more",
        )
    return Found(site.path, site.name, extra, grid)


def _has_axes(table: Tensor) -> bool:
    """Whether the rows stand in a grid, [1, height, width, d], as SAM keeps them."""
    return table.dim() == 4


def _change(
    host: nn.Module, item: Found, size: tuple[int, int], rule: Any, options: MethodOptions, changes: list[Change]
) -> None:
    table: Tensor = getattr(host.get_submodule(item.path), item.name).detach()
    rows = table.reshape(-1, table.shape[-1])
    old = rows[item.extra :].float().cpu().unflatten(0, item.grid.size)
    new = rule(old, size, options)
    whole = torch.cat((rows[: item.extra], new.flatten(0, 1).to(rows)))
    before, after = len(rows), len(whole)
    axes = size if _has_axes(table) else (after,)
    shaped = whole.reshape(*table.shape[: -1 - len(axes)], *axes, table.shape[-1])
    changes.append(TableChange.apply(host, item.path, item.name, shaped))
    counts = {
        "num_patches": (math.prod(item.grid.size), math.prod(size)),
        "num_positions": (before, after),
        "num_embeddings": (before, after),
    }
    resize_images(host, owner_of(host, item.path), item.grid, size, counts, changes)


def _check(host: nn.Module, item: Found, size: tuple[int, int]) -> None:
    table = getattr(host.get_submodule(item.path), item.name)
    owner = host.get_submodule(owner_of(host, item.path))
    for row in (item.extra, item.extra + size[0] * size[1] - 1):
        if not reads(table, row, lambda: run_on_image(owner)):
            raise VerificationError(f"the model does not read row {row} of {item.path}.{item.name}")

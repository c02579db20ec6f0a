"""Tables of positions on a grid of image patches (ViT, DeiT, CLIP's vision tower, SigLIP, DINOv2): longer on both axes.

The length of such a model is counted in patches along one side of its images. The patched model takes larger images as
it took its own; its config and attributes say the new size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ropepatch.errors import OptionError, UnsupportedModelError, VerificationError
from ropepatch.families._meta import refuse_meta
from ropepatch.families._rotary import owner_of
from ropepatch.families._site import Site
from ropepatch.methods._base import MethodOptions
from ropepatch.surgery._changes import AttributeChange, BufferChange, Change, ConfigChange, TableChange, revert_all
from ropepatch.surgery._embeddings_check import reads, run_whole

if TYPE_CHECKING:
    from ropepatch.surgery.embeddings import Patched

_PATCHES = ("patch_embeddings", "patch_embedding")
# Rows before the patches: class, distillation and register tokens.
_MOST_EXTRA = 16


@dataclass(frozen=True)
class Grid:
    """A table as it stands.

    Attributes:
        path, name: where it is.
        extra: rows before those of the patches.
        size: patches down and across.
        patch: pixels of a patch down and across.
    """

    path: str
    name: str
    extra: int
    size: tuple[int, int]
    patch: tuple[int, int]


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
    from ropepatch.surgery.embeddings import Patched

    if method.table.grid is None:
        raise UnsupportedModelError(
            f"{method.name!r} has no form for positions on two axes", hint="'linear' interpolates along both"
        )
    if original_length is not None:
        raise OptionError("the trained length of an image model is its grid of patches", given=original_length)
    found = [_found(host, site) for site in text]
    sizes = [_enlarged(item, options.factor) for item in found]  # type: ignore[attr-defined]
    changes: list[Change] = []
    try:
        for item, size in zip(found, sizes, strict=True):
            _change(host, item, size, method.table.grid, options, changes)
        if verify:
            for item, size in zip(found, sizes, strict=True):
                _check(host, item, size)
    except BaseException:
        revert_all(host, changes)
        raise
    described = [
        {"path": item.path, "name": item.name, "mechanism": "learned", "first_row": item.extra, "length": list(size)}
        for item, size in zip(found, sizes, strict=True)
    ]
    pixels = [count * side for count, side in zip(sizes[0], found[0].patch, strict=True)]
    warnings = [f"the image processor may still resize: set its size to {pixels[0]} x {pixels[1]} pixels"]
    if getattr(method, "finetune", ""):
        warnings.append(method.finetune)
    return Patched(
        changes=changes,
        sites=described,
        mechanism="learned",
        original_length=max(found[0].size),
        target_length=max(sizes[0]),
        plain=True,
        warnings=warnings,
    )


def _embeddings(host: nn.Module, site: Site) -> Any:
    """The module that adds the table to embedded patches, or None."""
    for path in (site.path, site.path.rpartition(".")[0]):
        module = host.get_submodule(path)
        if any(hasattr(module, name) for name in _PATCHES):
            return module
    return None


def _found(host: nn.Module, site: Site) -> Grid:
    config: Any = host.get_submodule(owner_of(host, site.path)).config
    table: Tensor = getattr(host.get_submodule(site.path), site.name)
    refuse_meta(table, site.where)
    image, patch = _pair(getattr(config, "image_size", None)), _pair(getattr(config, "patch_size", None))
    if image is None or patch is None:
        raise UnsupportedModelError(f"the config does not say what grid of patches {site.where} is for")
    size = (image[0] // patch[0], image[1] // patch[1])
    rows = table.numel() // table.shape[-1]
    extra = rows - size[0] * size[1]
    if not 0 <= extra <= _MOST_EXTRA:
        raise UnsupportedModelError(
            f"the rows of {site.where} are no grid of patches",
            given=f"{rows} rows",
            allowed=f"{size[0]} x {size[1]} patches of an image and a few more",
        )
    return Grid(site.path, site.name, extra, size, patch)


def _pair(value: Any) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) and len(value) == 2 else None


def _enlarged(item: Grid, factor: float) -> tuple[int, int]:
    exact = [count * factor for count in item.size]
    if any(count != round(count) for count in exact):
        raise OptionError(
            "the factor splits a patch",
            given=f"{item.size[0]} x {item.size[1]} patches times {factor:g}",
            allowed="whole numbers of patches on both axes",
        )
    return round(exact[0]), round(exact[1])


def _change(
    host: nn.Module, item: Grid, size: tuple[int, int], rule: Any, options: MethodOptions, changes: list[Change]
) -> None:
    table: Tensor = getattr(host.get_submodule(item.path), item.name).detach()
    rows = table.reshape(-1, table.shape[-1])
    old = rows[item.extra :].float().cpu().unflatten(0, item.size)
    new = old if size == item.size and options.model_fields_set <= {"factor"} else rule(old, size, options)
    whole = torch.cat((rows[: item.extra], new.flatten(0, 1).to(rows)))
    before, after = len(rows), len(whole)
    shaped = whole.reshape(*table.shape[:-2], after, table.shape[-1])
    changes.append(TableChange.apply(host, item.path, item.name, shaped))
    patches, more = item.size[0] * item.size[1], size[0] * size[1]
    owner = owner_of(host, item.path)
    pixels = tuple(count * side for count, side in zip(size, item.patch, strict=True))
    counts = {"num_patches": (patches, more), "num_positions": (before, after), "num_embeddings": (before, after)}
    configs: set[int] = set()
    for inner, module in host.named_modules():
        inside = f"{inner}.".startswith(f"{owner}.") or not owner
        if not inside:
            continue
        for name, (was, now) in counts.items():
            if vars(module).get(name) == was:
                changes.append(AttributeChange.apply(host, inner, name, now))
        image = vars(module).get("image_size")
        if image is not None:
            changes.append(AttributeChange.apply(host, inner, "image_size", _like(image, pixels)))
        ids = dict(module.named_buffers(recurse=False)).get("position_ids")
        if ids is not None and ids.numel() == before:
            longer = torch.arange(after, device=ids.device, dtype=ids.dtype).reshape(*ids.shape[:-1], after)
            changes.append(BufferChange.apply(host, inner, "position_ids", longer))
        config = vars(module).get("config")
        if getattr(config, "image_size", None) is not None and id(config) not in configs:
            configs.add(id(config))
            changes.append(ConfigChange.apply(host, inner, "image_size", _like(config.image_size, pixels)))


def _like(value: Any, pixels: tuple[int, ...]) -> Any:
    """The new size spelled as the old one."""
    return pixels[0] if isinstance(value, int) else type(value)(pixels)


def _check(host: nn.Module, item: Grid, size: tuple[int, int]) -> None:
    table = getattr(host.get_submodule(item.path), item.name)
    owner = host.get_submodule(owner_of(host, item.path))
    config: Any = owner.config
    height, width = (count * side for count, side in zip(size, item.patch, strict=True))
    shape = (1, getattr(config, "num_channels", 3), height, width)
    for row in (item.extra, item.extra + size[0] * size[1] - 1):
        try:
            read = reads(table, row, lambda: run_whole(owner, pixel_values=torch.zeros(shape)))
        except Exception as error:
            raise VerificationError(
                f"the model does not run on an image of {height} x {width} pixels ({type(error).__name__}: {error})"
            ) from error
        if not read:
            raise VerificationError(f"the model does not read row {row} of {item.path}.{item.name}")

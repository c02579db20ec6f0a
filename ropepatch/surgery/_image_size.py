"""The size of a model's images: what its config says, everything in the model that follows from it, and an image."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ropepatch.errors import OptionError, UnsupportedModelError, VerificationError, first_line
from ropepatch.surgery._changes import AttributeChange, BufferChange, Change, ConfigChange
from ropepatch.surgery._embeddings_check import run_whole

PATCHES = ("patch_embeddings", "patch_embedding", "patch_embed")
_GRIDS = ("grid_size", "patch_grid", "patch_shape", "patches_resolution", "input_resolution")


@dataclass(frozen=True)
class Grid:
    """A grid of patches.

    Attributes:
        size: patches down and across.
        patch: pixels of a patch down and across.
    """

    size: tuple[int, int]
    patch: tuple[int, int]

    @property
    def pixels(self) -> tuple[int, int]:
        """Pixels of an image down and across."""
        return self.size[0] * self.patch[0], self.size[1] * self.patch[1]


def grid_of(config: Any) -> Grid | None:
    """The grid that a config is for; None where it does not say."""
    image, patch = pair(getattr(config, "image_size", None)), pair(getattr(config, "patch_size", None))
    if image is None or patch is None:
        return None
    return Grid((image[0] // patch[0], image[1] // patch[1]), patch)


def pair(value: Any) -> tuple[int, int] | None:
    """One number for both axes, or one for each."""
    if isinstance(value, int):
        return value, value
    return (int(value[0]), int(value[1])) if isinstance(value, list | tuple) and len(value) == 2 else None


def image_of(config: Any) -> Tensor:
    """An image of the size that a config asks for, [1, channels, height, width], from -1 to 1.

    Raises:
        UnsupportedModelError: the config does not say the size.
    """
    size = pair(getattr(config, "image_size", None))
    if size is None:
        raise UnsupportedModelError("the config does not say how large the model's images are")
    shape = (1, getattr(config, "num_channels", 3), *size)
    return torch.linspace(-1, 1, math.prod(shape)).reshape(shape)


def run_on_image(part: Any) -> Any:
    """What a part of a model makes of an image of the size that its config asks for.

    Raises:
        VerificationError: it does not run on it.
    """
    image = image_of(part.config)
    try:
        return run_whole(part, pixel_values=image)
    except Exception as error:
        height, width = image.shape[2:]
        raise VerificationError(
            f"the model does not run on an image of {height} x {width} pixels "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def processor_warning(grid: Grid) -> str:
    """What to tell who made the images of a model larger."""
    height, width = grid.pixels
    return f"the image processor may still resize: set its size to {height} x {width} pixels"


def enlarged(size: tuple[int, int], factor: float, what: str = "") -> tuple[int, int]:
    """Patches on both axes, times `factor`; `what` they are of, for the message.

    Raises:
        OptionError: these are no whole numbers.
    """
    exact = [count * factor for count in size]
    whole = [round(count) for count in exact]
    # A factor of 12 / 7 is a rounding away from itself.
    if any(abs(count - near) > 1e-6 * near for count, near in zip(exact, whole, strict=True)):
        raise OptionError(
            "the factor splits a patch",
            given=f"{what}{size[0]} x {size[1]} patches times {factor:g}",
            allowed="whole numbers of patches on both axes",
            hint=f"{whole[0]}/{size[0]} is the nearest factor that fits",
        )
    return whole[0], whole[1]


def resize_images(
    host: nn.Module,
    owner: str,
    old: Grid,
    size: tuple[int, int],
    counts: Mapping[str, tuple[int, int]],
    changes: list[Change],
) -> None:
    """Write a new size of images into configs, attributes and position ids of one part of a model.

    Args:
        owner: path of that part.
        old: the grid as it was.
        size: patches down and across, from now on.
        counts: attributes that count patches or positions, with their old and new value; "num_positions" is also the
            length of position ids.
        changes: grows by what is done.
    """
    pixels = Grid(size, old.patch).pixels
    before, after = counts.get("num_positions", (0, 0))
    configs: set[int] = set()
    for path, module in host.named_modules():
        if owner and not f"{path}.".startswith(f"{owner}."):
            continue
        own = vars(module)
        for name, (was, now) in counts.items():
            if own.get(name) == was:
                changes.append(AttributeChange.apply(host, path, name, now))
        if own.get("image_size") is not None:
            changes.append(AttributeChange.apply(host, path, "image_size", _like(own["image_size"], pixels)))
        for name in _GRIDS:
            grown = _grown(own.get(name), old.size, size)
            if grown is not None:
                changes.append(AttributeChange.apply(host, path, name, grown))
        ids = dict(module.named_buffers(recurse=False)).get("position_ids")
        if ids is not None and before and ids.numel() == before:
            longer = torch.arange(after, device=ids.device, dtype=ids.dtype).reshape(*ids.shape[:-1], after)
            changes.append(BufferChange.apply(host, path, "position_ids", longer))
        config = own.get("config")
        if getattr(config, "image_size", None) is not None and id(config) not in configs:
            configs.add(id(config))
            changes.append(ConfigChange.apply(host, path, "image_size", _like(config.image_size, pixels)))


def _grown(value: Any, old: tuple[int, int], new: tuple[int, int]) -> Any:
    """A size in patches (of the image, or of a stage that has merged some), as it would be; None where it is none."""
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(part, int) for part in value)):
        return None
    products = [part * now for part, now in zip(value, new, strict=True)]
    if any(product % was for product, was in zip(products, old, strict=True)):
        return None
    grown = [product // was for product, was in zip(products, old, strict=True)]
    return grown if isinstance(value, list) else tuple(grown)


def _like(value: Any, pixels: tuple[int, int]) -> Any:
    """The new size spelled as the old one."""
    return pixels[0] if isinstance(value, int) else type(value)(pixels)

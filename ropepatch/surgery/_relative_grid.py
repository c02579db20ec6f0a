"""Biases over a window of image patches: larger windows on both axes.

Swin (also as MaskFormer's and Donut's encoder), BEiT and Data2Vec learn a number for each pair of offsets down and
across, (2h - 1)(2w - 1) for a window of h x w patches; BEiT keeps three more for its class token. Swin v2 computes
them from the offsets, which it spreads over the same range whatever the window. A window is the whole image in BEiT and
a part of it in Swin: windows grow by the factor there, and images with them, as when Swin is finetuned on larger ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ropepatch.errors import OptionError, UnsupportedModelError, VerificationError
from ropepatch.families._meta import refuse_meta
from ropepatch.families._rotary import owners_of, part_of
from ropepatch.families._site import Site
from ropepatch.methods._base import MethodOptions
from ropepatch.surgery._changes import AttributeChange, BufferChange, Change, ConfigChange, TableChange, revert_all
from ropepatch.surgery._embeddings_base import Patched
from ropepatch.surgery._image_size import (
    PATCHES,
    Grid,
    enlarged,
    grid_of,
    pair,
    processor_warning,
    resize_images,
    run_on_image,
)

_TABLE, _INDEX, _COORDINATES = "relative_position_bias_table", "relative_position_index", "relative_coords_table"
_MLP, _GENERATOR = "continuous_position_bias_mlp", "generate_relative_position_index"
# From the class token to patches, from patches to it, from it to itself.
_CLASS_ROWS = 3


@dataclass(frozen=True)
class Window:
    """A module with a bias for each offset within a window.

    Attributes:
        path: of the module.
        size: patches down and across.
        name: of the table, or of the coordinates that the biases are computed from.
    """

    path: str
    size: tuple[int, int]
    name: str


@dataclass(frozen=True)
class Planned:
    """What becomes of a window: its size, and its table or coordinates."""

    window: Window
    size: tuple[int, int]
    values: Tensor
    extra: int


def windows(host: nn.Module) -> list[Window]:
    """Every module of the text part (the part that is patched) that keeps biases over a window, in module order."""
    found = []
    for path, module in host.named_modules():
        table = module._parameters.get(_TABLE)
        computed = hasattr(module, _MLP) and _COORDINATES in module._buffers
        size = pair(getattr(module, "window_size", None))
        if size is not None and (computed or (table is not None and table.dim() == 2)):
            found.append(Window(path, size, _COORDINATES if computed else _TABLE))
    return [window for window in found if part_of(host, window.path) == "text"]


def takes(host: Any, sites: Sequence[Site], method: Any) -> bool:
    """Whether biases over windows of patches are all that the model knows order by, and `method` can enlarge them."""
    text = [site for site in sites if site.part == "text"]
    held = {(window.path, window.name) for window in windows(host)}
    biases = [site for site in text if site.mechanism == "relative_bias"]
    return (
        bool(biases)
        and all((site.path, site.name) in held for site in biases)
        and all(site.mechanism in ("relative_bias", "none") for site in text)
        and getattr(host, "main_input_name", "") == "pixel_values"
        and "relative_bias" in method.mechanisms
        and getattr(method, "table", None) is not None
        and method.table.grid is not None
    )


def apply(
    host: nn.Module, method: Any, options: MethodOptions, *, original_length: int | None, verify: bool
) -> Patched:
    """Windows `options.factor` times as high and as wide, for images as much larger. On any failure the model is as
    before.

    Args:
        verify: run an image of the new size and see that every window reads its biases.

    Raises:
        UnsupportedModelError: a table that is held, shared or read in a way that is not known.
        OptionError: a factor that splits a patch or shrinks a window, or an option that windows have no use for.
        VerificationError: the model does not read the new biases.
    """
    if original_length is not None:
        raise OptionError("the trained length of an image model is its grid of patches", given=original_length)
    owner, old = _image(host)
    planned = plan(host, method.table.grid, options)
    size = enlarged(old.size, options.factor)  # type: ignore[attr-defined]
    _refuse_other_grid(host, owner, old, planned)
    changes: list[Change] = []
    try:
        enlarge(host, planned, changes)
        counts = {"num_patches": (math.prod(old.size), math.prod(size))}
        resize_images(host, owner, old, size, counts, changes)
        if verify:
            check(host, planned)
    except BaseException:
        revert_all(host, changes)
        raise
    return Patched(
        changes=changes,
        sites=described(planned),
        mechanism="relative_bias",
        becomes=None,
        options=options,
        original_length=max(planned[0].window.size),
        target_length=max(planned[0].size),
        plain=True,
        warnings=[processor_warning(Grid(size, old.patch))],
    )


def described(planned: Sequence[Planned]) -> list[dict[str, Any]]:
    """The windows as plain dicts, for the record."""
    return [
        {"path": item.window.path, "name": item.window.name, "mechanism": "relative_bias", "length": list(item.size)}
        for item in planned
    ]


# -- what is there


def plan(host: nn.Module, rule: Any, options: Any) -> list[Planned]:
    """What becomes of every window. Changes nothing.

    Args:
        rule: a method's rule for grids.
        options: of the method.

    Raises:
        UnsupportedModelError, OptionError: as `apply`.
    """
    found = windows(host)
    _refuse_shared(host, found)
    planned = []
    for window in found:
        size = enlarged(window.size, options.factor, "windows of ")
        if window.name == _COORDINATES:
            planned.append(Planned(window, size, _planned_coordinates(host, window, size, options), 0))
            continue
        table, extra = _table(host, window)
        rows = table[: len(table) - extra].unflatten(0, _offsets(window.size))
        # A grid of the same size has nothing between its rows.
        new = rows if size == window.size else rule(rows, _offsets(size), options)
        values = torch.cat((new.flatten(0, 1), table[len(table) - extra :]))
        planned.append(Planned(window, size, values, extra))
    return planned


def _offsets(size: tuple[int, int]) -> tuple[int, int]:
    return 2 * size[0] - 1, 2 * size[1] - 1


def _image(host: nn.Module) -> tuple[str, Grid]:
    """Path of the part that reads images, and its grid."""
    owner = _reader(host, windows(host)[0].path)
    config: Any = host.get_submodule(owner).config
    grid = grid_of(config)
    if grid is None:
        raise UnsupportedModelError(f"the config of this {config.model_type} model does not say what images it is for")
    return owner, grid


def _reader(host: nn.Module, path: str) -> str:
    """Path of the smallest part around a module that embeds patches: encoders are models of their own in Swin."""
    places = owners_of(host, path)
    for place in places:
        modules = host.get_submodule(place).modules()
        if any(hasattr(module, name) for module in modules for name in PATCHES):
            return place
    return places[-1]


def _refuse_shared(host: nn.Module, found: Sequence[Window]) -> None:
    holders: dict[int, list[str]] = {}
    for name, parameter in host.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for window in found:
        if window.name == _TABLE:
            names = holders[id(host.get_submodule(window.path)._parameters[_TABLE])]
            if len(names) > 1:
                raise UnsupportedModelError(
                    "one table of biases is tied to several places: " + ", ".join(names),
                    hint="give each a copy of its own first",
                )


def _table(host: nn.Module, window: Window) -> tuple[Tensor, int]:
    """The table as float32 on the CPU, and its rows after those of the grid."""
    module: Any = host.get_submodule(window.path)
    where = f"{window.path}.{_TABLE}"
    held: Tensor = module._parameters[_TABLE]
    if isinstance(held, DTensor):
        raise UnsupportedModelError(f"the table {where} is sharded", hint="patch before the model is sharded")
    refuse_meta(held, where)
    extra = len(held) - math.prod(_offsets(window.size))
    if extra not in (0, _CLASS_ROWS):
        raise UnsupportedModelError(
            f"the rows of {where} are no grid of offsets",
            given=f"{len(held)} rows",
            allowed=f"{math.prod(_offsets(window.size))} for windows of {window.size[0]} x {window.size[1]} patches, "
            f"or {_CLASS_ROWS} more",
        )
    table = held.detach().float().cpu()
    _refuse_other_order(module, where, window.size, table, extra)
    return table, extra


def _refuse_other_order(module: Any, where: str, size: tuple[int, int], table: Tensor, extra: int) -> None:
    """See that the model reads the row of each offset where this module expects it."""
    law = index_of(size, extra)
    if _INDEX in module._buffers:
        same = torch.equal(module._buffers[_INDEX].cpu().flatten(), law.flatten())
    elif callable(getattr(module, _GENERATOR, None)):
        with torch.no_grad():
            own = module(size)[0].float().cpu()
        wanted = table[law].permute(2, 0, 1)
        same = own.shape == wanted.shape and torch.allclose(own, wanted, atol=1e-6)
    else:
        same = False
    if not same:
        raise UnsupportedModelError(
            f"the model does not read the rows of {where} in the order of the offsets",
            given=f"windows of {size[0]} x {size[1]} patches",
            hint="BEiT and Data2Vec mix the axes up where images are oblong" if size[0] != size[1] else None,
        )


def _refuse_other_grid(host: nn.Module, owner: str, old: Grid, planned: Sequence[Planned]) -> None:
    """A window that the config gives no size of its own is the whole image."""
    config: Any = host.get_submodule(owner).config
    other = [item.window for item in planned if item.window.size != old.size]
    if getattr(config, "window_size", None) is None and other:
        raise UnsupportedModelError(
            f"the window at {other[0].path} does not match the grid of the config",
            given=f"{other[0].size[0]} x {other[0].size[1]} patches",
            allowed=f"{old.size[0]} x {old.size[1]}, as image_size and patch_size say",
        )


def index_of(size: tuple[int, int], extra: int) -> Tensor:
    """The row of the table for each pair of patches, int64, [h w, h w]; one patch more where there is a class token,
    which comes first.

    Row (dy + h - 1)(2w - 1) + dx + w - 1 is that of a query dy patches below and dx to the right of its key.
    """
    height, width = size
    places = torch.arange(height * width)
    y, x = places // width, places % width
    down = y[:, None] - y + height - 1
    across = x[:, None] - x + width - 1
    index = down * (2 * width - 1) + across
    if not extra:
        return index
    first = math.prod(_offsets(size))
    whole = nn.functional.pad(index, (1, 0, 1, 0))
    whole[0, :], whole[:, 0], whole[0, 0] = first, first + 1, first + 2
    return whole


# -- Swin v2


def _planned_coordinates(host: nn.Module, window: Window, size: tuple[int, int], options: Any) -> Tensor:
    module: Any = host.get_submodule(window.path)
    where = f"{window.path}.{_COORDINATES}"
    if getattr(options, "interpolation", "linear") != "linear":
        raise OptionError(
            "the biases are computed from coordinates, and not interpolated",
            given=f"interpolation={options.interpolation!r}",
        )
    if (pair(getattr(module, "pretrained_window_size", 0)) or (0, 0))[0]:
        raise UnsupportedModelError(
            f"the biases at {where} are computed from offsets in the windows of an earlier training "
            "(pretrained_window_sizes), and reach any window as they are",
            hint="set window_size and image_size in the config before the model is built",
        )
    held: Tensor = module._buffers[_COORDINATES]
    refuse_meta(held, where)
    index = module._buffers.get(_INDEX)
    same = index is not None and torch.equal(index.cpu().flatten(), index_of(window.size, 0).flatten())
    own = coordinates_of(window.size)
    if not same or not torch.allclose(held.float().cpu(), own, atol=1e-6 if held.dtype == torch.float32 else 1e-2):
        raise UnsupportedModelError(f"the coordinates at {where} follow another law than those of Swin v2")
    return coordinates_of(size)


def coordinates_of(size: tuple[int, int]) -> Tensor:
    """Where Swin v2's network is asked for the bias of each offset, float32, [1, 2h - 1, 2w - 1, 2].

    sign(c) log2(1 + |c|) / 3, where c runs from -8 to 8 over the offsets of the window (arXiv 2111.09883, equation 4,
    as transformers scales it). In a larger window the same range is divided more finely: positions divided by the
    ratio of the largest offsets.
    """
    axes = []
    for count in size:
        offsets = torch.arange(1 - count, count, dtype=torch.float32)
        c = 8 * (offsets / max(count - 1, 1))
        axes.append(c.sign() * (c.abs() + 1).log2() / 3)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None]


# -- what is changed


def enlarge(host: nn.Module, planned: Sequence[Planned], changes: list[Change]) -> None:
    """Put larger windows in the place of those that are there, tables, indices, attributes and configs.

    Args:
        changes: grows by what is done.
    """
    for item in planned:
        path, module = item.window.path, host.get_submodule(item.window.path)
        if item.window.name == _TABLE:
            changes.append(TableChange.apply(host, path, _TABLE, item.values))
        else:
            held = module.get_buffer(_COORDINATES)
            changes.append(BufferChange.apply(host, path, _COORDINATES, item.values.to(held)))
        index = module._buffers.get(_INDEX)
        if index is not None:
            law = index_of(item.size, item.extra).to(index)
            changes.append(BufferChange.apply(host, path, _INDEX, law.flatten() if index.dim() == 1 else law))
        own = vars(module)
        if not isinstance(own["window_size"], int):
            changes.append(AttributeChange.apply(host, path, "window_size", type(own["window_size"])(item.size)))
        for name, value in (("window_area", math.prod(item.size)), ("num_relative_distance", len(item.values))):
            if name in own:
                changes.append(AttributeChange.apply(host, path, name, value))
    _enlarge_layers(host, planned, changes)


def _enlarge_layers(host: nn.Module, planned: Sequence[Planned], changes: list[Change]) -> None:
    """Layers that cut the image into windows, and the configs that say how large these are."""
    grown = {item.window.size[0]: item.size[0] for item in planned}
    owner = _reader(host, planned[0].window.path)
    configs: set[int] = set()
    for path, module in host.named_modules():
        if owner and not f"{path}.".startswith(f"{owner}."):
            continue
        own = vars(module)
        size = own.get("window_size")
        if isinstance(size, int) and size in grown:
            changes.append(AttributeChange.apply(host, path, "window_size", grown[size]))
            if "shift_size" in own:
                # Kept even where it stays: a layer takes its shift back when an image is no larger than a window.
                shift = grown[size] // 2 if own["shift_size"] else 0
                changes.append(AttributeChange.apply(host, path, "shift_size", shift))
        config = own.get("config")
        size = getattr(config, "window_size", None)
        if isinstance(size, int) and size in grown and id(config) not in configs:
            configs.add(id(config))
            changes.append(ConfigChange.apply(host, path, "window_size", grown[size]))


# -- does the model follow


def check(host: nn.Module, planned: Sequence[Planned]) -> None:
    """See that each window reads the biases of its first and its last offset, on an image of the size that the config
    now says.

    Raises:
        VerificationError: one does not, or the model does not run.
    """
    owner = _reader(host, planned[0].window.path)
    part = host.get_submodule(owner)
    for last in (False, True):
        with _marked(host, planned, last), _watched(host, planned) as read:
            run_on_image(part)
        unread = [item.window for item in planned if item.window.path not in read]
        if unread:
            raise VerificationError(f"the model does not read {unread[0].path}.{unread[0].name}")


@contextmanager
def _marked(host: nn.Module, planned: Sequence[Planned], last: bool) -> Iterator[None]:
    """One offset of every window is NaN."""
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for item in planned:
            held = getattr(host.get_submodule(item.window.path), item.window.name).detach()
            row = held.view(-1, held.shape[-1])[math.prod(_offsets(item.size)) - 1 if last else 0]
            kept.append((row, row.clone()))
            row.fill_(float("nan"))
        try:
            yield
        finally:
            for row, value in kept:
                row.copy_(value)


@contextmanager
def _watched(host: nn.Module, planned: Sequence[Planned]) -> Iterator[set[str]]:
    """The paths of the modules whose outputs hold NaN. What they pass on is without, so that each speaks for itself."""
    read: set[str] = set()

    def watch(path: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
            del module, arguments
            clean = _clean(output)
            if clean is not None:
                read.add(path)
            return clean if clean is not None else output

        return hook

    handles = [host.get_submodule(path).register_forward_hook(watch(path)) for path in {i.window.path for i in planned}]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _clean(output: Any) -> Any:
    """`output` with zeros for NaN; None where there is none."""
    if isinstance(output, Tensor):
        return output.nan_to_num() if output.is_floating_point() and bool(output.isnan().any()) else None
    if isinstance(output, tuple | list):
        parts = [_clean(part) for part in output]
        if all(part is None for part in parts):
            return None
        return type(output)(old if new is None else new for old, new in zip(output, parts, strict=True))
    if isinstance(output, Mapping):
        raise VerificationError("a module with biases over a window returns a mapping")
    return None

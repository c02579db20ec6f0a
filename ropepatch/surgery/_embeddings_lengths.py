"""What else in a model is as long as its position table: config entries, plain attributes, buffers of ids and masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ropepatch.errors import UnsupportedModelError
from ropepatch.families._rotary import owner_of
from ropepatch.surgery._changes import AttributeChange, BufferChange, Change, ConfigChange
from ropepatch.surgery._lengths import TABLE_LENGTH_NAMES

_ATTRIBUTES = (
    *("num_embeddings", "num_positions", "max_source_positions", "max_target_positions", "max_length", "max_seqlen"),
    *("n_positions", "max_position_embeddings"),
)
_SIDES = {"encoder": ("encoder", "source"), "decoder": ("decoder", "target")}


def config_entry(host: nn.Module, path: str, rows: int, start: int) -> tuple[str, int]:
    """The name and value of the config entry that states how long the table at `path` is.

    Some configs count the rows before the first position (RoBERTa), others do not (BART).

    Raises:
        UnsupportedModelError: none does; a saved model could not be built again.
    """
    config: Any = host.get_submodule(owner_of(host, path)).config
    offset = getattr(host.get_submodule(path), "offset", 0) or 0
    wanted = {rows, rows - start, rows - offset}
    found = {name: value for name in TABLE_LENGTH_NAMES if (value := getattr(config, name, None)) in wanted}
    side = next((words for part, words in _SIDES.items() if part in path.split(".")), ())
    of_side = [name for name in found if any(word in name for word in side)]
    if not found:
        raise UnsupportedModelError(
            f"no entry of the config says how long the position table {path} is", given=f"{rows} rows"
        )
    name = (of_side or list(found))[0]
    return name, found[name]


def lengthen(host: nn.Module, path: str, entry: tuple[str, int], rows: int, more: int, changes: list[Change]) -> None:
    """Add `more` positions to all that is as long as the table at `path`, but the table itself.

    Args:
        entry: from `config_entry`.
        rows: of the table, before.
        changes: grows by what is done.
    """
    name, stated = entry
    done = {(change.path, change.name) for change in changes if not isinstance(change, ConfigChange)}  # type: ignore[union-attr]
    configs: dict[int, str] = {}
    for place, module in _around(host, path):
        for attribute in _ATTRIBUTES:
            value = vars(module).get(attribute)
            if type(value) is int and value in (stated, rows) and (place, attribute) not in done:
                changes.append(AttributeChange.apply(host, place, attribute, value + more))
        for buffer, tensor in list(module.named_buffers(recurse=False)):
            longer = _longer(buffer, tensor, stated, more)
            if longer is not None and (place, buffer) not in done:
                changes.append(BufferChange.apply(host, place, buffer, longer))
        held = vars(module).get("config")
        if getattr(held, name, None) == stated:
            configs.setdefault(id(held), place)
    for place in configs.values():
        config: Any = host.get_submodule(place).config
        if more and getattr(config, "relative_attention", False) and config.max_relative_positions < 1:
            # DeBERTa's relative distances reach as far as its table, where the config does not say how far.
            changes.append(ConfigChange.apply(host, place, "max_relative_positions", stated))
        changes.append(ConfigChange.apply(host, place, name, stated + more))


def _around(host: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The part of the model that reads the table, and what stands around it."""
    owner = owner_of(host, path)
    steps = owner.split(".") if owner else []
    for count in range(len(steps)):
        place = ".".join(steps[:count])
        yield place, host.get_submodule(place)
    for inner, module in host.get_submodule(owner).named_modules():
        yield ".".join(part for part in (owner, inner) if part), module


def _longer(name: str, tensor: Tensor, stated: int, more: int) -> Tensor | None:
    """A buffer with `more` positions, where it is one of positions; else None."""
    if name.startswith("ropepatch_") or tensor.is_meta or tensor.dim() == 0 or tensor.shape[-1] != stated:
        return None
    if "position_ids" in name and tensor.numel() == stated:
        return _counted(tensor, more)
    if "token_type_ids" in name and tensor.numel() == stated and not bool(tensor.any()):
        return tensor.new_zeros(*tensor.shape[:-1], stated + more)
    if name in ("bias", "mask") and tensor.dim() >= 2 and tensor.shape[-2] == stated:
        return _band(tensor, stated + more)
    return None


def _counted(ids: Tensor, more: int) -> Tensor | None:
    first = int(ids.flatten()[0])
    count = torch.arange(first, first + ids.shape[-1] + more, device=ids.device, dtype=ids.dtype)
    same = torch.equal(ids.flatten(), count[: ids.shape[-1]])
    return count.expand(*ids.shape[:-1], -1).contiguous() if same else None


def _band(mask: Tensor, size: int) -> Tensor | None:
    """A causal mask, or one of a window, at another size."""
    old = mask.shape[-1]
    window = int((mask[..., -1, :] != 0).sum(-1).flatten()[0])
    square = torch.ones(size, size, dtype=mask.dtype, device=mask.device).tril()
    if window < old:
        square = square.triu(1 - window)
    same = bool((mask == square[:old, :old]).all())
    return square.expand(*mask.shape[:-2], size, size).contiguous() if same else None

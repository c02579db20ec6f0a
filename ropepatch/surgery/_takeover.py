"""Taking over a model's attention: the seam's function in place of its own, and rotary modules that turn nothing.

Every step adds its changes to a list, so that whoever asked for it can undo them.
"""

from __future__ import annotations

import functools
import inspect
import uuid
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ropepatch.attention import interface
from ropepatch.errors import UnsupportedModelError
from ropepatch.families._alibi_core import CORES, attention_paths
from ropepatch.families._bypass import CORE, TABLE, bypassing, core_terms
from ropepatch.families._native import PER_CALL_TYPES
from ropepatch.families._rotary import gain_name
from ropepatch.surgery._changes import AttributeChange, BufferChange, Change, ConfigChange, HookChange, ModuleChange
from ropepatch.surgery._lengths import length_name
from ropepatch.surgery._start import Start

_WAYS = ("sdpa", "eager", "flex_attention")
# Where accelerate keeps the forward that its hook calls.
_WRAPPED = "_old_forward"


def refuse(owner: nn.Module) -> None:
    """Refuse a model that cannot be run here, or whose attention is another library's kernel.

    Raises:
        UnsupportedModelError: the message says why.
    """
    if any(isinstance(weight, DTensor) for weight in owner.parameters()):
        raise UnsupportedModelError("the model is sharded", hint="patch it first, then shard it")
    if any(weight.is_meta for weight in owner.parameters()) and not any(
        hasattr(module, "_hf_hook") for module in owner.modules()
    ):
        raise UnsupportedModelError("the model is on the meta device: it cannot be run", hint="load the weights first")
    config: Any = owner.config
    way = config._attn_implementation
    if way not in _WAYS:
        raise UnsupportedModelError(
            f"the model runs its attention through {way!r}, which cannot express a remapped or biased attention",
            allowed=_WAYS,
            hint="load the model with attn_implementation='sdpa'; the seam then brings its own kernels",
        )


def take_over(host: nn.Module, place: str, changes: list[Change]) -> None:
    """Select our attention on every config under the owner, and on rotary modules that keep a core of their own."""
    done: set[int] = set()
    owner = host.get_submodule(place)
    for path, module in owner.named_modules():
        config = getattr(module, "config", None)
        if config is None or id(config) in done or not hasattr(config, "_attn_implementation_internal"):
            continue
        done.add(id(config))
        select(host, _joined(place, path), changes)
    for path in bypassing(owner):
        full, module = _joined(place, path), owner.get_submodule(path)
        changes.append(AttributeChange.apply(host, full, CORE, functools.partial(_core, module)))
        if hasattr(type(module), TABLE):
            changes.append(AttributeChange.apply(host, full, TABLE, functools.partial(_rows, module)))
    # Falcon's attention modules are the same for both of its mechanisms.
    for path in attention_paths(owner, CORES["falcon"]):
        project(host, _joined(place, path), "falcon", changes, rotates=True)


def _joined(place: str, path: str) -> str:
    return f"{place}.{path}".strip(".")


def select(host: nn.Module, path: str, changes: list[Change]) -> None:
    """Make the config of one module name our attention."""
    interface.register()
    changes.append(ConfigChange.apply(host, path, "_attn_implementation_internal", interface.NAME))


def project(host: nn.Module, path: str, kind: str, changes: list[Change], *, rotates: bool = False) -> None:
    """Replace the forward of an attention module that asks no interface.

    Args:
        path: of the module.
        kind: its architecture, a key of `CORES`.
        rotates: the model hands it a rotation of its own.
    """
    module = host.get_submodule(path)
    # Inside a hook that is there already, not around it.
    name = _WRAPPED if _WRAPPED in vars(module) else "forward"
    changes.append(AttributeChange.apply(host, path, name, functools.partial(_forward, kind, rotates, module)))


def _forward(
    kind: str,
    rotates: bool,
    module: Any,
    hidden_states: Tensor,
    *further: Tensor,
    attention_mask: Any = None,
    layer_past: Any = None,
    past_key_values: Any = None,
    position_embeddings: Any = None,
    alibi: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention module's forward; arguments as the model's blocks give them. The weights are never made."""
    core = CORES[kind]
    query, key, value = core.split(module, hidden_states)
    dropout = core.dropout(module)
    if rotates:
        if alibi is not None:
            raise UnsupportedModelError("the model builds an ALiBi bias although its config says that it rotates")
        turn = inspect.getmodule(type(module)).apply_rotary_pos_emb  # type: ignore[union-attr]
        query, key = turn(query, key, *position_embeddings)
        # Falcon drops no weights where it rotates.
        dropout = 0.0
    cache = layer_past if layer_past is not None else past_key_values
    if cache is not None:
        key, value = cache.update(key, value, module.layer_idx)
    out, _weights = interface.attention(
        module, query, key, value, attention_mask, scaling=core.scaling(module), dropout=dropout
    )
    return core.join(module, out.flatten(2), *further), None


def _core(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None) -> tuple[Tensor, None]:
    scaling, dropout = core_terms(module)
    out, _ = interface.attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout)
    return out.transpose(1, 2), None


def _rows(module: Any, position_ids: Tensor) -> Tensor:
    """The table as the module would read it, with its last row standing for all that follow."""
    table: Tensor = module.embed_positions.to(position_ids.device)
    missing = int(position_ids.max()) + 1 - table.shape[0]
    if missing > 0:
        table = torch.cat((table, table[-1:].expand(missing, -1)))
    return table.expand(position_ids.shape[0], -1, -1)


def silence(host: nn.Module, found: Sequence[Start], changes: list[Change], *, gain_too: bool = True) -> None:
    """Make rotary modules emit cos = 1 and sin = 0: with no frequency nothing turns, wherever a hook or copy sits.

    Without `gain_too` their gain stays, so that cos is the gain.
    """
    for start in found:
        site = start.site
        module = host.get_submodule(site.path)
        if site.kind == "sincos_table":
            rows = max(start.site.length or 0, 1)
            if not hasattr(type(module), TABLE):
                # A table is indexed by position: one row for each that can come.
                rows = max(rows, 16 * start.trained_length)
            still = torch.zeros(rows, 2 * start.own.inv_freq.numel())
            still[:, start.own.inv_freq.numel() :] = 1.0
            table: Tensor = getattr(module, site.name)
            changes.append(BufferChange.apply(host, site.path, site.name, still.to(table.dtype)))
            continue
        changes.append(BufferChange.apply(host, site.path, site.name, torch.zeros_like(start.own.inv_freq)))
        gain = gain_name(site.name)
        if gain_too and hasattr(module, gain):
            changes.append(AttributeChange.apply(host, site.path, gain, 1.0))
        if site.rope_type in PER_CALL_TYPES:
            types: Any = module.rope_type
            types = {**types, site.layer_type: "default"} if isinstance(types, dict) else "default"
            changes.append(AttributeChange.apply(host, site.path, "rope_type", types))


def watch(host: nn.Module, place: str, before: Any, changes: list[Change]) -> None:
    """Hooks around the calls of the model that runs the layers; `before` is the one that comes first."""
    changes.append(AttributeChange.apply(host, place, interface.OWNER, interface.Owner(uuid.uuid4().hex)))
    changes.append(HookChange.apply(host, place, before, before=True))
    changes.append(HookChange.apply(host, place, interface.after_call, before=False))


def learn(host: nn.Module, path: str, part: nn.Module, changes: list[Change]) -> None:
    """Put what a method learns into an attention module, on the device of its weights."""
    weight = next(host.get_submodule(path).parameters(), None)
    if weight is not None and not weight.is_meta:
        part = part.to(weight.device)
    changes.append(ModuleChange.apply(host, path, interface.LEARNED, part))


def tell_config(host: nn.Module, place: str, target: int, changes: list[Change]) -> None:
    """The length that generation limits and warnings read."""
    config: Any = host.get_submodule(place).config
    name = length_name(config)
    if name and getattr(config, name) < target:
        changes.append(ConfigChange.apply(host, place, name, target))

"""The only seven things that a patch may do to a model, each with its exact inverse.

A change names its place by module path, never by object, so that a record still fits after deepcopy or pickle.
The old value of a buffer is kept as a non-persistent buffer beside it: whatever moves or casts the model moves and
casts the kept value in the same way, which is what makes undo exact in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ropepatch.families._meta import refuse_meta

KEPT = "ropepatch_original_"
_MISSING = "\0missing"


@dataclass(frozen=True)
class BufferChange:
    """A buffer that got new values, in place where shape and dtype allow (a compiled graph then follows too)."""

    path: str
    name: str

    @classmethod
    def apply(cls, host: nn.Module, path: str, name: str, value: torch.Tensor) -> BufferChange:
        module = host.get_submodule(path)
        old = module.get_buffer(name)
        refuse_meta(old, f"{path}.{name}")
        module.register_buffer(KEPT + name, old.detach().clone(), persistent=False)
        _write(module, name, value)
        return cls(path, name)

    def revert(self, host: nn.Module) -> None:
        module = host.get_submodule(self.path)
        _write(module, self.name, module.get_buffer(KEPT + self.name))
        delattr(module, KEPT + self.name)


def _write(module: nn.Module, name: str, value: torch.Tensor) -> None:
    current = module.get_buffer(name)
    if current.shape == value.shape and current.dtype == value.dtype:
        with torch.no_grad():
            current.copy_(value)
    else:
        setattr(module, name, value.detach().to(current.device, copy=True))


@dataclass(frozen=True)
class ParameterChange:
    """A frozen parameter replaced by another of its own dtype; its key in the state dict stays."""

    path: str
    name: str

    @classmethod
    def apply(cls, host: nn.Module, path: str, name: str, value: torch.Tensor) -> ParameterChange:
        module = host.get_submodule(path)
        old = module.get_parameter(name)
        module.register_buffer(KEPT + name, old.detach().clone(), persistent=False)
        module.register_parameter(
            name, nn.Parameter(value.to(device=old.device, dtype=old.dtype), requires_grad=old.requires_grad)
        )
        return cls(path, name)

    def revert(self, host: nn.Module) -> None:
        module = host.get_submodule(self.path)
        grad = module.get_parameter(self.name).requires_grad
        module.register_parameter(self.name, nn.Parameter(module.get_buffer(KEPT + self.name), requires_grad=grad))
        delattr(module, KEPT + self.name)


@dataclass(frozen=True)
class TableChange:
    """A parameter that got other data, of another size too. It stays the same object, so whoever shares it follows."""

    path: str
    name: str

    @classmethod
    def apply(cls, host: nn.Module, path: str, name: str, value: torch.Tensor) -> TableChange:
        module = host.get_submodule(path)
        table = module.get_parameter(name)
        refuse_meta(table, f"{path}.{name}")
        module.register_buffer(KEPT + name, table.data, persistent=False)
        _set_data(table, value.to(device=table.device, dtype=table.dtype, copy=True))
        return cls(path, name)

    def revert(self, host: nn.Module) -> None:
        module = host.get_submodule(self.path)
        _set_data(module.get_parameter(self.name), module.get_buffer(KEPT + self.name))
        delattr(module, KEPT + self.name)


def _set_data(table: nn.Parameter, value: torch.Tensor) -> None:
    # A gradient of the other size would be added to at the next backward.
    table.grad = None
    table.data = value


@dataclass(frozen=True)
class FreezeChange:
    """A parameter that training leaves alone."""

    path: str
    name: str
    old: bool

    @classmethod
    def apply(cls, host: nn.Module, path: str, name: str) -> FreezeChange:
        parameter = host.get_submodule(path).get_parameter(name)
        old = parameter.requires_grad
        parameter.requires_grad_(False)
        return cls(path, name, old)

    def revert(self, host: nn.Module) -> None:
        host.get_submodule(self.path).get_parameter(self.name).requires_grad_(self.old)


@dataclass(frozen=True)
class AttributeChange:
    """A plain Python attribute of a module."""

    path: str
    name: str
    old: Any

    @classmethod
    def apply(cls, host: nn.Module, path: str, name: str, value: Any) -> AttributeChange:
        module = host.get_submodule(path)
        # What only the class has is not the module's own: reverting then uncovers it again.
        old = vars(module).get(name, _MISSING)
        setattr(module, name, value)
        return cls(path, name, old)

    def revert(self, host: nn.Module) -> None:
        _put_back(host.get_submodule(self.path), self.name, self.old)


@dataclass(frozen=True)
class ConfigChange:
    """An entry of the config that the module at `path` holds. The config object itself stays the same."""

    path: str
    name: str
    old: Any

    @classmethod
    def apply(cls, host: nn.Module, path: str, name: str, value: Any) -> ConfigChange:
        config: Any = host.get_submodule(path).config
        old = getattr(config, name, _MISSING)
        setattr(config, name, value)
        return cls(path, name, old)

    def revert(self, host: nn.Module) -> None:
        _put_back(host.get_submodule(self.path).config, self.name, self.old)


def _put_back(holder: Any, name: str, old: Any) -> None:
    if isinstance(old, str) and old == _MISSING:
        delattr(holder, name)
    else:
        setattr(holder, name, old)


@dataclass(frozen=True)
class ModuleChange:
    """A submodule that was not there before: parameters that a method learns."""

    path: str
    name: str

    @classmethod
    def apply(cls, host: nn.Module, path: str, name: str, value: nn.Module) -> ModuleChange:
        host.get_submodule(path).add_module(name, value)
        return cls(path, name)

    def revert(self, host: nn.Module) -> None:
        delattr(host.get_submodule(self.path), self.name)


@dataclass(frozen=True)
class HookChange:
    """A function that runs before, or always after, a module's forward; named by the key torch files it under."""

    path: str
    key: int
    before: bool

    @classmethod
    def apply(cls, host: nn.Module, path: str, function: Any, *, before: bool) -> HookChange:
        module = host.get_submodule(path)
        handle = (
            module.register_forward_pre_hook(function, with_kwargs=True)
            if before
            else module.register_forward_hook(function, with_kwargs=True, always_call=True)
        )
        return cls(path, handle.id, before)

    def revert(self, host: nn.Module) -> None:
        # By key, not by handle: a copied model has copied hooks, and no handle knows them.
        module = host.get_submodule(self.path)
        kind = "_forward_pre_hooks" if self.before else "_forward_hooks"
        for place in (kind, f"{kind}_with_kwargs", f"{kind}_always_called"):
            getattr(module, place, {}).pop(self.key, None)


Change = (
    BufferChange
    | ParameterChange
    | TableChange
    | FreezeChange
    | AttributeChange
    | ConfigChange
    | ModuleChange
    | HookChange
)


def revert_all(host: nn.Module, changes: list[Change]) -> None:
    """Undo changes in the reverse of the order they were made."""
    for change in reversed(changes):
        change.revert(host)

"""The patch rides on what others save, so that a plain `save_pretrained` (transformers', PEFT's, the Trainer's) does
not lose it.

- In the config, and so in every `config.json`: `ropepatch`, the arguments that make the patch again; and, where plain
  transformers would load the weights but not the patch, a name of an attention implementation that it does not have.
  It then refuses the folder with that name in its message.
- PEFT saves adapters without the base's config. It asks the model for its state dict first; at that moment every
  adapter config that does not do so yet is told to write `ropepatch.json` beside itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ropepatch.record import PatchRecord
from ropepatch.sidecar import CONFIG_KEY, SCHEMA_VERSION
from ropepatch.surgery._changes import Change, ConfigChange
from ropepatch.surgery._sidecar import sidecar_of, write_sidecar

REFUSAL = "ropepatch: load this folder with ropepatch.from_pretrained"
_WAY = "_attn_implementation"
# Of this process only; never part of what is saved.
_RUN_TIME = "_attn_implementation_internal"


def carry(host: Any, record: PatchRecord) -> list[Any]:
    """Write the patch into the model's config and watch its adapters. These changes come after all others of the record
    and are undone first."""
    entry = {"schema_version": SCHEMA_VERSION, **record.arguments(), "config_before": _config_before(host, record.undo)}
    changes: list[Any] = [ConfigChange.apply(host, "", CONFIG_KEY, entry)]
    if record.seam == "attention":
        changes.append(SavedEntryChange.apply(host, _WAY, REFUSAL))
    changes.append(AdapterHookChange.apply(host))
    return changes


def _config_before(host: Any, undo: list[Change]) -> dict[str, dict[str, Any]]:
    """What the patch changed in the config: by the name of its part ("" for the whole), then by entry."""
    root = host.config
    parts = {id(root): ""} | {id(value): name for name, value in vars(root).items() if hasattr(value, "to_dict")}
    before: dict[str, dict[str, Any]] = {}
    for change in undo:
        if isinstance(change, ConfigChange) and change.name != _RUN_TIME:
            part = parts.get(id(host.get_submodule(change.path).config))
            # A module may hold a copy of the config, which is not saved.
            if part is not None:
                before.setdefault(part, {}).setdefault(change.name, change.old)
    return before


@dataclass(frozen=True)
class SavedEntryChange:
    """An entry of the model's config that is written when it is saved, whatever the config's property of that name
    says while it lives."""

    name: str

    @classmethod
    def apply(cls, host: Any, name: str, value: Any) -> SavedEntryChange:
        vars(host.config)[name] = value
        return cls(name)

    def revert(self, host: Any) -> None:
        vars(host.config).pop(self.name, None)


@dataclass(frozen=True)
class AdapterHookChange:
    """A function that runs before the model's state dict is made; named by the key torch files it under."""

    key: int

    @classmethod
    def apply(cls, host: nn.Module) -> AdapterHookChange:
        return cls(host.register_state_dict_pre_hook(_watch_adapters).id)

    def revert(self, host: Any) -> None:
        host._state_dict_pre_hooks.pop(self.key)
        for adapter in _adapters(host):
            if isinstance(vars(adapter).get("save_pretrained"), SavesPatch):
                del vars(adapter)["save_pretrained"]


@dataclass
class SavesPatch:
    """An adapter config's `save_pretrained` that also writes the patch of the model it adapts."""

    host: Any
    adapter: Any

    def __call__(self, save_directory: str, **kwargs: Any) -> None:
        type(self.adapter).save_pretrained(self.adapter, save_directory, **kwargs)
        side = sidecar_of(self.host, self.adapter)
        if side is not None:
            write_sidecar(self.host, Path(save_directory), side)


def _watch_adapters(host: Any, prefix: str, keep_vars: bool) -> None:
    del prefix, keep_vars
    for adapter in _adapters(host):
        if "save_pretrained" not in vars(adapter):
            vars(adapter)["save_pretrained"] = SavesPatch(host, adapter)


def _adapters(host: Any) -> list[Any]:
    configs = vars(host).get("peft_config")
    return list(configs.values()) if isinstance(configs, dict) else []

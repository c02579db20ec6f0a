"""Structural discovery of rotary frequencies: any module that keeps inverse frequencies and turns positions by them.

transformers spells a rotary module in one way: a 1-D buffer `inv_freq` with a gain `attention_scaling`, or the
same pair once for each label, `{label}_inv_freq` with `{label}_attention_scaling`. Nothing here looks at class names.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ropepatch import compat
from ropepatch.families._site import Site, dtype_name

_SUFFIX = "inv_freq"


def rotary_sites(host: nn.Module) -> Iterator[Site]:
    """Every rotary site of a live model, text and other modalities alike, in module order."""
    for path, module in host.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if _is_frequencies(module, name, buffer):
                yield _site(host, path, module, name, buffer)


def _is_frequencies(module: nn.Module, name: str, buffer: torch.Tensor) -> bool:
    if name != _SUFFIX and not name.endswith(f"_{_SUFFIX}"):
        return False
    if name.endswith(f"original_{_SUFFIX}") or name.startswith("ropepatch_"):
        return False
    takes_positions = "position_ids" in inspect.signature(type(module).forward).parameters
    return buffer.dim() == 1 and (takes_positions or hasattr(module, gain_name(name)))


def label_of(name: str) -> str | None:
    """The label that a buffer is kept under: "full_attention" for full_attention_inv_freq, None for inv_freq."""
    return None if name == _SUFFIX else name.removesuffix(f"_{_SUFFIX}")


def gain_name(name: str) -> str:
    """The attribute that holds the gain of the frequencies called `name`."""
    return name.removesuffix(_SUFFIX) + "attention_scaling"


def rope_parameters_of(config: Any, label: str | None) -> dict[str, Any]:
    """transformers' rope parameters for one label; empty where the config has none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    if label is not None and isinstance(parameters.get(label), dict):
        parameters = parameters[label]
    return dict(parameters)


def _site(host: nn.Module, path: str, module: nn.Module, name: str, buffer: torch.Tensor) -> Site:
    label = label_of(name)
    config = config_of(host, module)
    parameters = rope_parameters_of(config, label)
    rope_type = getattr(module, "rope_type", None)
    if isinstance(rope_type, dict):
        rope_type = rope_type.get(label)
    theta = (
        parameters.get("rope_theta") or getattr(config, "rope_theta", None) or getattr(config, "rotary_emb_base", None)
    )
    return Site(
        path=path,
        name=name,
        mechanism="rotary",
        kind="frequencies",
        layer_type=label,
        part=part_of(host, path),
        head_dim=head_dim_of(config, label),
        rotary_dim=2 * buffer.numel(),
        rope_theta=float(theta) if theta else None,
        rope_type=rope_type or parameters.get("rope_type") or "default",
        dtype=dtype_name(buffer),
    )


def config_of(host: nn.Module, module: nn.Module) -> Any:
    """The config that a module was built from: its own, else the text part of the model's."""
    config = getattr(module, "config", None)
    return config if config is not None else host.config.get_text_config()  # type: ignore[union-attr, operator]


def head_dim_of(config: Any, label: str | None = None) -> int | None:
    """Size of an attention head by the config's own words, None when it has none."""
    if getattr(config, "is_heterogeneous", False):
        # Such a config refuses to speak for all layers at once.
        layers = config.per_layer_config
        config = next((layers[i] for i, kind in enumerate(config.layer_types) if label in (None, kind)), layers[0])
    elif wide := compat.global_head_dim(config, label):
        return wide
    if getattr(config, "head_dim", None):
        return int(config.head_dim)
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


_PART_OF_INPUT = {"input_ids": "text", "pixel": "vision", "input_features": "audio", "input_values": "audio"}


def part_of(host: nn.Module, path: str) -> str:
    """Which modality the module at `path` serves: "text" unless its config or its surroundings say otherwise."""
    root: Any = host.config
    nested = sub_configs(root)
    if not nested:
        return "text"
    module = host.get_submodule(path)
    config = getattr(module, "config", None)
    owner = host.get_submodule(owner_of(host, path))
    # A module without a config belongs to the part around it.
    held = config if config is not None or owner is host else owner.config
    name = next((name for name, sub in nested if sub is held), "")
    kind = name.removesuffix("_config") or str(getattr(held, "model_type", ""))
    for part in ("vision", "audio", "image", "video"):
        if part in kind:
            return part
    text_is_nested = any("text" in name for name, _ in nested)
    if config is root and text_is_nested and not isinstance(module, nn.Embedding):
        return "other"
    wanted = getattr(owner, "main_input_name", "input_ids")
    return next((part for word, part in _PART_OF_INPUT.items() if word in wanted), "other")


def owner_of(host: nn.Module, path: str) -> str:
    """Path of the innermost PreTrainedModel around a module: the smallest part that can be run by itself."""
    return owners_of(host, path)[0]


def owners_of(host: nn.Module, path: str) -> list[str]:
    """Paths of all PreTrainedModels around a module, innermost first."""
    from transformers import PreTrainedModel

    steps = path.split(".") if path else []
    paths = [".".join(steps[:count]) for count in range(len(steps), -1, -1)]
    return [place for place in paths if isinstance(host.get_submodule(place), PreTrainedModel)]


def sub_configs(config: Any) -> list[tuple[str, Any]]:
    """Every config nested in `config`, at any depth, with its attribute name."""
    found: list[tuple[str, Any]] = []
    for name in getattr(config, "sub_configs", {}) or {}:
        sub = getattr(config, name, None)
        if sub is not None and not isinstance(sub, dict):
            found += [(name, sub), *sub_configs(sub)]
    return found

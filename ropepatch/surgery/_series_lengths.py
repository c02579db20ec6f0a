"""What of a time-series model follows from its `context_length`.

The model's class is built twice without weights, once for each length; where the two differ, the model depends on it.
No list of names can forget anything, and what cannot be changed is known before the model is touched.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ropepatch.errors import UnsupportedModelError, first_line
from ropepatch.surgery._changes import AttributeChange, Change, ConfigChange

CONTEXT = "context_length"
_NUMBERS = (int, float)


@dataclass(frozen=True)
class Dependents:
    """What differs between a model for one context length and for another.

    Attributes:
        old, new: the two lengths, in time steps.
        shapes: parameters and buffers of another shape, by name; as they are, and as they would be.
        attributes: (module path, name, as it is, as it would be) of plain numbers.
    """

    old: int
    new: int
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    attributes: tuple[tuple[str, str, Any, Any], ...]


def dependents(host: Any, new: int) -> Dependents:
    """Compare the model that a config describes with that of a context of `new` time steps.

    Raises:
        UnsupportedModelError: the model's class cannot be built from its config alone.
    """
    old = getattr(host.config, CONTEXT)
    before, after = _skeleton(host, old), _skeleton(host, new)
    here, there = _tensors(before), _tensors(after)
    if here.keys() != there.keys():
        odd = sorted(here.keys() ^ there.keys())[0]
        raise UnsupportedModelError(f"the model has {odd} for one context length and not for another", given=(old, new))
    shapes = {name: (shape, there[name]) for name, shape in here.items() if shape != there[name]}
    attributes = [
        (path, name, value, vars(other)[name])
        for (path, module), other in zip(before.named_modules(), after.modules(), strict=True)
        for name, value in vars(module).items()
        if type(value) in _NUMBERS and vars(other).get(name) != value
    ]
    return Dependents(old, new, shapes, tuple(attributes))


def lengthen(host: Any, found: Dependents, changes: list[Change]) -> None:
    """Write the new length into configs and attributes; tensors are the caller's.

    Raises:
        UnsupportedModelError: an attribute is not what the config says.
    """
    for path, name, old, new in found.attributes:
        held = vars(host.get_submodule(path)).get(name)
        if held != old:
            raise UnsupportedModelError(
                f"{path}.{name} is not what the model's config says", given=held, allowed=str(old)
            )
        changes.append(AttributeChange.apply(host, path, name, new))
    if found.new == found.old:
        return
    configs: dict[int, str] = {}
    for path, module in host.named_modules():
        config = vars(module).get("config")
        if getattr(config, CONTEXT, None) == found.old:
            configs.setdefault(id(config), path)
    for path in configs.values():
        changes.append(ConfigChange.apply(host, path, CONTEXT, found.new))


def _skeleton(host: Any, length: int) -> nn.Module:
    from transformers.initialization import no_init_weights

    # From what its class is given: entries that follow from the length are computed anew.
    kind = type(host.config)
    taken = inspect.signature(kind.__init__).parameters
    entries = {name: value for name, value in host.config.to_dict().items() if name in taken}
    config = kind.from_dict({**entries, CONTEXT: length})
    try:
        with no_init_weights(), torch.device("meta"):
            made: nn.Module = type(host)(config)
    except Exception as error:
        raise UnsupportedModelError(
            f"a model like this one with a context of {length} time steps cannot be built ({first_line(error)})",
            hint="pass the whole model, not a part of it",
        ) from error
    return made


def _tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())}

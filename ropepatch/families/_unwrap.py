"""From what a user holds to the PreTrainedModel inside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ropepatch.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def host_of(model: Any) -> PreTrainedModel:
    """The outermost PreTrainedModel inside `model`, which may be a PeftModel, compiled, or wrapped in anything.

    A PeftModel's base survives merge_and_unload, so what is attached to the host is found in either order.

    Raises:
        UnsupportedModelError: there is none, or several side by side.
    """
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return model
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            "not a model",
            given=type(model).__name__,
            allowed="a transformers PreTrainedModel, or a module that wraps one",
        )
    found: dict[str, PreTrainedModel] = {}
    for path, module in model.named_modules():
        nested = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, PreTrainedModel) and not nested:
            found[path] = module
    if len(found) != 1:
        raise UnsupportedModelError(
            "found no PreTrainedModel inside the module"
            if not found
            else "found several PreTrainedModels side by side",
            given=type(model).__name__ if not found else sorted(found),
            hint="pass the transformers model itself",
        )
    return next(iter(found.values()))

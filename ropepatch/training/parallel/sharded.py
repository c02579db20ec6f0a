"""FSDP2: every process keeps a share of each weight, and layers are put together when they run.

By torch's own `fully_shard`, on any device: accelerate's plugin does the same on accelerators, and on a CPU falls back
to plain data parallelism without a word. A model is patched and given its adapters first, then sharded. Gradients are
averaged over all processes, as under DDP.

All functions here are collective: every process must call them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ropepatch.errors import RecordError, UnsupportedModelError, UsageError


def shard(model: nn.Module) -> None:
    """Shard a model over all processes, in place: each decoder layer, and the rest as one piece.

    The optimizer must be made afterwards, of the sharded parameters. accelerate must not wrap the model again: it is
    marked as prepared.

    Raises:
        UsageError: there is one process only, or the model is sharded already.
        UnsupportedModelError: quantized weights, or a model without layers of transformers' kind.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError(
            "sharding needs several processes", hint="launch with recipes/accelerate/fsdp2.yaml, or torchrun"
        )
    if is_sharded(model):
        raise UsageError("the model is sharded already")
    other = next((name for name, p in model.named_parameters() if not p.is_floating_point()), None)
    if other is not None:
        raise UnsupportedModelError(
            "quantized weights cannot be sharded",
            given=other,
            hint="leave model.quantization out, or set train.sharding to none",
        )
    layers = list(_layers(model))
    if not layers:
        raise UnsupportedModelError(
            "the model has no layers that could be sharded one by one",
            given=type(model).__name__,
            hint="set train.sharding to none",
        )
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model._is_accelerate_prepared = True  # type: ignore[assignment]


def is_sharded(model: nn.Module) -> bool:
    """Whether any part of a model has been sharded, by us or by accelerate."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def gathered(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU in place of sharded ones; the others as they are. In every process."""
    return {name: _whole(value) for name, value in values.items()}


@torch.no_grad()
def fill(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give parameters, sharded or not, the values of whole tensors, which every process must hold.

    Raises:
        RecordError: other names or shapes.
    """
    apart = sorted(parameters.keys() ^ values.keys())
    apart += sorted(n for n in parameters.keys() & values.keys() if parameters[n].shape != values[n].shape)
    if apart:
        raise RecordError("these weights belong to another model", given=apart[:3])
    for name, parameter in parameters.items():
        parameter.copy_(_like(parameter, values[name]))


def gathered_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's `state_dict` with whole tensors on the CPU, in every process."""
    state = optimizer.state_dict()
    return {**state, "state": {index: _all_whole(slots) for index, slots in state["state"].items()}}


def fill_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load what `gathered_optimizer` gave into an optimizer of the same parameters, sharded or not."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    slots: dict[int, dict[str, Any]] = {}
    for index, values in state["state"].items():
        parameter = parameters[int(index)]
        slots[index] = {
            name: _like(parameter, value) if isinstance(value, Tensor) and value.shape == parameter.shape else value
            for name, value in values.items()
        }
    optimizer.load_state_dict({**state, "state": slots})


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost layers, by the class that all of transformers' layers that can be checkpointed derive from."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
            yield module


def _whole(value: Tensor) -> Tensor:
    full = value.full_tensor() if isinstance(value, DTensor) else value
    return full.detach().cpu()


def _all_whole(slots: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _whole(value) if isinstance(value, Tensor) else value for name, value in slots.items()}


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """A whole tensor, cut and placed as a parameter is."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value

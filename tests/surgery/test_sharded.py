"""A model sharded by FSDP2 (here: over one gloo rank) is patched and restored like a plain one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import ropepatch
from ropepatch.testing import forward_logits, tiny_inputs, tiny_model


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("patch_first", [True, False])
def test_fully_shard_in_either_order(patch_first: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, model = tiny_model("llama"), tiny_model("llama")
    inputs = tiny_inputs(plain, length=24)
    original = forward_logits(plain, **inputs)
    expected = forward_logits(ropepatch.patch(plain, "yarn", factor=4), **inputs)

    if patch_first:
        ropepatch.patch(model, "yarn", factor=4)
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if not patch_first:
        ropepatch.patch(model, "yarn", factor=4)
    assert torch.equal(forward_logits(model, **inputs), expected)
    ropepatch.unpatch(model)
    assert torch.equal(forward_logits(model, **inputs), original)

"""The loss in several processes: gradients that wrappers average or scatter are those of one process."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from ropepatch.testing import tiny_model
from ropepatch.training.loss import causal_loss, check

WORLD = 2


def whole() -> tuple[Any, dict[str, Tensor], int]:
    """A model that trains its head and router, the batch of all processes, and its number of labels."""
    model = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (WORLD, 13), generator=generator)
    labels = ids.clone()
    labels[0, :8] = -100
    return model, {"input_ids": ids, "labels": labels}, int((labels[:, 1:] != -100).sum())


def wrap(model: Any, form: str) -> Any:
    if form.startswith("ddp"):
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=form == "ddp, unused looked for")
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    units = [*model.model.layers, *([model.lm_head] if form == "fsdp2, head apart" else [])]
    for unit in units:
        fully_shard(unit)
    # Rounded, the loss would scale every gradient by another number.
    policy = MixedPrecisionPolicy(output_dtype=torch.bfloat16 if "rounded" in form else None)
    return fully_shard(model, mp_policy=policy)


FORMS = ("ddp", "ddp, unused looked for", "fsdp2", "fsdp2, head apart", "fsdp2, outputs rounded")


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    store = distributed.FileStore(f"{folder}/store", WORLD)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    found = {}
    for form in FORMS:
        model, batch, tokens = whole()
        check(model)
        wrapped = wrap(model, form)
        mine = {name: value[rank : rank + 1] for name, value in batch.items()}
        # Averaged over processes by the wrapper.
        loss = causal_loss(wrapped, mine, tokens=tokens, chunk=3) * WORLD
        assert loss.dtype == torch.float32
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        if form.startswith("fsdp2"):
            gradients = {name: gradient.full_tensor() for name, gradient in gradients.items()}
        found[form] = {name: gradient.clone() for name, gradient in gradients.items()}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=WORLD)
    found = torch.load(tmp_path / "found.pt")
    model, batch, tokens = whole()
    # Row by row: the auxiliary loss is one of each forward, not of the batch.
    for row in range(WORLD):
        mine = {name: value[row : row + 1] for name, value in batch.items()}
        causal_loss(model, mine, tokens=tokens, backend="plain").backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert found.keys() == set(FORMS)
    for form, gradients in found.items():
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, where=f"{form}, {name}: ": where + m
            )

"""What several gloo processes do for the tests of ropepatch.training.parallel, and how they are started.

One start of the processes runs many cases; each process writes what it measured, and the tests judge it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

import ropepatch
from ropepatch.errors import RopepatchError
from ropepatch.testing import tiny_model
from ropepatch.training.parallel import sharded
from ropepatch.training.parallel.context import ContextParallel

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "qwen3": {},
    "gpt_neox": {},
    "gemma2": {"sliding_window": 20},
}
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "yarn": {"factor": 4},
    "self_extend": {"factor": 4, "window": 16},
    "dca": {"chunk": 24},
    "alibi": {},
    "dynamic_ntk": {"factor": 4},
    "kerple": {},
}
MODES = ("all_gather", "ulysses")
BATCHES = ("pose", "resets", "numbered", "padded", "answer")
LENGTH = 96

Case = Callable[[], dict[str, Any]]
CASES: dict[str, Case] = {}


def patched(family: str, method: str, **config: Any) -> Any:
    model = tiny_model(family, **{**FAMILIES.get(family, {}), **config})
    if family == "gemma2":
        # Older transformers take sdpa by default, which leaves the model's softcap out.
        model.set_attn_implementation("eager")
    return model if method == "none" else ropepatch.patch(model, method, **METHODS[method])


def batch_of(length: int, kind: str = "plain", rows: int = 2) -> dict[str, Tensor]:
    """Random tokens with some ignored labels; `kind` says how they stand."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(10, 100, (rows, length), generator=generator)
    labels = torch.where(torch.rand(rows, length, generator=generator) < 0.2, -100, ids)
    positions = torch.arange(length).expand(rows, -1).clone()
    batch = {"input_ids": ids, "labels": labels}
    first = length // 3
    if kind == "pose":
        positions[:, first:] += 90
        batch |= {"position_ids": positions, "attention_mask": torch.ones_like(ids)}
    elif kind in ("resets", "numbered"):
        positions[:, first:] -= first
        batch["position_ids"] = positions
        if kind == "numbered":
            batch["attention_mask"] = 1 + (torch.arange(length) >= first).expand(rows, -1).long()
    elif kind == "padded":
        mask = torch.ones_like(ids)
        mask[1, -length // 4 :] = 0
        batch |= {"attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
    elif kind == "answer":
        # All labels are at the end: most slices have none.
        batch["labels"] = labels.masked_fill(torch.arange(length) < length - 5, -100)
    return batch


def gradients(model: Any, batch: dict[str, Tensor], shifted: Tensor, tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of the losses over `tokens`, and every parameter's gradient, by full logits."""
    model.zero_grad()
    logits = model(**batch, use_cache=False).logits.float()
    loss = cross_entropy(logits.flatten(0, 1), shifted.flatten(), ignore_index=-100, reduction="sum") / tokens
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest error of any parameter's gradient.

    Relative to its own largest entry, or to a thousandth of the largest of all, where its own is near zero.
    """
    assert set(got) == set(wanted)
    largest = max(float(g.abs().max()) for g in wanted.values())
    return max(
        float((got[name] - g).abs().max()) / max(float(g.abs().max()), 1e-3 * largest) for name, g in wanted.items()
    )


def shared(model: Any, mode: Any, batch: dict[str, Tensor], *, checkpointed: bool = False) -> dict[str, Any]:
    """Relative errors of the loss and of the worst gradient: all processes together against this one alone."""
    shifted = pad(batch["labels"][:, 1:], (0, 1), value=-100)
    tokens = int((shifted != -100).sum())
    whole = {name: value for name, value in batch.items() if name != "labels"}
    way = model.config._attn_implementation
    wanted_loss, wanted = gradients(model, whole, shifted, tokens)
    if checkpointed:
        model.train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parallel = ContextParallel.start(dist.get_world_size(), mode)
    parallel.attach(model)
    try:
        part = parallel.shard(batch)
        held = part["input_ids"].shape[1]
        loss, got = gradients(model, part, part.pop("shifted_labels"), tokens)
    finally:
        parallel.detach()
    for value in (loss, *got.values()):
        dist.all_reduce(value)
    assert model.config._attn_implementation == way
    return {
        "loss": float((loss - wanted_loss).abs() / wanted_loss.abs()),
        "gradient": worst(got, wanted),
        "held": held / batch["input_ids"].shape[1],
    }


def shared_and_sharded(family: str, method: str, mode: Any) -> dict[str, Any]:
    """Both at once: every process holds a slice of each sequence and a share of each weight."""
    batch = batch_of(LENGTH)
    shifted = pad(batch["labels"][:, 1:], (0, 1), value=-100)
    tokens = int((shifted != -100).sum())
    whole = {name: value for name, value in batch.items() if name != "labels"}
    wanted_loss, wanted = gradients(adapted(family, method), whole, shifted, tokens)
    model, parallel = adapted(family, method), ContextParallel.start(dist.get_world_size(), mode)
    parallel.attach(model)
    sharded.shard(model)
    part = parallel.shard(batch)
    held = part["input_ids"].shape[1] / LENGTH
    loss, got = gradients(model, part, part.pop("shifted_labels"), tokens)
    dist.all_reduce(loss)
    # Gradients are averaged over the processes.
    whole_gradients = {name: g * dist.get_world_size() for name, g in sharded.gathered(got).items()}
    off = float((loss - wanted_loss).abs() / wanted_loss.abs())
    return {"loss": off, "gradient": worst(whole_gradients, wanted), "held": held}


def attached(model: Any, mode: Any = "all_gather", *, half: bool = False) -> dict[str, Any]:
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        ContextParallel.start(dist.get_world_size(), mode).attach(model)
    return {}


def uncalled() -> dict[str, Any]:
    """An attached model that is called on a whole batch."""
    model, parallel = patched("llama", "none"), ContextParallel.start(dist.get_world_size())
    parallel.attach(model)
    return {"logits": model(batch_of(LENGTH)["input_ids"]).logits.shape}


def adapted(family: str, method: str) -> Any:
    """A patched model with adapters, norms and the method's own parameters to train."""
    import peft

    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["norm"], init_lora_weights=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(patched(family, method), config)
    for name, parameter in model.named_parameters():
        if "ropepatch_bias" in name:
            parameter.requires_grad_(True)
    return model


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fully_sharded(family: str, method: str) -> dict[str, Any]:
    """One optimizer step of a sharded model on rows shared out, against one process with all rows; then a reload."""
    size, rank = dist.get_world_size(), dist.get_rank()
    batch = batch_of(LENGTH, rows=size)
    shifted = pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    tokens = int((shifted != -100).sum())
    one, many, again = (adapted(family, method) for _ in range(3))
    _, wanted = gradients(one, batch, shifted, tokens)
    sharded.shard(many)
    _, got = gradients(
        many, {name: value[rank : rank + 1] for name, value in batch.items()}, shifted[rank : rank + 1], tokens
    )
    held = sum(p.to_local().numel() for p in many.parameters()) / sum(p.numel() for p in one.parameters())
    # Gradients are averaged over the processes, as under DDP.
    found = {"gradient": worst({n: g * size for n, g in sharded.gathered(got).items()}, wanted), "held": held}
    for model in (one, many):
        for parameter in trained(model).values():
            parameter.grad *= size if model is many else 1
    optimizers = [torch.optim.AdamW(trained(model).values(), lr=1e-2) for model in (one, many, again)]
    for model, optimizer in zip((one, many), optimizers, strict=False):
        torch.nn.utils.clip_grad_norm_(trained(model).values(), 0.1)
        optimizer.step()
    weights, state = sharded.gathered(trained(many)), sharded.gathered_optimizer(optimizers[1])
    found["weights"] = worst(weights, sharded.gathered(trained(one)))
    # A checkpoint of a sharded model goes on sharded, and without.
    fresh = adapted(family, method)
    sharded.shard(fresh)
    resumed = torch.optim.AdamW(trained(fresh).values(), lr=1e-2)
    for model, optimizer in ((again, optimizers[2]), (fresh, resumed)):
        sharded.fill(trained(model), weights)
        sharded.fill_optimizer(optimizer, state)
        back = sharded.gathered_optimizer(optimizer)["state"]
        exact = all(value.equal(weights[name]) for name, value in sharded.gathered(trained(model)).items())
        found["exact"] = (
            bool(found.get("exact", True))
            and exact
            and all(
                back[index][slot].equal(value)
                for index, slots in state["state"].items()
                for slot, value in slots.items()
            )
        )
    return found


for _family, _method, _mode in itertools.product(FAMILIES, METHODS, MODES):
    CASES[f"{_family}-{_method}-{_mode}"] = lambda f=_family, m=_method, mode=_mode: shared(  # type: ignore[misc]
        patched(f, m), mode, batch_of(LENGTH)
    )
for _kind, _method, _mode in itertools.product(BATCHES, ("yarn", "self_extend", "alibi"), MODES):
    CASES[f"{_kind}-{_method}-{_mode}"] = lambda kind=_kind, m=_method, mode=_mode: shared(  # type: ignore[misc]
        patched("llama", m), mode, batch_of(LENGTH, kind)
    )
for _method, _mode in itertools.product(("none", "self_extend"), MODES):
    # Padding has to be added, and is another number of tokens for another number of processes.
    CASES[f"odd-{_method}-{_mode}"] = lambda m=_method, mode=_mode: shared(  # type: ignore[misc]
        patched("llama", m), mode, batch_of(91)
    )
    CASES[f"checkpointed-{_method}-{_mode}"] = lambda m=_method, mode=_mode: shared(  # type: ignore[misc]
        patched("llama", m), mode, batch_of(LENGTH), checkpointed=True
    )
for _method, _mode in itertools.product(("yarn", "self_extend", "alibi"), MODES):
    CASES[f"long-{_method}-{_mode}"] = lambda m=_method, mode=_mode: shared(  # type: ignore[misc]
        patched("llama", m, max_position_embeddings=2048), mode, batch_of(8192, rows=1), checkpointed=True
    )
CASES |= {
    "gpt2-none-all_gather": lambda: shared(patched("gpt2", "none"), "all_gather", batch_of(40)),
    "bloom-alibi-all_gather": lambda: shared(patched("bloom", "alibi"), "all_gather", batch_of(40)),
    # One key head for two processes: it is repeated, no more often than it must be.
    "few_keys-ulysses": lambda: shared(patched("llama", "alibi", num_key_value_heads=1), "ulysses", batch_of(LENGTH)),
    "both-yarn-all_gather": lambda: shared_and_sharded("llama", "yarn", "all_gather"),
    "both-kerple-ulysses": lambda: shared_and_sharded("llama", "kerple", "ulysses"),
    "refused-heads": lambda: attached(
        patched("llama", "none", num_attention_heads=3, num_key_value_heads=3, hidden_size=48, head_dim=16), "ulysses"
    ),
    "refused-mixing": lambda: attached(tiny_model("mamba")),
    "refused-own-alibi": lambda: attached(tiny_model("bloom")),
    "refused-dynamic": lambda: attached(
        tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4})
    ),
    "refused-call": uncalled,
    # Rounding to bfloat16 is no reason to refuse a model.
    "autocast": lambda: attached(patched("llama", "self_extend"), half=True),
    "sharded-llama-yarn": lambda: fully_sharded("llama", "yarn"),
    "sharded-gemma2-kerple": lambda: fully_sharded("gemma2", "kerple"),
}


def _work(rank: int, size: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=timedelta(seconds=120)
    )
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = CASES[name]()
        except RopepatchError as error:
            found[name] = {"refused": f"{type(error).__name__}: {error}"}
        dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def run(names: Iterable[str], folder: Path, size: int = 2) -> dict[str, list[dict[str, Any]]]:
    """Each case's measurements, of every process."""
    names = list(names)
    torch.multiprocessing.spawn(_work, (size, str(folder), names), nprocs=size)
    found = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]
    return {name: [each[name] for each in found] for name in names}

"""Small recipes for the tests of the loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ropepatch.files import read_object
from ropepatch.training.log import read_log
from ropepatch.training.recipe import Recipe

WINDOW = 256
"""Tokens; synthetic tasks fit into it with the tiny tokenizer."""


def recipe(folder: Path, **changes: Any) -> Recipe:
    """A recipe of four steps of two rows in float32 for the model in `folder`.

    Args:
        changes: whole sections by name, or single settings as `section__key`.
    """
    content: dict[str, Any] = {
        "model": {"name": str(folder)},
        "patch": {"method": "yarn", "options": {"factor": 4}},
        "lora": {"r": 4, "lora_alpha": 8.0},
        "data": {
            "length": WINDOW,
            "cache": str(folder.parent / "tokens"),
            "sources": [{"kind": "synthetic", "task": "passkey"}],
        },
        "train": {
            "max_steps": 4,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "precision": "float32",
            "save_every": 2,
        },
    }
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            content[section] = {**content[section], key: value}
        else:
            content[section] = value
    return Recipe.model_validate(content)


def losses(output: Path) -> list[float]:
    """The logged losses of a run, in the order of its steps."""
    lines = read_log(output / "log.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def adapter(output: Path) -> dict[str, Tensor]:
    """The final adapter of a run."""
    return load_file(output / "adapter" / "adapter_model.safetensors")


def same(x: dict[str, Tensor], y: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are equal bit for bit."""
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def finished(output: Path) -> bool:
    """Whether a run says that it is done."""
    return bool(read_object(output / "run.json")["finished"])


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: sums are then the same in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Small finished runs for tests of what is made of results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ropepatch.evaluation.folder import RunFolder

YARN = {
    "method": "yarn",
    "options": {"factor": 2.0, "attention_factor": None},
    "original_length": 64,
    "sites": [{"path": "model.rotary_emb"}],
    "versions": {"torch": "1"},
    "warnings": [],
}


def configuration(**changes: Any) -> dict[str, Any]:
    base = {"task": "passkey", "model": "tiny", "seed": 7, "trained_length": 64, "chat_template": False, "patch": None}
    return {**base, **changes}


def trials(
    right: Callable[[int, float, int], float],
    *,
    lengths: tuple[int, ...] = (32, 64, 128),
    depths: tuple[float, ...] = (0.0, 0.5, 1.0),
    n: int = 2,
    **changes: Any,
) -> list[dict[str, Any]]:
    return [
        {
            "task": "passkey",
            "length": length,
            "depth": depth,
            "trial": trial,
            "seed": 7,
            "answer": f"{length + trial:05d}",
            "output": f"{length + trial:05d}" if right(length, depth, trial) == 1 else "99999",
            "correct": right(length, depth, trial),
            "forced": 1.0,
            "logprob": -length / 16,
            "elapsed_s": 0.1,
            **changes,
        }
        for length in lengths
        for depth in depths
        for trial in range(n)
    ]


def make_run(path: Path, rows: list[dict[str, Any]], *, finalize: bool = False, **changes: Any) -> Path:
    with RunFolder.open(path, configuration(**changes)) as folder:
        for row in rows:
            folder.append(row)
        if finalize:
            folder.finalize()
    return path

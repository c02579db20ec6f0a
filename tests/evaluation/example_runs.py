"""Small finished runs for tests of what is made of results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    depths: tuple[float | None, ...] = (0.0, 0.5, 1.0),
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


def documents(losses: Sequence[Sequence[float]], *, bucket: int = 64, **changes: Any) -> list[dict[str, Any]]:
    """Rows of a perplexity run: for each document the mean loss of each bucket of positions."""
    rows = []
    for number, own in enumerate(losses):
        buckets = [
            {"start": i * bucket, "end": (i + 1) * bucket, "tokens": bucket, "nll": loss * bucket}
            for i, loss in enumerate(own)
        ]
        tokens = bucket * len(own)
        place = {"task": "perplexity", "length": tokens + 1, "depth": None, "trial": number, "seed": 7}
        nll = sum(entry["nll"] for entry in buckets)
        measured = {"nll": nll, "tokens_scored": tokens, "bytes": 4 * tokens, "windows": 1, "by_position": buckets}
        rows.append({**place, "answer": f"{number}.txt", "output": "", "correct": 0.5, **measured, **changes})
    return rows


def make_run(path: Path, rows: list[dict[str, Any]], *, finalize: bool = False, **changes: Any) -> Path:
    with RunFolder.open(path, configuration(**changes)) as folder:
        for row in rows:
            folder.append(row)
        if finalize:
            folder.finalize()
    return path


def make_tasks_run(path: Path, right: Callable[[str, int, int], float], *, n: int = 4, finalize: bool = False) -> Path:
    """A RULER run of three tasks at two lengths."""
    rows = [
        row
        for task in ("niah_single_1", "vt", "fwe")
        for row in trials(
            lambda length, _, trial, task=task: right(task, length, trial),
            lengths=(64, 128),
            depths=(None,),
            n=n,
            task=task,
        )
    ]
    return make_run(path, rows, finalize=finalize, task="ruler", skipped={"qa_1": "no file"})


def make_loss_run(path: Path, losses: Sequence[Sequence[float]], *, finalize: bool = False, **changes: Any) -> Path:
    """A perplexity run."""
    form = {"form": "sliding", "window": 256, "stride": 64, "bos": "auto", "bos_token": None, "max_tokens": None}
    text = [{"path": "a.txt", "sha256": "0" * 64}]
    given = {"task": "perplexity", "bucket": 64, "text": text, **form, **changes}
    return make_run(path, documents(losses), finalize=finalize, **given)

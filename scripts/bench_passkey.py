"""How much prefix reuse saves on a passkey grid, against one plain `generate` for each trial; and the peak memory.

    python scripts/bench_passkey.py                                  # both grids and the memory, SmolLM2
    python scripts/bench_passkey.py --grid 1024:11:10 --repeats 1 --no-float32 --no-memory

A grid is LENGTH:DEPTHS:TRIALS. In every round each way runs once, one after the other in the same process, and ratios
are taken within the round; what is printed is their median over the rounds. The memory is the highest resident set of
a process of its own during the grid, interpreter and libraries included (Linux).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

GRIDS = ("4096:5:3", "1024:11:10")
TARGETS = {"4096:5:3": {"same dtype": 1.5, "float32": 2.3}, "1024:11:10": {"same dtype": 1.7, "float32": 2.3}}
SPARE = 1 << 30
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--grid", action="append", help=f"LENGTH:DEPTHS:TRIALS; default {' '.join(GRIDS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--no-float32", action="store_true", help="leave out plain generation in float32")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-grid", default="8192:3:1")
    parser.add_argument("--memory-child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_child:
        print(json.dumps(memory(arguments.model, arguments.dtype, arguments.memory_grid)))
        return
    for grid in arguments.grid or GRIDS:
        bench(arguments.model, arguments.dtype, grid, arguments.repeats, not arguments.no_float32)
    if not arguments.no_memory:
        report_memory(arguments.model, arguments.dtype, arguments.memory_grid)


def queries_of(grid: str, tokenizer: Any) -> list[Any]:
    from ropepatch.evaluation.engine import Query
    from ropepatch.evaluation.task import Grid
    from ropepatch.evaluation.tasks.passkey import PasskeyTask

    length, depths, trials = map(int, grid.split(":"))
    task = PasskeyTask(tokenizer, Grid([length], np.linspace(0, 1, depths).tolist(), trials))
    prompts = map(task.build, task.places())
    return [Query(prompt.ids, prompt.answer, len(prompt.answer)) for prompt in prompts]


def reuse(model: Any, queries: list[Any]) -> tuple[Any, list[list[int]]]:
    from ropepatch.evaluation.engine import Engine

    with Engine(model) as engine:
        outcomes = list(engine.run(queries))
    assert engine.reuse, engine.reason
    return engine.work, [outcome.generated for outcome in sorted(outcomes, key=lambda outcome: outcome.index)]


def plain(model: Any, queries: list[Any]) -> list[list[int]]:
    import torch

    generated = []
    for query in queries:
        ids = torch.from_numpy(query.prompt.astype("int64")).unsqueeze(0)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=len(query.answer), pad_token_id=0
        )
        generated.append(output[0, ids.shape[1] :].tolist())
    return generated


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    value = function()
    return time.perf_counter() - began, value


def bench(name: str, dtype: str, grid: str, repeats: int, float32: bool) -> None:
    from ropepatch.loading import load_model

    model, tokenizer = load_model(name, dtype=dtype)
    full = load_model(name, dtype="float32").model if float32 else None
    queries = queries_of(grid, tokenizer)
    for warm in filter(None, (model, full)):
        plain(warm, queries[:1])
    ours: list[float] = []
    rivals: dict[str, list[float]] = {"same dtype": [], "float32": []}
    for _ in range(repeats):
        seconds, (work, found) = timed(lambda: reuse(model, queries))
        ours.append(seconds)
        seconds, expected = timed(lambda: plain(model, queries))
        rivals["same dtype"].append(seconds)
        if full is not None:
            rivals["float32"].append(timed(lambda: plain(full, queries))[0])
    right = [query.answer.tolist() for query in queries]
    agree = sum(a[: len(b)] == b for a, b in zip(found, expected, strict=True))
    print(f"grid {grid} (length:depths:trials), {name}, {model.dtype}, {len(queries)} trials, {repeats} rounds")
    print(
        f"  tokens computed {work.tokens_computed:,}, trie {work.trie_size:,}, sum of prompts {work.sum_of_prompts:,}"
    )
    print(f"  generated alike {agree}/{len(queries)}; right {sum(a == b for a, b in zip(found, right, strict=True))}")
    print(f"  reuse             {statistics.median(ours):8.1f} s")
    for label, times in rivals.items():
        if times:
            ratio = statistics.median(theirs / own for theirs, own in zip(times, ours, strict=True))
            target = TARGETS.get(grid, {}).get(label)
            verdict = "" if target is None else f"  (target {target}: {'met' if ratio >= target else 'MISSED'})"
            print(f"  plain, {label:10} {statistics.median(times):8.1f} s   {ratio:.2f} x{verdict}", flush=True)


def peak_resident() -> int:
    """Highest resident set in bytes since the process began, or since `CLEAR` was told to forget it (Linux)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def memory(name: str, dtype: str, grid: str) -> dict[str, int]:
    """Peak resident bytes of this process during a grid, with the sizes of model and cache."""
    from ropepatch.loading import load_model

    model, tokenizer = load_model(name, dtype=dtype)
    queries = queries_of(grid, tokenizer)
    loading = peak_resident()
    # Reading weights stored in another dtype holds both for a moment: that is loading, not the grid.
    gc.collect()
    CLEAR.write_text("5")
    reuse(model, queries)
    config = model.config
    heads = config.num_key_value_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    return {
        "peak": peak_resident(),
        "loading": loading,
        "model": sum(p.numel() * p.element_size() for p in model.parameters()),
        "cache": 2 * config.num_hidden_layers * heads * len(queries[0].sequence) * model.dtype.itemsize,
    }


def report_memory(name: str, dtype: str, grid: str) -> None:
    command = [sys.executable, __file__, "--memory-child", "--model", name, "--dtype", dtype, "--memory-grid", grid]
    sizes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    allowed = sizes["model"] + sizes["cache"] + SPARE
    verdict = "met" if sizes["peak"] <= allowed else "MISSED"
    shown = {label: f"{size / 2**20:,.0f} MiB" for label, size in {**sizes, "allowed": allowed}.items()}
    print(f"memory of grid {grid}: peak {shown['peak']} (while loading: {shown['loading']})")
    print(f"  model {shown['model']} + cache {shown['cache']} + 1 GiB = {shown['allowed']}: {verdict}")


if __name__ == "__main__":
    main()

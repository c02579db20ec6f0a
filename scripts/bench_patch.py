"""Time of a patched model against the unpatched one: what the frequencies seam costs at run time.

    python scripts/bench_patch.py [--model demo:smollm2] [--rounds 5] [--dtype bfloat16] [--quick]

For every method of the frequencies seam: prefill of 2,048 and 8,192 tokens and one decode step at 4,096 tokens of
cache. Unpatched and patched alternate within each round, in changing order, and the ratio is that of the
medians. Prints a Markdown table; `--json FILE` writes the raw times.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ropepatch
from ropepatch.compat import versions

DEFAULTS: dict[str, dict[str, Any]] = {"abf": {"factor": 4}, "proportional": {"partial_rotary_factor": 0.75}}


def options_of(name: str, planes: int) -> dict[str, Any]:
    """A sensible setting of a method for a head with this many rotated planes."""
    if name == "longrope":
        return {"factor": 4, "short_factor": [1.0] * planes, "long_factor": [2.0] * planes}
    return DEFAULTS.get(name, {"factor": 4})


def prefill(model: Any, tokens: int) -> Callable[[], None]:
    ids = torch.arange(tokens)[None] % model.config.vocab_size

    def run() -> None:
        model(ids, logits_to_keep=1)

    return run


def decode(model: Any, cached: int) -> Callable[[], None]:
    ids = torch.arange(cached)[None] % model.config.vocab_size
    cache = model(ids, logits_to_keep=1, use_cache=True).past_key_values
    token = ids[:, :1]

    def run() -> None:
        # The cost of a step does not depend on what the cache was filled with.
        for _ in range(8):
            model(token, past_key_values=cache, position_ids=torch.tensor([[cached]]), logits_to_keep=1)
            cache.crop(cached)

    return run


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def compare(
    model: Any, name: str, options: dict[str, Any], run: Callable[[], None], rounds: int
) -> tuple[float, float]:
    """Medians of unpatched and patched seconds over interleaved rounds."""
    times: dict[bool, list[float]] = {False: [], True: []}
    run()
    for number in range(rounds):
        for patched in (False, True) if number % 2 else (True, False):
            if patched:
                ropepatch.patch(model, name, **options)
            times[patched].append(seconds(run))
            if patched:
                ropepatch.unpatch(model)
    return statistics.median(times[False]), statistics.median(times[True])


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", default="", help="comma separated; all by default")
    parser.add_argument("--quick", action="store_true", help="512 and 1,024 tokens instead of 2,048 and 8,192")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    model, _ = ropepatch.load_model(arguments.model, dtype=arguments.dtype)
    planes = ropepatch.inspect(model).sites[0]["rotary_dim"] // 2
    short, long, cached = (512, 1024, 512) if arguments.quick else (2048, 8192, 4096)
    runs = {
        f"prefill {short}": prefill(model, short),
        f"prefill {long}": prefill(model, long),
        f"8 decode steps at {cached}": decode(model, cached),
    }
    names = (
        arguments.methods.split(",")
        if arguments.methods
        else [method.name for method in ropepatch.methods() if method.seam == "frequencies"]
    )
    rows = []
    print("| method | " + " | ".join(runs) + " |\n|---|" + "---|" * len(runs))
    for name in names:
        cells = []
        for label, run in runs.items():
            plain, patched = compare(model, name, options_of(name, planes), run, arguments.rounds)
            rows.append({"method": name, "run": label, "unpatched_s": plain, "patched_s": patched})
            cells.append(f"{patched / plain:.3f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{arguments.model}, {arguments.dtype}, {arguments.rounds} rounds, {torch.get_num_threads()} threads, "
        f"peak {peak:.2f} GiB, {versions()}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

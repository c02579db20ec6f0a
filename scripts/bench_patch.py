"""Time of a patched model against the unpatched one: what the frequencies seam costs at run time.

    python scripts/bench_patch.py [--model demo:smollm2] [--rounds 3] [--dtype bfloat16] [--quick]

For every method of the frequencies seam: prefill of 2,048 and 8,192 tokens and one decode step at 4,096 tokens of
cache. Every round runs the unpatched model and all methods, in an order of its own; the ratio is that of the medians
over the rounds. Prints a Markdown table; `--json FILE` writes the raw times.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import sys
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
            cache.crop(-1)

    return run


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(
    model: Any, settings: dict[str, dict[str, Any]], run: Callable[[], None], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each setting in each round; every round runs all of them once, in an order of its own.

    The unpatched model, under "", is measured at both ends of every round.
    """
    times: dict[str, list[float]] = {name: [] for name in ["", *settings]}
    run()
    for number in range(rounds):
        names = sorted(settings)
        random.Random(number).shuffle(names)
        times[""].append(seconds(run))
        for name in names:
            ropepatch.patch(model, name, **settings[name])
            times[name].append(seconds(run))
            ropepatch.unpatch(model)
        times[""].append(seconds(run))
    return times


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default="", help="comma separated; all by default")
    parser.add_argument("--quick", action="store_true", help="512 and 1,024 tokens instead of 2,048 and 8,192")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    model, _ = ropepatch.load_model(arguments.model, dtype=arguments.dtype)
    planes = ropepatch.inspect(model).sites[0]["rotary_dim"] // 2
    short, long, cached = (512, 1024, 512) if arguments.quick else (2048, 8192, 4096)
    runs = {
        # The short runs are noisier and cheaper: more rounds of them.
        f"prefill {short}": (prefill(model, short), 3),
        f"prefill {long}": (prefill(model, long), 1),
        f"8 decode steps at {cached}": (decode(model, cached), 5),
    }
    names = (
        arguments.methods.split(",")
        if arguments.methods
        else [method.name for method in ropepatch.methods() if method.seam == "frequencies"]
    )
    settings = {name: options_of(name, planes) for name in names}
    times = {}
    for label, (run, share) in runs.items():
        times[label] = measure(model, settings, run, share * arguments.rounds)
        print(f"{label}: done", file=sys.stderr, flush=True)
    plain = {label: statistics.median(found[""]) for label, found in times.items()}
    print("| method | " + " | ".join(runs) + " |\n|---|" + "---|" * len(runs))
    print("| unpatched, seconds | " + " | ".join(f"{plain[label]:.3f}" for label in runs) + " |")
    # The noise: the runs that ended the rounds over those that began them, both unpatched.
    again = [statistics.median(times[label][""][1::2]) / statistics.median(times[label][""][::2]) for label in runs]
    print("| unpatched again | " + " | ".join(f"{ratio:.3f}" for ratio in again) + " |")
    for name in names:
        ratios = [statistics.median(times[label][name]) / plain[label] for label in runs]
        print(f"| {name} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{arguments.model}, {arguments.dtype}, {arguments.rounds} rounds, {torch.get_num_threads()} threads, "
        f"peak {peak:.2f} GiB, {versions()}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions(), "seconds": times}, indent=1))


if __name__ == "__main__":
    main()

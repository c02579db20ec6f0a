"""Time of models with a position table after each patch against the same model before it.

    python scripts/bench_tables.py [--layers 4] [--rounds 7] [--dtype float32] [--methods linear,rope]

GPT-2's shapes (12 heads of 64 dimensions, a table of 1,024 rows) with random weights and the first N layers: a forward
of 1,024 tokens, a training step (forward and backward) of 512, and 256 tokens with 32 single ones after. Patched runs
stand among unpatched ones as in bench_patch.py, and the row "unpatched" is its control: a cell is the median of a
method's ratios over that of the control, with a 95 % bootstrap interval of its median. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from bench_patch import interval, measure
from transformers import AutoModelForCausalLM, GPT2Config

from ropepatch.compat import versions

SETTINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4},
    "hierarchical": {"factor": 4},
    "sinusoidal": {"factor": 4},
    "nope": {"factor": 4},
    "rope": {"factor": 4},
    "alibi": {"factor": 4},
}


def ids(model: Any, tokens: int) -> torch.Tensor:
    return torch.arange(tokens)[None] % model.config.vocab_size


def forward(model: Any, tokens: int) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            model(ids(model, tokens), logits_to_keep=1)

    return run


def step(model: Any, tokens: int) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(ids(model, tokens), logits_to_keep=1).logits.float().sum().backward()

    return run


def generate(model: Any, cached: int) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            # Filled anew in each run: a cache belongs to the patch under which it was filled.
            cache = model(ids(model, cached), logits_to_keep=1, use_cache=True).past_key_values
            for _ in range(32):
                model(ids(model, 1), past_key_values=cache, logits_to_keep=1)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", default=",".join(SETTINGS), help="comma separated")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    config = GPT2Config(n_layer=arguments.layers)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, arguments.dtype)).eval()
    settings = {name: SETTINGS[name] for name in arguments.methods.split(",")}
    runs = {
        "forward, 1,024 tokens": forward(model, 1024),
        "training step, 512 tokens": step(model, 512),
        "256 tokens, then 32 one by one": generate(model, 256),
    }
    times = {}
    for label, run in runs.items():
        times[label] = measure(model, settings, run, arguments.rounds)
        print(f"{label}: done", file=sys.stderr, flush=True)
    print("| method | " + " | ".join(runs) + " |\n|---|" + "---|" * len(runs))
    for name in ("unpatched", *settings):
        cells = []
        for label in runs:
            control = 1.0 if name == "unpatched" else statistics.median(times[label]["unpatched"])
            low, high = interval(times[label][name])
            median = statistics.median(times[label][name])
            cells.append(f"{median / control:.3f} [{low / control:.3f}, {high / control:.3f}]")
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\nGPT-2 shapes, {arguments.layers} layers, {arguments.dtype}, {arguments.rounds} rounds, {versions()}")


if __name__ == "__main__":
    main()

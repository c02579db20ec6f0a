"""Perplexity of one long document against the usual script that makes all logits: number, time and peak memory.

    python scripts/bench_perplexity.py                                    # SmolLM2, the longest speech, 4096 and 512
    python scripts/bench_perplexity.py --tokens 8192 --repeats 1          # a prefix of it
    python scripts/bench_perplexity.py --only sliding --dtype float32     # the number, as exactly as can be
    python scripts/bench_perplexity.py --text book.txt --model path/to/model

The usual script is the loop of Hugging Face's perplexity guide: `model(input_ids, labels=...)` for each window, with
-100 in place of the labels that an earlier window scored; window means are weighted by the labels that count after
the shift. The single pass is held against a bare prefill of the same document in chunks of 4,096 tokens, with the
same attention and no logits but the last; the logits of a short document weigh more than those of a long one. The two
numbers agree as far as the dtype rounds, so the target for the difference is one for `--dtype float32`. In every
round each way runs once, one after the other in the same process, and ratios are taken within the round; what is
printed is their median, of wall time and of processor time. Memory is the highest resident set of a process of its
own while it measures, interpreter, libraries and model included (Linux); "added" is what lies above the set that was
resident before.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TARGETS = {"difference": 1e-4, "time": 0.95, "memory": 0.5, "single pass": 1.1}
CHUNK = 4096
FORMS = ("sliding", "single_pass")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--text", help="default: the longest document of the suite's default text")
    parser.add_argument("--tokens", type=int, help="only so many tokens of it")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--stride", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=FORMS, action="append", help="a form; default both")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-child", choices=["ours", "usual", "single"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_child:
        print(json.dumps(memory(arguments)))
        return
    parts = {"sliding": (bench_sliding, sliding_memory), "single_pass": (bench_single, single_memory)}
    model, job = load(arguments)
    chosen = [parts[form] for form in arguments.only or FORMS]
    for bench, _ in chosen:
        bench(arguments, model, job)
    del model, job
    if not arguments.no_memory:
        for _, report in chosen:
            report(arguments)


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model, and a job for each form by its settings."""
    from ropepatch.evaluation.perplexity.documents import default_documents
    from ropepatch.evaluation.tasks.perplexity import PerplexitySuite
    from ropepatch.loading import load_model

    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype)
    longest = None if arguments.text else max(default_documents(), key=lambda document: len(document.text))

    def job(**settings: Any) -> Any:
        from ropepatch.evaluation.perplexity import job as module

        if longest is not None:
            module.default_documents = lambda: [longest]
        text = (arguments.text,) if arguments.text else None
        suite = PerplexitySuite(task="perplexity", text=text, max_tokens=arguments.tokens, **settings)
        return module.PerplexityJob(model, tokenizer, suite)

    return model, job


def measure(job: Any) -> dict[str, Any]:
    from ropepatch.evaluation.sharding import Ranks

    (row,) = job.rows(job.places(), Ranks(), progress=False)
    return row


def usual(model: Any, ids: Any, window: int, stride: int) -> float:
    """Mean loss of a document's tokens, nats."""
    import torch

    tokens = torch.from_numpy(ids.astype("int64")).unsqueeze(0)
    total, count, before = 0.0, 0, 0
    for begin in range(0, tokens.shape[1], stride):
        end = min(begin + window, tokens.shape[1])
        inputs = tokens[:, begin:end]
        labels = inputs.clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = model(inputs, labels=labels).loss
        valid = int((labels[:, 1:] != -100).sum())
        total, count, before = total + float(loss) * valid, count + valid, end
        if end == tokens.shape[1]:
            break
    return total / count


def prefill(model: Any, ids: Any) -> None:
    import torch

    from ropepatch.evaluation.cache import Reader
    from ropepatch.evaluation.chunked_attention import chunked_attention

    with torch.inference_mode(), chunked_attention(model) as unmasked:
        Reader(model, chunk_size=CHUNK, unmasked=unmasked).extend(ids, keep=1)


def timed(function: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Seconds by the clock and of the processor, and what came out."""
    began = time.perf_counter(), time.process_time()
    value = function()
    return (time.perf_counter() - began[0], time.process_time() - began[1]), value


def rounds(
    number: int, ours: Callable[[], Any], other: Callable[[], Any]
) -> tuple[list[tuple[float, float]], list[tuple[float, float]], Any, Any]:
    """The times of both ways, one after the other in every round, and what each made of the last."""
    pairs = [(timed(ours), timed(other)) for _ in range(number)]
    (_, own), (_, rival) = pairs[-1]
    return [a for (a, _), _ in pairs], [b for _, (b, _) in pairs], own, rival


def bench_sliding(arguments: argparse.Namespace, model: Any, job: Any) -> None:
    window, stride = arguments.window, arguments.stride
    ready = job(window=window, stride=stride)
    ids = ready.documents[0].ids
    prefill(model, ids[:256])
    ours, theirs, row, expected = rounds(
        arguments.repeats, lambda: measure(ready), lambda: usual(model, ids, window, stride)
    )
    loss = row["nll"] / row["tokens_scored"]
    difference = abs(math.exp(loss - expected) - 1)
    print(title(arguments, model, ready))
    print(f"  window {window:,}, stride {stride:,}: {row['windows']} windows")
    print(f"  perplexity {math.exp(loss):.5f}, usual script {math.exp(expected):.5f}", end="")
    exact = str(model.dtype) == "torch.float32"
    print(f"  relative difference {difference:.1e}{verdict('difference', difference) if exact else ''}")
    report_time("sliding", ours, "usual script", theirs, "time")


def bench_single(arguments: argparse.Namespace, model: Any, job: Any) -> None:
    ready = job(form="single_pass")
    ids = ready.documents[0].ids
    prefill(model, ids[:256])
    ours, bare, row, _ = rounds(arguments.repeats, lambda: measure(ready), lambda: prefill(model, ids[:-1]))
    print(title(arguments, model, ready))
    print(f"  single pass: perplexity {math.exp(row['nll'] / row['tokens_scored']):.5f}; first", end=" ")
    print(", ".join(f"{e['length']:,}: {math.exp(e['nll'] / e['tokens']):.3f}" for e in row["by_context"]))
    report_time("single pass", ours, "bare prefill", bare, "single pass")


def title(arguments: argparse.Namespace, model: Any, job: Any) -> str:
    (document,) = job.documents
    about = f"{arguments.model}, {model.dtype}, {document.name}: {len(document.ids):,} tokens"
    return f"{about}, {arguments.repeats} rounds"


def report_time(
    ours: str, own: list[tuple[float, float]], theirs: str, other: list[tuple[float, float]], target: str
) -> None:
    wall, processor = (statistics.median(a[i] / b[i] for a, b in zip(own, other, strict=True)) for i in (0, 1))
    seconds = [statistics.median(wall for wall, _ in times) for times in (own, other)]
    print(
        f"  {ours} {seconds[0]:.1f} s, {theirs} {seconds[1]:.1f} s: {wall:.3f} x{verdict(target, wall)}; "
        f"processor time {processor:.3f} x",
        flush=True,
    )


def verdict(target: str, value: float) -> str:
    return f"  (target at most {TARGETS[target]:g}: {'met' if value <= TARGETS[target] else 'MISSED'})"


def resident(name: str) -> int:
    """Bytes: `VmRSS` now, `VmHWM` at most since the process began or was told to forget (Linux)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def memory(arguments: argparse.Namespace) -> dict[str, int]:
    """Resident bytes of this process before one way of measuring, and at most while it measures."""
    model, job = load(arguments)
    window, stride = arguments.window, arguments.stride
    ready = job(form="single_pass") if arguments.memory_child == "single" else job(window=window, stride=stride)
    ids = ready.documents[0].ids
    prefill(model, ids[:256])
    gc.collect()
    CLEAR.write_text("5")
    before = resident("VmRSS")
    if arguments.memory_child == "usual":
        usual(model, ids, window, stride)
    else:
        measure(ready)
    config = model.config
    heads = config.num_key_value_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    per_token = 2 * config.num_hidden_layers * heads * model.dtype.itemsize
    return {"before": before, "peak": resident("VmHWM"), "tokens": len(ids), "cache per token": per_token}


def child(arguments: argparse.Namespace, way: str, tokens: int | None) -> dict[str, int]:
    command = [sys.executable, __file__, "--memory-child", way, "--model", arguments.model, "--dtype", arguments.dtype]
    command += ["--window", str(arguments.window), "--stride", str(arguments.stride)]
    command += ["--text", arguments.text] if arguments.text else []
    command += ["--tokens", str(tokens)] if tokens else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    sizes: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return sizes


def sliding_memory(arguments: argparse.Namespace) -> None:
    # Two windows tell the peak of a hundred: each begins afresh.
    prefix = min(arguments.tokens or math.inf, arguments.window + 2 * arguments.stride)
    ours, theirs = (child(arguments, way, int(prefix)) for way in ("ours", "usual"))
    ratio = ours["peak"] / theirs["peak"]
    added = (ours["peak"] - ours["before"]) / (theirs["peak"] - theirs["before"])
    print(f"  peak memory: sliding {mib(ours['peak'])}, usual script {mib(theirs['peak'])}: {ratio:.2f} x", end="")
    print(f"{verdict('memory', ratio)}; added: {added:.2f} x", flush=True)


def single_memory(arguments: argparse.Namespace) -> None:
    import numpy as np

    total = child(arguments, "single", arguments.tokens)
    parts = [child(arguments, "single", total["tokens"] * k // 4) for k in (1, 2, 3)] + [total]
    lengths = np.asarray([part["tokens"] for part in parts])
    peaks = np.asarray([part["peak"] - part["before"] for part in parts])
    slope, start = np.polyfit(lengths, peaks, 1)
    off = float(np.abs(slope * lengths + start - peaks).max() / peaks.max())
    shown = ", ".join(f"{n:,}: {mib(peak)}" for n, peak in zip(lengths, peaks, strict=True))
    print(f"  single pass, added by tokens: {shown}")
    print(f"  line: {slope / 1024:.1f} KiB a token (cache {total['cache per token'] / 1024:.1f}), off by {off:.1%}")


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


if __name__ == "__main__":
    main()

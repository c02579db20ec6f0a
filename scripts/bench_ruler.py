"""RULER's niah_single_1 and grids of prompts against lm-evaluation-harness.

    python scripts/bench_ruler.py                                # 8 samples at 4,096 tokens, SmolLM2, and two grids
    python scripts/bench_ruler.py --samples 2 --length 1024 --rounds 1 --grid passkey:1024:3:1 --no-memory

First part: the harness (PyPI `lm-eval`) makes the prompts. Its `HFLM` answers them one after the other, our engine
answers the very same ones: same token ids, same model in the same dtype, same limit of generated tokens. The engine
reads what prompts share once, and stops a sample as soon as its text holds every reference, which no further token can
undo; so the harness's own score, taken of both, is the same unless the tokens differ.

Second part: grids of ours, SUITE:LENGTH,...:DEPTHS:TRIALS[:NAME=VALUE,...], whose very prompts the harness is given,
with the same limit of generated tokens. (`scripts/bench_passkey.py` has grids against one plain `generate` for each
prompt.)

In every round each way runs once, one after the other in the same process; the order alternates. Ratios are taken
within the round; what is printed is their median. Tokenising is timed, making the prompts is not. The memory is the
highest resident set of a process of its own that runs one way once, interpreter and libraries included, loading left
out (Linux). Needs: pip install 'ropepatch[harness]'.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bench_passkey import CLEAR, peak_resident

TASK = "niah_single_1"
GRIDS = ("passkey:4096:5:3", "needle:4096:5:3", "key_value:4096:5:3:in_place=true")
RULER_TARGET, GRID_TARGET = 1.5, 2.0


class Result(NamedTuple):
    """What one way made of the prompts: a score, a text and the number of generated tokens for each."""

    scores: list[float]
    texts: list[str]
    tokens: list[int]


class Contest(NamedTuple):
    """Two ways to answer the same prompts."""

    title: str
    rival: str
    target: float
    ours: Callable[[], Result]
    theirs: Callable[[], Result]
    warm: Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--samples", type=int, default=8, help="RULER prompts; 0 leaves RULER out")
    parser.add_argument("--length", type=int, default=4096, help="RULER's length, 128 generated tokens included")
    parser.add_argument(
        "--grid",
        action="append",
        help=f"SUITE:LENGTH,...:DEPTHS:TRIALS[:NAME=VALUE,...]; none: no grid; default {' '.join(GRIDS)}",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-child", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    grids = [grid for grid in arguments.grid or GRIDS if grid != "none"]
    for grid in [*([None] if arguments.samples > 0 else []), *grids]:
        made = contest(arguments, grid)
        if arguments.memory_child:
            print(json.dumps(memory(made, arguments.memory_child)))
            return
        bench(made, arguments.rounds)
        if not arguments.no_memory:
            report_memory(arguments, grid)


def contest(arguments: argparse.Namespace, grid: str | None) -> Contest:
    """A grid, or RULER where none is given."""
    from ropepatch.loading import load_model, model_source

    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype)
    title = f"{arguments.model}, {str(model.dtype).removeprefix('torch.')}"
    if grid is not None:
        return grid_contest(model, tokenizer, grid, title)
    return ruler_contest(model, tokenizer, model_source(arguments.model), arguments.samples, arguments.length, title)


def ruler_contest(model: Any, tokenizer: Any, source: str, samples: int, length: int, title: str) -> Contest:
    from lm_eval import tasks
    from lm_eval.models.huggingface import HFLM

    random.seed(0)  # as the harness does
    folder = Path(tasks.__file__).parent / "ruler"
    metadata = {"tokenizer": source, "max_seq_lengths": [length]}
    manager = tasks.TaskManager(include_defaults=False, include_path=str(folder), metadata=metadata)
    task = manager.load([TASK])["tasks"][TASK]
    task.build_all_requests(limit=samples)
    requests = task.instances
    limit = requests[0].args[1]["max_gen_toks"]
    # RULER does not count the first words of the answer, which it puts behind the prompt.
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=length + 256)

    def result(texts: list[str], tokens: list[int]) -> Result:
        scores = [task.process_results(r.doc, [text])[str(length)] for r, text in zip(requests, texts, strict=True)]
        return Result(scores, texts, tokens)

    def theirs() -> Result:
        texts = lm.generate_until(requests, disable_tqdm=True)
        # The harness keeps only the text: its tokens are counted anew.
        return result(texts, [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts])

    def ours() -> Result:
        queries = [query(lm, tokenizer, request, limit) for request in requests]
        tokens = answer(model, queries)
        return result([tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens], list(map(len, tokens)))

    lengths = [len(lm.tok_encode(request.args[0])) for request in requests]
    title = f"RULER {TASK}, {len(requests)} samples of {min(lengths):,} to {max(lengths):,} tokens, {title}"
    return Contest(
        title, "lm-eval", RULER_TARGET, ours, theirs, lambda: lm.generate_until(requests[:1], disable_tqdm=True)
    )


def query(lm: Any, tokenizer: Any, request: Any, limit: int) -> Any:
    """The harness's request for our engine: the ids that the harness would read."""
    from ropepatch.evaluation.engine import Query

    context, references = request.args[0], [text.lower() for text in request.doc["outputs"]]
    prompt = lm.tok_batch_encode([context])[0][0].numpy().astype(np.int32)
    ideal = lm.tok_batch_encode([f"{context} {', '.join(request.doc['outputs'])}"])[0][0].numpy().astype(np.int32)
    assert (ideal[: len(prompt)] == prompt).all(), "the answer changes the prompt's tokens"

    def enough(generated: list[int]) -> bool:
        text = tokenizer.decode(generated, skip_special_tokens=True).lower()
        return all(reference in text for reference in references)

    return Query(prompt, ideal[len(prompt) :], limit, enough)


def answer(model: Any, queries: list[Any]) -> list[list[int]]:
    """What our engine generates for each query."""
    from ropepatch.evaluation.engine import Engine, end_tokens

    with Engine(model) as engine:
        outcomes = list(engine.run(queries, end_tokens=end_tokens(model)))
    assert engine.reuse, engine.reason
    return [outcome.generated for outcome in sorted(outcomes, key=lambda outcome: outcome.index)]


def grid_contest(model: Any, tokenizer: Any, grid: str, title: str) -> Contest:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from ropepatch.evaluation.engine import Query
    from ropepatch.evaluation.suites import load_suite
    from ropepatch.evaluation.trie import trie_size, walk

    name, lengths, depths, trials, *options = grid.split(":")
    settings = {
        "lengths": [int(length) for length in lengths.split(",")],
        "depths": np.linspace(0, 1, int(depths)).tolist(),
        "trials": int(trials),
        **dict(option.split("=", 1) for option in ",".join(options).split(",") if option),
    }
    retrieval = load_suite(name, settings).retrieval(tokenizer)  # type: ignore[attr-defined]
    prompts = [retrieval.build(place) for place in retrieval.places()]

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max(settings["lengths"]) + 256)
    contexts = [tokenizer.decode(prompt.ids) for prompt in prompts]
    assert all(lm.tok_encode(text) == prompt.ids.tolist() for text, prompt in zip(contexts, prompts, strict=True))
    requests = [
        Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": prompt.most_tokens, "do_sample": False}), i)
        for i, (text, prompt) in enumerate(zip(contexts, prompts, strict=True))
    ]

    def result(texts: list[str]) -> Result:
        grades = [retrieval.grade(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        tokens = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        return Result([grade.correct for grade in grades], [grade.output for grade in grades], tokens)

    def enough(prompt: Any) -> Callable[[list[int]], bool]:
        return lambda generated: retrieval.enough(prompt, retrieval.encoder.decode(generated))

    def ours() -> Result:
        queries = [Query(prompt.ids, prompt.answer, prompt.most_tokens, enough(prompt)) for prompt in prompts]
        return result([retrieval.encoder.decode(ids) for ids in answer(model, queries)])

    def theirs(count: int | None = None) -> list[str]:
        return list(lm.generate_until(requests[:count], disable_tqdm=True))

    sequences = [np.concatenate([prompt.ids, prompt.answer[:-1]]) for prompt in prompts]
    total, distinct = sum(map(len, sequences)), trie_size(walk(sequences))
    title = f"grid {grid}, {len(prompts)} prompts, {distinct:,} distinct of {total:,} tokens, {title}"
    return Contest(
        title,
        "lm-eval",
        GRID_TARGET,
        ours,
        lambda: result(theirs()),
        lambda: theirs(1),
    )


def timed(way: Callable[[], Result]) -> tuple[float, Result]:
    began = time.perf_counter()
    value = way()
    return time.perf_counter() - began, value


def bench(contest: Contest, rounds: int) -> None:
    contest.warm()
    ours: list[float] = []
    theirs: list[float] = []
    for number in range(rounds):
        ways = [(ours, contest.ours), (theirs, contest.theirs)]
        results = {}
        for times, way in ways if number % 2 == 0 else reversed(ways):
            seconds, results[way] = timed(way)
            times.append(seconds)
    own, rival = results[contest.ours], results[contest.theirs]
    alike = sum(theirs.strip().startswith(ours.strip()) for ours, theirs in zip(own.texts, rival.texts, strict=True))
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    print(f"{contest.title}, {rounds} rounds")
    for label, times, result in (("ours", ours, own), (contest.rival, theirs, rival)):
        score = statistics.mean(result.scores)
        print(
            f"  {label:9} {statistics.median(times):8.1f} s   score {score:.3f}   {sum(result.tokens)} tokens generated"
        )
    agree = sum(a == b for a, b in zip(own.scores, rival.scores, strict=True))
    print(f"  same score for {agree}/{len(own.scores)} prompts; our text begins theirs for {alike}/{len(own.texts)}")
    print(f"  {ratio:.2f} times as fast, rounds {', '.join(f'{r:.2f}' for r in ratios)}", end="")
    print(f"  (target {contest.target}: {'met' if ratio >= contest.target else 'MISSED'})", flush=True)


def memory(contest: Contest, way: str) -> int:
    """Peak resident bytes of this process while one way runs once."""
    gc.collect()
    CLEAR.write_text("5")
    getattr(contest, way)()
    return peak_resident()


def report_memory(arguments: argparse.Namespace, grid: str | None) -> None:
    same = ["--model", arguments.model, "--dtype", arguments.dtype, "--length", str(arguments.length)]
    only = ["--samples", str(0 if grid else arguments.samples), "--grid", grid or "none"]
    peaks = {}
    for way in ("ours", "theirs"):
        command = [sys.executable, __file__, "--memory-child", way, *same, *only]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        peaks[way] = int(done.stdout.splitlines()[-1])
    shown = ", ".join(f"{way} {peak / 2**20:,.0f} MiB" for way, peak in peaks.items())
    print(f"  peak memory: {shown}", flush=True)


if __name__ == "__main__":
    main()

"""Generated answers with guesses at the next tokens (`evaluation/lookup.py`), against the same engine token by token.

    python scripts/bench_generation.py                                # RULER's offline tasks at 4,096 tokens, SmolLM2
    python scripts/bench_generation.py --length 8192 --patch rerope --tasks niah_multivalue,cwe --rounds 1

Each round answers every task's prompt both ways in the same process; the order alternates. Only the generation is
timed: from the first wrong token of the answer to the end, prompts and answers having been read. Ratios are taken
within the round, what is printed is their median. "Same" counts prompts with the same tokens both ways: reading several
tokens at once rounds differently, which in bfloat16 may turn over a near tie.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any
from unittest import mock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--patch")
    parser.add_argument("--tasks", help="default: all that work offline")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    import ropepatch

    model, tokenizer = ropepatch.load_model(arguments.model, dtype=arguments.dtype)
    if arguments.patch:
        ropepatch.patch(model, arguments.patch)
    patch = f", {arguments.patch}" if arguments.patch else ""
    print(f"{arguments.model}, {str(model.dtype).removeprefix('torch.')}{patch}, {arguments.length:,} tokens")
    print(f"{'task':16} {'tokens':>6} {'forwards':>8} {'guessing':>9} {'one by one':>10} {'ratio':>6} same")
    bench(model, queries(tokenizer, arguments.tasks, arguments.length), arguments.rounds)


def queries(tokenizer: Any, tasks: str | None, length: int) -> dict[str, Any]:
    """A prompt of every task."""
    from ropepatch.evaluation.engine import Query
    from ropepatch.evaluation.suites import load_suite

    settings = {"lengths": [length], "trials": 1, **({"tasks": tasks.split(",")} if tasks else {})}
    retrieval = load_suite("ruler", settings).retrieval(tokenizer)  # type: ignore[attr-defined]
    made = {}
    for place in retrieval.places():
        prompt = retrieval.build(place)
        made[place.task] = Query(
            prompt.ids,
            prompt.answer,
            prompt.most_tokens,
            lambda generated, prompt=prompt: retrieval.enough(prompt, retrieval.encoder.decode(generated)),
        )
    return made


def bench(model: Any, asked: dict[str, Any], rounds: int) -> None:
    """Time every query both ways, and print a line for each and one for all."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for task, query in asked.items():
        own: dict[bool, list[tuple[list[int], float, int]]] = {True: [], False: []}
        for number in range(rounds):
            for guessing in (True, False) if number % 2 == 0 else (False, True):
                own[guessing].append(generate(model, query, guessing=guessing))
        tokens, forwards = own[True][0][0], own[True][0][2]
        times = {guessing: [seconds for _, seconds, _ in found] for guessing, found in own.items()}
        line = f"{task:16} {len(tokens):6} {forwards:8}"
        if not forwards and not own[False][0][2]:
            print(f"{line}   (the answer is right: nothing is generated)", flush=True)
            continue
        ratio = statistics.median(b / a for a, b in zip(times[True], times[False], strict=True))
        same = tokens == own[False][0][0]
        medians = (statistics.median(times[True]), statistics.median(times[False]))
        print(f"{line} {medians[0]:7.2f} s {medians[1]:8.2f} s {ratio:6.2f} {same}", flush=True)
        for guessing, found in times.items():
            seconds[guessing] = [sum(pair) for pair in zip(seconds[guessing] or [0.0] * rounds, found, strict=True)]
    if seconds[True]:
        ratio = statistics.median(b / a for a, b in zip(seconds[True], seconds[False], strict=True))
        totals = {guessing: statistics.median(found) for guessing, found in seconds.items()}
        print(f"{'all':31} {totals[True]:7.2f} s {totals[False]:8.2f} s {ratio:6.2f}")


def generate(model: Any, query: Any, *, guessing: bool) -> tuple[list[int], float, int]:
    """The tokens, the seconds of the generation alone, and its forwards."""
    from ropepatch.evaluation.engine import Engine, end_tokens
    from ropepatch.evaluation.lookup import Guesser

    spent, forwards = 0.0, 0
    inner = Engine._generate

    def timed(self: Engine, reader: Any, *rest: Any) -> None:
        nonlocal spent
        extend = reader.extend

        def counted(*given: Any, **named: Any) -> Any:
            nonlocal forwards
            forwards += 1
            return extend(*given, **named)

        with mock.patch.object(reader, "extend", counted):
            began = time.perf_counter()
            inner(self, reader, *rest)
            spent += time.perf_counter() - began

    with mock.patch.object(Engine, "_generate", timed), Engine(model) as engine:
        if guessing:
            outcome = next(iter(engine.run([query], end_tokens=end_tokens(model))))
        else:
            with mock.patch.object(Guesser, "guess", lambda self: self._ids[:0]):
                outcome = next(iter(engine.run([query], end_tokens=end_tokens(model))))
        assert engine.reuse, engine.reason
    return outcome.generated, spent, forwards


if __name__ == "__main__":
    main()

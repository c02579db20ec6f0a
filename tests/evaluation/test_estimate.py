"""How long a run takes: measured on a clock with a known pace, and against a real run of a tiny model."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import model, tokenizer

import ropepatch
from ropepatch.evaluation import evaluate
from ropepatch.evaluation import retrieval as retrieval_module
from ropepatch.evaluation.estimate import Pace, about, announcement, measure_pace
from ropepatch.evaluation.retrieval import RetrievalJob
from ropepatch.evaluation.sharding import Ranks
from ropepatch.evaluation.task import Grid, Place
from ropepatch.evaluation.tasks.passkey import PasskeyTask
from ropepatch.evaluation.trie import token_cost

GRID: dict[str, Any] = {"lengths": [200, 400], "depths": [0, 0.5, 1], "trials": 4}


class Machine:
    """A model of known pace, with its own clock."""

    def __init__(self, per_forward: float, per_token: float, quadratic: float) -> None:
        self.pace = Pace(per_forward, per_token)
        self.quadratic = quadratic
        self.now = 0.0

    def read(self, tokens: int) -> None:
        self.now += self.pace.seconds(1, token_cost(0, tokens, quadratic=self.quadratic))

    def __call__(self) -> float:
        return self.now


@given(
    per_forward=st.floats(0, 0.1),
    per_token=st.floats(1e-6, 1e-2),
    quadratic=st.floats(0, 1e-2),
    longest=st.integers(1, 100_000),
)
def test_the_pace_of_a_steady_machine_is_found(
    per_forward: float, per_token: float, quadratic: float, longest: int
) -> None:
    machine = Machine(per_forward, per_token, quadratic)
    pace = measure_pace(machine.read, longest, quadratic, clock=machine)
    for tokens in (1, longest):
        work = token_cost(0, tokens, quadratic=quadratic)
        if longest > 64 and machine.pace.seconds(8, token_cost(0, 64, quadratic=quadratic)) < 0.1:
            assert pace.seconds(1, work) == pytest.approx(machine.pace.seconds(1, work), rel=0.01)
    first = machine.pace.seconds(1, token_cost(0, min(16, longest), quadratic=quadratic))
    assert machine.now <= first + max(3.0, first) + 1e-9


def test_a_slow_start_is_not_taken_for_the_pace() -> None:
    """The first call reads the weights from the disk: 5 s, as against 0.1 s for those after it."""
    machine = Machine(0.1, 1e-4, 0.0)

    def read(tokens: int) -> None:
        machine.now += 5.0 if machine.now == 0 else 0.0
        machine.read(tokens)

    pace = measure_pace(read, 4096, 0.0, clock=machine)
    assert pace.seconds(1, token_cost(0, 4096, quadratic=0.0)) == pytest.approx(0.1 + 0.4096, rel=0.01)


def test_a_clock_that_jumps_gives_no_negative_pace() -> None:
    jumps = iter([0.0, 5.0, 5.1, 9.0, 9.1, 9.1, 9.2, 9.2, 9.2, 9.3, 9.4, 9.4, 9.5, 9.6])
    pace = measure_pace(lambda _: None, 64, 0.0, patience=100, clock=lambda: next(jumps))
    assert pace.per_forward >= 0
    assert pace.per_token >= 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "about 10 seconds"),
        (34, "about 30 seconds"),
        (70, "about 70 seconds"),
        (200, "about 3 minutes"),
        (1000, "about 15 minutes"),
        (3600, "about 60 minutes"),
        (6000, "about 1.5 hours"),
        (7300, "about 2 hours"),
        (100_000, "about 28 hours"),
    ],
)
def test_no_false_precision(seconds: float, words: str) -> None:
    assert about(seconds) == words


def test_the_line() -> None:
    assert announcement(30, 123456, 700) == "30 trials, 123,456 tokens to compute: about 10 minutes"
    assert announcement(1, 123456, 700).startswith("1 trial, ")


def _job(net: Any) -> RetrievalJob:
    return RetrievalJob(net, PasskeyTask(tokenizer("byte_level"), Grid(**GRID)), seed=0)


@pytest.mark.parametrize("kind", ["llama", "mamba"])
def test_the_estimate_is_of_the_right_size(kind: str) -> None:
    job = _job(model(kind, num_hidden_layers=4, hidden_size=256) if kind == "llama" else model(kind))
    ratios: list[float] = []
    while len(ratios) < 3 and not any(1 / 3 < ratio < 3 for ratio in ratios):  # the machine may stall at any time
        assert job.start_plan()
        costs = job.costs(job.places())
        began = time.perf_counter()
        rows = list(job.rows(job.places(), Ranks(), progress=False))
        ratios.append(sum(costs.values()) / (time.perf_counter() - began))
        assert len(rows) == len(costs) == 24
    assert any(1 / 3 < ratio < 3 for ratio in ratios), ratios


def test_costs_come_in_the_order_of_the_rows_and_count_prefixes_once() -> None:
    job = _job(model("llama"))
    job.start_plan()
    job._pace = Pace(per_forward=0.0, per_token=1e-3)  # measured on so small a model, a token may come to nothing
    assert job.work()["sum_of_prompts"] == job.work()["trie_size"] == 0
    together = job.costs(job.places())
    assert list(together) == [Place.of(row) for row in job.rows(job.places(), Ranks(), progress=False)]
    alone = {place: cost for place in job.places() for cost in job.costs([place]).values()}
    assert all(together[place] <= alone[place] for place in alone)
    assert sum(together.values()) < 0.9 * sum(alone.values())


def test_a_closed_run_counts_only_what_it_computed() -> None:
    job = _job(model("llama"))
    rows = job.rows(job.places(), Ranks(), progress=False)
    for _ in range(5):
        next(rows)
    rows.close()
    work = job.work()
    assert work["tokens_computed"] == work["trie_size"] < work["sum_of_prompts"]


@pytest.mark.parametrize("patch", [None, "yarn", "self_extend"])
def test_a_long_run_is_announced_and_results_are_the_same(
    patch: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net = model("llama", max_position_embeddings=256)
    if patch:
        ropepatch.patch(net, patch, factor=2)
    options = {**GRID, "trials": 1}
    quiet = evaluate(net, tokenizer("byte_level"), "passkey", **options, progress=False)
    assert "tokens to compute" not in capsys.readouterr().err
    evaluate(net, tokenizer("byte_level"), "passkey", **options)
    assert "tokens to compute" not in capsys.readouterr().err  # too short to be worth a line
    monkeypatch.setattr(retrieval_module, "WORTH_SAYING", 0.0)
    loud = evaluate(net, tokenizer("byte_level"), "passkey", **options)
    captured = capsys.readouterr()
    assert f"6 trials, {loud.trie_size:,} tokens to compute: about 10 seconds" in captured.err
    assert captured.out == ""
    assert [{**row, "elapsed_s": 0} for row in loud.trials] == [{**row, "elapsed_s": 0} for row in quiet.trials]
    assert loud.summary["work"] == quiet.summary["work"]
    assert torch.is_grad_enabled()

"""A budget of time: where the trials go, and that the time is kept, by an artificial clock."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small import model, tokenizer

from ropepatch.errors import OptionError
from ropepatch.evaluation import evaluate
from ropepatch.evaluation.budget import Budget, PlannedJob, Spender
from ropepatch.evaluation.retrieval import RetrievalJob
from ropepatch.evaluation.scoring import wilson_interval
from ropepatch.evaluation.sharding import Ranks
from ropepatch.evaluation.task import Grid, Place
from ropepatch.evaluation.tasks.passkey import PasskeyTask

Cell = tuple[int, float]


class Clock:
    """Stands still unless something takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class LengthJob:
    """A job without a plan: a trial takes one second for each of its tokens."""

    def __init__(self, cells: Sequence[Cell], trials: int, clock: Clock, right: Callable[[Place], float]) -> None:
        self.all = [Place("fake", n, depth, t) for n, depth in cells for t in range(trials)]
        self.clock = clock
        self.right = right
        self.ran: list[tuple[Place, float]] = []

    def places(self) -> list[Place]:
        return self.all

    def seconds(self, place: Place) -> float:
        return place.length

    def rows(self, left: Sequence[Place], ranks: Ranks, *, progress: bool) -> Generator[dict[str, Any], None, None]:
        for place in sorted(left)[ranks.rank :: ranks.world_size]:
            began = self.clock.now
            self.clock.now += self.seconds(place)
            self.ran.append((place, began))
            yield {**place._asdict(), "correct": self.right(place)}


class PlannedLengthJob(LengthJob):
    """The same, knowing what it costs; `known` when also in seconds."""

    known = True
    factor = 1.0

    def start_plan(self) -> bool:
        return self.known

    def costs(self, places: Sequence[Place]) -> dict[Place, float]:
        return {place: float(place.length) for place in sorted(places)}

    def seconds(self, place: Place) -> float:
        return place.length * self.factor


def _spend(job: LengthJob, minutes: float, finished: Sequence[dict[str, Any]] = ()) -> Spender:
    done = {Place.of(row) for row in finished}
    left = [place for place in job.places() if place not in done]
    spender = Spender(job, left, finished, Ranks(), Budget(minutes, clock=job.clock))  # type: ignore[arg-type]
    list(spender.rows(progress=False))
    return spender


def _width(rights: list[float]) -> float:
    low, high = wilson_interval(sum(rights), len(rights))
    return high - low


def test_the_jobs_are_what_they_say() -> None:
    clock = Clock()
    assert isinstance(PlannedLengthJob([(1, 0.0)], 1, clock, lambda _: 1), PlannedJob)
    assert not isinstance(LengthJob([(1, 0.0)], 1, clock, lambda _: 1), PlannedJob)
    assert isinstance(
        RetrievalJob(model("llama"), PasskeyTask(tokenizer("byte_level"), grid=Grid([150])), seed=0), PlannedJob
    )


@pytest.mark.parametrize("kind", [LengthJob, PlannedLengthJob])
def test_every_cell_first_then_the_widest(kind: type[LengthJob]) -> None:
    """One cell is a coin, the others are sure: the coin gets the further trials."""
    cells = [(10, 0.0), (10, 1.0), (20, 0.0)]

    def right(place: Place) -> float:
        return place.trial % 2 if (place.length, place.depth) == (10, 1.0) else 1.0

    job = kind(cells, 50, Clock(), right)
    _spend(job, 900 / 60)
    ran = [place for place, _ in job.ran]
    assert {(p.length, p.depth) for p in ran[:3]} == set(cells)
    assert [p.length for p in ran[:3]] == [10, 10, 20]
    counts = {cell: sum((p.length, p.depth) == cell for p in ran) for cell in cells}
    assert counts[10, 1.0] > 1.5 * counts[10, 0.0] >= 1.5 * counts[20, 0.0] - 1.5
    assert 850 <= job.clock.now <= 900
    widths = {cell: _width([right(p) for p in ran if (p.length, p.depth) == cell]) for cell in cells}
    assert max(widths.values()) - min(widths.values()) < 0.15


@pytest.mark.parametrize("kind", [LengthJob, PlannedLengthJob])
def test_each_batch_goes_to_a_widest_interval(kind: type[LengthJob]) -> None:
    cells = [(7, 0.0), (7, 0.5), (7, 1.0), (7, 0.25)]
    places = kind(cells, 40, Clock(), lambda _: 0).all
    outcome = {place: float((5 * place.trial + int(8 * (place.depth or 0))) % 3 == 0) for place in places}
    job = kind(cells, 40, Clock(), outcome.__getitem__)
    batches: list[list[Place]] = []
    run = job.rows

    def remember(left: Sequence[Place], ranks: Ranks, *, progress: bool) -> Any:
        batches.append(list(left))
        return run(left, ranks, progress=progress)

    job.rows = remember  # type: ignore[method-assign]
    _spend(job, 60 * 7 / 60)
    seen: dict[float, list[float]] = {depth: [] for _, depth in cells}
    for batch in batches:
        widest = max(map(_width, seen.values()))
        for depth in {place.depth for place in batch}:
            assert depth is not None
            assert _width(seen[depth]) == pytest.approx(widest)
        for place in batch:
            assert place.depth is not None
            seen[place.depth].append(outcome[place])
    assert sum(map(len, seen.values())) == 60


def test_what_does_not_fit_is_left_out_and_cheaper_cells_go_on() -> None:
    job = PlannedLengthJob([(10, 0.0), (500, 0.0)], 20, Clock(), lambda _: 1.0)
    spender = _spend(job, 100 / 60)
    assert [p.length for p, _ in job.ran] == [10] * 10
    assert len(spender.waiting) == 30
    assert "not one trial yet at length 500 (1 cell)" in spender.leftover()
    assert "trials left: 30" in spender.leftover()


def test_without_a_pace_the_cheapest_trial_teaches_it() -> None:
    job = PlannedLengthJob([(10, 0.0), (500, 0.0)], 3, Clock(), lambda _: 1.0)
    job.known, job.factor = False, 2.0
    _spend(job, 300 / 60)
    assert [p.length for p, _ in job.ran] == [10] * 3
    job = PlannedLengthJob([(10, 0.0), (500, 0.0)], 3, Clock(), lambda _: 1.0)
    job.known, job.factor = False, 0.5
    _spend(job, 300 / 60)
    assert sorted(p.length for p, _ in job.ran) == [10] * 3 + [500]


def test_a_wrong_pace_is_corrected_on_the_way() -> None:
    """The plan says 100 trials fit, the model is ten times as slow: it stops in time."""
    job = PlannedLengthJob([(10, i / 100) for i in range(100)], 1, Clock(), lambda _: 1.0)
    job.factor = 10.0
    _spend(job, 1000 / 60)
    assert len(job.ran) == 10
    assert job.clock.now == 1000


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5, unique=True),
    trials=st.integers(1, 12),
    seconds=st.integers(1, 1500),
    noise=st.integers(0, 1000),
    planned=st.booleans(),
    finished=st.integers(0, 10),
)
def test_the_time_is_kept_and_nothing_runs_twice(
    lengths: list[int], trials: int, seconds: int, noise: int, planned: bool, finished: int
) -> None:
    def make() -> LengthJob:
        kind = PlannedLengthJob if planned else LengthJob
        job = kind([(n, 0.5) for n in lengths], trials, Clock(), lambda p: float((p.length * p.trial + noise) % 2))
        job.seconds = lambda place: place.length * (1 + (place.trial * noise) % 7 / 4)  # type: ignore[method-assign]
        return job

    job = make()
    done = [{**place._asdict(), "correct": 1} for place in job.all[:finished]]
    spender = _spend(job, seconds / 60, done)
    ran = [place for place, _ in job.ran]
    assert len(set(ran)) == len(ran)
    assert sorted([*ran, *spender.waiting, *(Place.of(row) for row in done)]) == sorted(job.all)
    assert all(began < seconds for _, began in job.ran)
    if job.ran:
        last, began = job.ran[-1]
        assert job.clock.now == began + job.seconds(last)
    else:
        assert not spender.waiting or planned
    again = make()
    _spend(again, seconds / 60, done)
    assert again.ran == job.ran
    plenty = make()
    assert not _spend(plenty, 1e6, done).waiting


@pytest.mark.parametrize("minutes", [0, -1, math.nan, math.inf, "5", True, None])
def test_a_budget_is_a_positive_number(minutes: Any) -> None:
    with pytest.raises(OptionError, match="number of minutes"):
        Budget(minutes)


class _Threads:
    """Processes that are threads: real barriers, shared lists."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size)
        self.slots: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.barrier.wait(timeout=20)
        found = list(self.slots)
        self.barrier.wait(timeout=20)
        return found


class _ThreadRanks(Ranks):
    threads: _Threads

    def gather(self, items: list[Any]) -> list[Any]:
        return [item for part in self.threads.exchange(self.rank, items) for item in part]

    def from_first(self, value: Any) -> Any:
        return self.threads.exchange(self.rank, value)[0]


@pytest.mark.parametrize("kind", [LengthJob, PlannedLengthJob])
def test_two_processes_share_the_batches(kind: type[LengthJob]) -> None:
    cells = [(10, depth / 10) for depth in range(6)]
    clock = Clock()

    def right(place: Place) -> float:
        return float(place.trial % 2)

    jobs = [kind(cells, 9, clock, right) for _ in range(2)]
    ranks = type("R", (_ThreadRanks,), {"threads": _Threads(2)})
    got: list[list[Any]] = [[], []]

    def work(rank: int) -> None:
        spender = Spender(jobs[rank], jobs[rank].all, [], ranks(rank, 2), Budget(300 / 60, clock=clock))
        got[rank] += spender.rows(progress=False)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    places = [Place.of(row) for rows in got for row in rows]
    assert len(set(places)) == len(places)
    assert got[0] and got[1]
    assert 25 <= len(places) <= 32  # the clock is one for both
    assert {place.depth for place in places} == {depth for _, depth in cells}


# On a real model


class TokenClock:
    """A second for each 100 tokens that go through the model."""

    def __init__(self, net: Any) -> None:
        self.tokens = 0
        net.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tokens += kwargs["input_ids"].shape[1]

    def __call__(self) -> float:
        return self.tokens / 100


GRID: dict[str, Any] = {"lengths": [150, 260, 400], "depths": [0, 0.5, 1], "trials": 6, "progress": False}


def _evaluate(net: Any, **options: Any) -> Any:
    return evaluate(net, tokenizer("byte_level"), "passkey", **{**GRID, **options})


def _rows(rows: list[dict[str, Any]]) -> dict[Place, dict[str, Any]]:
    return {Place.of(row): {**row, "elapsed_s": 0, "logprob": pytest.approx(row["logprob"], abs=1e-3)} for row in rows}


def test_a_real_job_keeps_the_time_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    net = model("llama")
    whole = _rows(_evaluate(net).trials)
    clock = TokenClock(net)
    monkeypatch.setattr("ropepatch.evaluation.runner.Budget", functools.partial(Budget, clock=clock))
    # The pace that is found in seconds of the wall clock has nothing to do with this one: it is corrected.
    first = _evaluate(net, output=tmp_path, budget=60 / 60)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == first.summary
    spent = summary["budget"]
    assert spent["minutes"] == 1
    assert spent["trials_run"] == len(first.trials) == summary["trials"]
    assert spent["trials_run"] + spent["trials_left"] == 54
    assert 9 <= spent["trials_run"] < 54
    assert {(row["length"], row["depth"]) for row in first.trials} == {
        (n, d) for n in (150, 260, 400) for d in (0, 0.5, 1)
    }
    assert clock() <= 60 + 9, "more than one trial too long"
    assert first.tokens_computed == first.trie_size < first.sum_of_prompts
    # The same command again, with another budget, then without one.
    second = _evaluate(net, output=tmp_path, budget=30 / 60)
    assert second.summary["budget"]["trials_run"] > 0
    assert len(second.trials) == len(first.trials) + second.summary["budget"]["trials_run"]
    third = _evaluate(net, output=tmp_path)
    assert "budget" not in third.summary
    assert {p: {**r, "elapsed_s": 0} for p, r in _rows(third.trials).items()} == whole
    rest = _evaluate(net, output=tmp_path, budget=1)
    assert rest.summary["budget"] == {"minutes": 1, "trials_run": 0, "trials_left": 0}


def test_enough_time_gives_what_no_budget_gives() -> None:
    net = model("llama")
    budgeted = _evaluate(net, trials=2, budget=10)
    plain = _evaluate(net, trials=2)
    assert _rows(budgeted.trials) == _rows(plain.trials)
    assert budgeted.summary["budget"] == {"minutes": 10, "trials_run": 18, "trials_left": 0}
    assert budgeted.summary["cells"] == [
        {**cell, "mean_logprob": pytest.approx(cell["mean_logprob"], abs=1e-3)} for cell in plain.summary["cells"]
    ]


@pytest.mark.parametrize("kind", ["mamba", "gpt2"])
def test_other_ways_through_a_model(kind: str) -> None:
    result = _evaluate(model(kind), lengths=[150], trials=2, budget=10)
    assert len(result.trials) == 6


def test_a_budget_for_nothing_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(OptionError, match="too short for a single trial"):
        _evaluate(model("llama"), output=tmp_path / "run", budget=1e-9)
    assert not (tmp_path / "run" / "summary.json").exists()
    with pytest.raises(OptionError, match="number of minutes"):
        _evaluate(model("llama"), output=tmp_path / "other", budget=0)
    assert not (tmp_path / "other").exists()


def test_what_is_left_out_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    net = model("llama")
    monkeypatch.setattr("ropepatch.evaluation.runner.Budget", functools.partial(Budget, clock=TokenClock(net)))
    _evaluate(net, budget=30 / 60, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "the budget of 0.5 minutes is used up; trials left:" in captured.err


PROGRAM = """
import sys
sys.path.insert(0, {here!r})
from small import model, tokenizer
from ropepatch.evaluation import evaluate
result = evaluate(model("llama"), tokenizer("byte_level"), output=sys.argv[1], budget=float(sys.argv[2]), **{grid!r})
import json, os
print("RESULT " + json.dumps([os.environ.get("RANK"), len(result.trials), result.summary["budget"]]), flush=True)
"""


@pytest.mark.slow
def test_two_real_processes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("matplotlib")
    here = Path(__file__).parent
    (tmp_path / "program.py").write_text(PROGRAM.format(here=str(here), grid=GRID))
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "RANK", "WORLD"))}
    environment = {**keep, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent.parent), "HF_HUB_OFFLINE": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]
    done = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "program.py"), str(tmp_path / "out"), "5"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line.removeprefix("RESULT ")) for line in done.stdout.splitlines() if "RESULT" in line]
    assert sorted(found) == [[r, 54, {"minutes": 5, "trials_run": 54, "trials_left": 0}] for r in ("0", "1")]
    assert not list((tmp_path / "out").glob("results.rank*"))
    assert len((tmp_path / "out" / "results.jsonl").read_text().splitlines()) == 54

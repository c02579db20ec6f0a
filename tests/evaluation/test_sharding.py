"""Two gloo processes give what one gives; a launcher that starts one of two is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small import model, tokenizer

from ropepatch.errors import UsageError
from ropepatch.evaluation import evaluate
from ropepatch.evaluation.sharding import Ranks, find_ranks

pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

GRID: dict[str, Any] = {"lengths": [150, 260], "depths": [0, 0.5, 1], "trials": 2, "progress": False}
HERE = Path(__file__).parent
PROGRAM = """
import sys
sys.path.insert(0, {here!r})
from small import model, tokenizer
from ropepatch.evaluation import evaluate
result = evaluate(model("llama"), tokenizer("byte_level"), output=sys.argv[1], **{grid!r})
import json, os
seen = [os.environ.get("RANK"), len(result.trials), result.summary["trials"], result.tokens_computed]
print("RESULT " + json.dumps(seen), flush=True)
"""


def _environment() -> dict[str, str]:
    root = HERE.parent.parent
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE", "RANK", "WORLD"))}
    return {**keep, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}


def _run(folder: Path, program: Path, launcher: list[str]) -> list[list[Any]]:
    done = subprocess.run(
        [sys.executable, *launcher, str(program), str(folder)],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Two processes write to one pipe: their lines may run together.
    return [json.loads(part) for part in re.findall(r"RESULT (\[[^]]*\])", done.stdout)]


def _rows(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    rows.sort(key=lambda row: (row["length"], row["depth"], row["trial"]))
    return [{**row, "elapsed_s": 0, "logprob": pytest.approx(row["logprob"], abs=1e-4)} for row in rows]


TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0", "--standalone"]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM.format(here=str(HERE), grid=GRID))
    return path


def test_two_processes_give_what_one_gives(tmp_path: Path, program: Path) -> None:
    one = evaluate(model("llama"), tokenizer("byte_level"), output=tmp_path / "one", **GRID)
    two = _run(tmp_path / "two", program, TORCHRUN)
    assert sorted(rank for rank, *_ in two) == ["0", "1"]
    for _, trials, summary, tokens in two:
        assert trials == summary == len(one.trials) == 12
        assert one.tokens_computed <= tokens < one.tokens_computed + 260  # the first prefix is computed by both
    assert _rows(tmp_path / "two") == _rows(tmp_path / "one")
    assert not list((tmp_path / "two").glob("results.rank*"))
    cells = [json.loads((tmp_path / name / "summary.json").read_text())["cells"] for name in ("one", "two")]
    assert [(c["length"], c["depth"], c["n"], c["accuracy"]) for c in cells[0]] == [
        (c["length"], c["depth"], c["n"], c["accuracy"]) for c in cells[1]
    ]
    # One process takes up what two left before they merged: nothing is left to do.
    lines = (tmp_path / "two" / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two" / "results.rank1.jsonl").write_text(lines.pop())
    (tmp_path / "two" / "results.jsonl").write_text("".join(lines))
    resumed = evaluate(model("llama"), tokenizer("byte_level"), output=tmp_path / "two", **GRID)
    assert (len(resumed.trials), resumed.tokens_computed) == (12, 0)


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path, program: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    assert len(_run(tmp_path / "two", program, launcher)) == 2


@pytest.mark.slow
def test_accelerate_that_starts_one_of_two(tmp_path: Path, program: Path) -> None:
    """The real launcher: `accelerate launch --cpu --num_processes 2` starts a single process and says nothing."""
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, str(program), str(tmp_path / "out")],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode != 0
    assert "asked for several processes but started one" in done.stderr
    assert not (tmp_path / "out").exists()


def test_one_process_is_the_identity() -> None:
    ranks = find_ranks({})
    assert ranks == Ranks(0, 1)
    assert ranks.gather([1, 2]) == [1, 2]
    assert ranks.from_first("x") == "x"
    ranks.wait()


def test_environments() -> None:
    launched = {"ACCELERATE_MIXED_PRECISION": "no"}
    assert find_ranks(launched) == Ranks()
    with pytest.raises(UsageError, match="torchrun"):
        find_ranks({**launched, "MASTER_PORT": "29500"})
    assert find_ranks({**launched, "MASTER_PORT": "29500", "WORLD_SIZE": "1", "RANK": "0"}) == Ranks()

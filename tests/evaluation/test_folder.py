"""The output folder: nothing finished is ever lost, nothing foreign is ever touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ropepatch
from ropepatch.errors import OutputConflictError, OutputError, RecordError, UsageError
from ropepatch.evaluation.folder import RunFolder, read_rows
from ropepatch.evaluation.task import Place

CONFIGURATION: dict[str, Any] = {
    "task": "passkey",
    "model": "tiny",
    "seed": 7,
    "trained_length": 64,
    "lengths": (32, 128),
    "patch": {"method": "yarn", "options": {"factor": 2.0}, "versions": {"torch": "1.0"}},
}


def row(length: int = 32, depth: float = 0.5, trial: int = 0, correct: float = 1.0, **extra: Any) -> dict[str, Any]:
    task = {"task": "passkey", "seed": 7, "answer": "12345", "output": "12345", "elapsed_s": 0.1}
    return {**task, "length": length, "depth": depth, "trial": trial, "correct": correct, **extra}


def grid() -> list[dict[str, Any]]:
    return [row(length, depth, trial) for length in (32, 128) for depth in (0.0, 1.0) for trial in (0, 1)]


def test_a_run_leaves_exactly_the_promised_files(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "a" / "run", CONFIGURATION) as folder:
        for entry in grid():
            folder.append(entry)
        summary = folder.finalize({"tokens_computed": 99})
    visible = {path.name for path in (tmp_path / "a" / "run").iterdir() if not path.name.startswith(".")}
    assert visible == {"run.json", "results.jsonl", "summary.json", "heatmap.png", "report.html"}
    assert json.loads((folder.path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["tokens_computed"] == 99
    assert (folder.path / "heatmap.png").read_bytes().startswith(b"\x89PNG")
    assert [json.loads(line) for line in (folder.path / "results.jsonl").read_text().splitlines()] == grid()


def test_run_json_holds_configuration_versions_and_origin(tmp_path: Path) -> None:
    import torch
    import transformers

    RunFolder.open(tmp_path, CONFIGURATION).close()
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["configuration"] == json.loads(json.dumps(CONFIGURATION))
    assert (run["seed"], run["model"], run["patch"]) == (7, "tiny", CONFIGURATION["patch"])
    python = ".".join(map(str, sys.version_info[:3]))
    expected = {
        "ropepatch": ropepatch.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    assert {name: run["versions"][name].split("+")[0] for name in expected} == {
        name: version.split("+")[0] for name, version in expected.items()
    }
    assert run["versions"]["python"].startswith(python)
    assert run["created"].endswith("+00:00")


def test_resuming_finds_what_is_finished_and_keeps_run_json(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIGURATION) as folder:
        folder.append(row(trial=0))
    before = (tmp_path / "run.json").read_bytes()
    with RunFolder.open(tmp_path, CONFIGURATION) as folder:
        assert folder.finished == {Place("passkey", 32, 0.5, 0): row(trial=0)}
        folder.append(row(trial=1))
        with pytest.raises(RecordError, match="finished already"):
            folder.append(row(trial=1))
    assert (tmp_path / "run.json").read_bytes() == before
    assert [entry["trial"] for entry in read_rows(tmp_path)] == [0, 1]


@settings(max_examples=25)
@given(cut=st.integers(min_value=0, max_value=4000))
def test_a_torn_last_line_is_dropped_and_redone(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("torn")
    with RunFolder.open(path, CONFIGURATION) as folder:
        for entry in grid():
            folder.append(entry)
    whole = (path / "results.jsonl").read_bytes()
    cut %= len(whole) + 1
    os.truncate(path / "results.jsonl", cut)
    with RunFolder.open(path, CONFIGURATION) as folder:
        assert len(folder.finished) == whole[:cut].count(b"\n")
        for entry in grid():
            if Place.of(entry) not in folder.finished:
                folder.append(entry)
    assert (path / "results.jsonl").read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"length": 32, "depth"\n', "line 2"),
        (b"[1, 2]\n", "not a JSON object"),
        (b'{"task": "passkey", "length": 32, "depth": 0.5}\n', "does not say trial"),
        (b'{"task": "passkey", "length": 32, "depth": 0.5, "trial": 1, "correct": NaN}\n', "NaN"),
        (b"\xff\xfe\n", "line 2"),
        (b"\n", "line 2"),
        (json.dumps(row()).encode() + b"\n", "repeats a trial"),
    ],
)
def test_any_other_corrupt_line_is_refused_and_left_alone(tmp_path: Path, line: bytes, reason: str) -> None:
    with RunFolder.open(tmp_path, CONFIGURATION) as folder:
        folder.append(row())
    results = tmp_path / "results.jsonl"
    content = results.read_bytes() + line + json.dumps(row(trial=5)).encode() + b"\n"
    results.write_bytes(content)
    with pytest.raises(RecordError, match=reason) as caught:
        RunFolder.open(tmp_path, CONFIGURATION)
    assert "results.jsonl, line 2" in str(caught.value)
    assert results.read_bytes() == content


def test_another_configuration_is_refused_naming_every_difference(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, CONFIGURATION).close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = {**CONFIGURATION, "seed": 8, "patch": {"method": "yarn", "options": {"factor": 4.0}}, "digits": 5}
    with pytest.raises(OutputConflictError) as caught:
        RunFolder.open(tmp_path, other)
    message = str(caught.value)
    for part in (
        "seed is 7 there and 8 here",
        "patch.options.factor is 2.0 there and 4.0 here",
        "digits is null there",
    ):
        assert part in message
    assert "lengths" not in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_versions_in_the_patch_record_do_not_make_another_configuration(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, CONFIGURATION).close()
    newer = {**CONFIGURATION, "patch": {**CONFIGURATION["patch"], "versions": {"torch": "2.0"}}}
    RunFolder.open(tmp_path, newer).close()


def test_a_text_elsewhere_is_the_same_text(tmp_path: Path) -> None:
    def of(*texts: tuple[str, str]) -> dict[str, Any]:
        return {**CONFIGURATION, "text": [{"path": path, "sha256": digest} for path, digest in texts]}

    RunFolder.open(tmp_path, of(("/here/a.txt", "aa"), ("/here/b.txt", "bb"))).close()
    RunFolder.open(tmp_path, of(("/there/a.txt", "aa"), ("b.txt", "bb"))).close()
    with pytest.raises(OutputConflictError, match=r'text\.1\.sha256 is "bb" there and "cc" here'):
        RunFolder.open(tmp_path, of(("/here/a.txt", "aa"), ("/here/b.txt", "cc")))
    with pytest.raises(OutputConflictError, match="text is"):
        RunFolder.open(tmp_path, of(("/here/a.txt", "aa")))


def test_a_folder_with_foreign_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("mine")
    with pytest.raises(OutputConflictError, match=r"summary\.json but no run\.json"):
        RunFolder.open(tmp_path, CONFIGURATION)
    assert (tmp_path / "summary.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_corrupt_run_json_is_named(tmp_path: Path) -> None:
    for content in ("{", "[]", "{}"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(RecordError, match=r"run\.json"):
            RunFolder.open(tmp_path, CONFIGURATION)
        assert (tmp_path / "run.json").read_text() == content


def test_an_unwritable_folder_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match="annot write to"):
            RunFolder.open(path, CONFIGURATION)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="annot write to"):
        RunFolder.open(tmp_path, CONFIGURATION)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_keeps_what_was_appended(tmp_path: Path) -> None:
    import io

    with RunFolder.open(tmp_path, CONFIGURATION) as folder:
        folder.append(row(trial=0))
        folder._file = io.FileIO("/dev/full", "a")
        with pytest.raises(OutputError, match="No space left"):
            folder.append(row(trial=1))
        with pytest.raises(OutputError, match="closed"):
            folder.append(row(trial=2))
    with RunFolder.open(tmp_path, CONFIGURATION) as folder:
        assert list(folder.finished) == [Place("passkey", 32, 0.5, 0)]


def test_what_json_cannot_say_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIGURATION) as folder:
        for value in (float("nan"), float("-inf"), object()):
            with pytest.raises(RecordError, match="annot be written as JSON"):
                folder.append(row(logprob=value))
        with pytest.raises(RecordError, match="does not say task, depth"):
            folder.append({"length": 1, "trial": 0})
        assert folder.finished == {}
    assert (tmp_path / "results.jsonl").read_bytes() == b""


def test_finalizing_nothing_is_refused(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIGURATION) as folder, pytest.raises(RecordError, match="no finished trial"):
        folder.finalize()


def test_a_second_opener_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIGURATION) as folder:
        folder.append(row())
        with pytest.raises(OutputError, match="nother process is writing"):
            RunFolder.open(tmp_path, CONFIGURATION)
    RunFolder.open(tmp_path, CONFIGURATION).close()


def test_a_killed_process_loses_nothing_and_leaves_no_lock(tmp_path: Path) -> None:
    """A process that appends without end is killed hard; every line it reported as appended is there."""
    program = textwrap.dedent(
        f"""
        from ropepatch.evaluation.folder import RunFolder
        folder = RunFolder.open({str(tmp_path)!r}, {CONFIGURATION!r})
        for trial in range(10**6):
            row = {{"task": "passkey", "length": 32, "depth": 0.5, "trial": trial, "correct": 1.0}}
            folder.append({{**row, "output": "x" * 5000}})
            print(trial, flush=True)
        """
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=Path.cwd())
    assert child.stdout is not None
    for reported in child.stdout:
        if int(reported) >= 20:
            break
    with pytest.raises(OutputError, match="nother process is writing"):
        RunFolder.open(tmp_path, CONFIGURATION)
    child.send_signal(signal.SIGKILL)
    reported_last = max([20, *map(int, child.stdout.read().splitlines()[:-1])])
    child.stdout.close()
    child.wait()
    with RunFolder.open(tmp_path, CONFIGURATION) as folder:
        trials = sorted(trial for _, _, _, trial in folder.finished)
        assert trials == list(range(len(trials)))
        assert len(trials) >= reported_last + 1
        folder.append(row(trial=len(trials)))


def test_ranks_write_apart_and_rank_0_merges(tmp_path: Path) -> None:
    ranks = [RunFolder.open(tmp_path, CONFIGURATION, rank=rank, world_size=3) for rank in (1, 0, 2)]
    for number, entry in enumerate(grid()):
        ranks[number % 3].append(entry)
    assert {"results.rank1.jsonl", "results.rank2.jsonl"} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="nly rank 0"):
        ranks[0].finalize()
    summary = ranks[1].finalize()
    for folder in ranks:
        folder.close()
    assert summary["trials"] == len(grid())
    assert not list(tmp_path.glob("results.rank*"))
    assert [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()] == grid()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_interrupted_distributed_run_resumes_with_any_number_of_ranks(tmp_path: Path, world_size: int) -> None:
    ranks = [RunFolder.open(tmp_path, CONFIGURATION, rank=rank, world_size=3) for rank in range(3)]
    for number, entry in enumerate(grid()[:6]):
        ranks[number % 3].append(entry)
    for folder in ranks:
        folder.close()
    with (tmp_path / "results.rank2.jsonl").open("a") as file:
        file.write('{"length": 32, "dep')
    ranks = [RunFolder.open(tmp_path, CONFIGURATION, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert all(len(folder.finished) == 6 for folder in ranks)
    for number, entry in enumerate(grid()[6:]):
        ranks[number % world_size].append(entry)
    assert ranks[0].finalize()["trials"] == len(grid())
    for folder in ranks:
        folder.close()
    assert read_rows(tmp_path) == grid()


def test_a_crash_between_merge_and_clean_up_makes_no_duplicate(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIGURATION) as folder:
        for entry in grid():
            folder.append(entry)
    (tmp_path / "results.rank1.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in grid()[:3]))
    assert read_rows(tmp_path) == grid()
    with RunFolder.open(tmp_path, CONFIGURATION) as folder:
        assert folder.finalize()["trials"] == len(grid())
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(grid())


def test_a_living_rank_of_another_launch_is_not_merged_away(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, CONFIGURATION, rank=1, world_size=2) as alive:
        alive.append(row())
        with pytest.raises(OutputError, match="nother process is writing"):
            RunFolder.open(tmp_path, CONFIGURATION)
        alive.append(row(trial=1))
    assert len(read_rows(tmp_path)) == 2

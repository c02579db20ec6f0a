"""Checkpoints that are whole or not there, and how damaged ones are told."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from ropepatch.errors import OutputError
from ropepatch.training.checkpoints import MANIFEST, Checkpoints, damage


def write(checkpoints: Checkpoints, step: int, content: bytes = b"weights") -> Path:
    with checkpoints.writing(step) as folder:
        (folder / "trained.safetensors").write_bytes(content * step)
        (folder / "deep").mkdir()
        (folder / "deep" / "rng_state.pth").write_bytes(b"state")
    return checkpoints.path(step)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def test_the_last_are_kept_and_the_newest_is_found(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() == (None, [])
    for step in (2, 9, 10, 11):
        write(checkpoints, step)
    assert checkpoints.steps() == [10, 11]
    assert checkpoints.newest() == (checkpoints.path(11), [])
    assert checkpoints.step_of(checkpoints.path(11)) == 11


@pytest.mark.parametrize("harm", ["short", "flipped", "gone", "unlisted", "nonsense", "no manifest"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(checkpoints: Checkpoints, harm: str) -> None:
    write(checkpoints, 3)
    path = write(checkpoints, 4)
    file, manifest = path / "trained.safetensors", path / MANIFEST
    data = file.read_bytes()
    {
        "short": lambda: file.write_bytes(data[:-1]),
        "flipped": lambda: file.write_bytes(bytes([data[0] ^ 1]) + data[1:]),
        "gone": (path / "deep" / "rng_state.pth").unlink,
        "unlisted": lambda: manifest.write_text(json.dumps({"files": {"x": 1}})),
        "nonsense": lambda: manifest.write_text("[1"),
        "no manifest": manifest.unlink,
    }[harm]()
    found, problems = checkpoints.newest()
    assert found == checkpoints.path(3)
    assert len(problems) == 1
    assert str(path) in problems[0] and "passed over" in problems[0]
    assert damage(path) and not damage(checkpoints.path(3))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0"),
    ],
    ids=["system", "torch"],
)
def test_a_full_disk_leaves_what_was_there(checkpoints: Checkpoints, error: Exception) -> None:
    write(checkpoints, 1)
    wanted = pytest.raises(OutputError, match=r"(?i)checkpoint of step 2.*earlier checkpoints are intact")
    with wanted, checkpoints.writing(2) as folder:
        (folder / "half").write_bytes(b"half")
        raise error
    assert os.listdir(checkpoints.folder) == ["step-1"]
    assert checkpoints.newest() == (checkpoints.path(1), [])


def test_other_errors_are_not_called_a_full_disk(checkpoints: Checkpoints) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), checkpoints.writing(2):
        raise RuntimeError("out of memory")
    assert os.listdir(checkpoints.folder) == []


def test_a_really_full_file_system() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    from ropepatch.training.checkpoints import _is_refusal

    with pytest.raises((OSError, RuntimeError)) as caught:
        torch.save({"x": torch.zeros(100_000)}, "/dev/full")
    assert _is_refusal(caught.value)


def test_nothing_is_removed_before_the_new_one_is_whole(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(checkpoints, 1)
    write(checkpoints, 2)
    seen: list[list[int]] = []
    rename = os.rename

    def watched(source: Any, target: Any) -> None:
        seen.append(checkpoints.steps())
        assert damage(Path(source)) is None
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    write(checkpoints, 3)
    assert seen == [[1, 2]]
    assert checkpoints.steps() == [2, 3]


def test_what_a_crash_left_half_written_does_not_count(checkpoints: Checkpoints) -> None:
    write(checkpoints, 1)
    half = checkpoints.folder / "step-2.part"
    half.mkdir()
    (half / "trained.safetensors").write_bytes(b"x")
    assert checkpoints.newest() == (checkpoints.path(1), [])
    write(checkpoints, 2)
    assert not half.exists() and checkpoints.steps() == [1, 2]

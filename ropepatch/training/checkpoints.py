"""Checkpoints that are there whole or not at all, and are known to be.

A checkpoint is written into a folder beside its place. When all its files are on the disk, a manifest with their sizes
and SHA-256 sums is written last, and the folder is renamed. Older ones are removed only then. Whoever goes on takes the
newest one that its manifest confirms.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ropepatch.errors import OutputError, RecordError, first_line
from ropepatch.files import read_object, to_json
from ropepatch.training.launch import Launch

MANIFEST = "manifest.json"
_NAME, _PART = "step-", ".part"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: that holds them, as `step-N`; made when the first is written.
        keep: how many of the last stay.
        launch: all processes of the run write into one checkpoint, the first of them finishes it.
    """

    def __init__(self, folder: Path, keep: int, launch: Launch | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self.launch = launch or Launch()

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """An empty folder for the files of a checkpoint, which is complete when the block ends well.

        Raises:
            OutputError: the disk refuses. Earlier checkpoints are as they were.
        """
        part = self.folder / f"{_NAME}{step}{_PART}"
        first = self.launch.is_first
        try:
            if first:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
            self.launch.ranks.wait()
            yield part
            self.launch.ranks.wait()
            if first:
                self._finish(part, self.path(step))
            self.launch.ranks.wait()
        except BaseException as error:
            if first:
                shutil.rmtree(part, ignore_errors=True)
            if isinstance(error, Exception) and _is_refusal(error):
                reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
                raise OutputError(
                    f"cannot write the checkpoint of step {step} to {self.folder}: {reason}",
                    hint="earlier checkpoints are intact: make room and repeat the command",
                ) from error
            raise

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole, or None; and what is wrong with newer ones, a sentence each."""
        problems: list[str] = []
        for step in sorted(self.steps(), reverse=True):
            problem = damage(self.path(step))
            if problem is None:
                return self.path(step), problems
            problems.append(f"the checkpoint {self.path(step)} is damaged and is passed over: {problem}")
        return None, problems

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, whole or not; unfinished ones do not count."""
        if not self.folder.is_dir():
            return []
        names = (path.name.removeprefix(_NAME) for path in self.folder.glob(f"{_NAME}*") if path.is_dir())
        return sorted(int(name) for name in names if name.isdecimal())

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"{_NAME}{step}"

    def step_of(self, path: Path) -> int:
        """The step of a checkpoint."""
        return int(path.name.removeprefix(_NAME))

    def _finish(self, part: Path, place: Path) -> None:
        files = sorted(file for file in part.rglob("*") if file.is_file())
        entries = {file.relative_to(part).as_posix(): _entry(file) for file in files}
        manifest = part / MANIFEST
        manifest.write_text(to_json({"files": entries}, indent=2) + "\n", encoding="utf-8")
        for file in (*files, manifest, *(folder for folder in part.rglob("*") if folder.is_dir()), part):
            _to_disk(file)
        # A damaged one of the same step, from before a crash.
        shutil.rmtree(place, ignore_errors=True)
        os.rename(part, place)
        _to_disk(self.folder)
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(step))
        for old in self.folder.glob(f"{_NAME}*{_PART}"):
            shutil.rmtree(old, ignore_errors=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None where its manifest confirms every file."""
    try:
        entries = read_object(path / MANIFEST)["files"]
        for name, entry in entries.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['size']}"
            if _sha256(file) != entry["sha256"]:
                return f"{name} has another content than was written"
    except RecordError as error:
        return error.message
    except (KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not a manifest"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _is_refusal(error: Exception) -> bool:
    """Whether a disk refused: torch and safetensors report that in errors of their own."""
    if isinstance(error, OSError):
        return True
    # The file of torch's archive writer is named in all that it complains of.
    archive = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return archive or type(error).__module__.startswith("safetensors")


def _entry(file: Path) -> dict[str, int | str]:
    return {"size": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""The output folder of one training run: whose it is, what is done, and that nobody else writes to it.

It holds `recipe.yaml` (all settings), `run.json` (the recipe as data, versions, launch, patch, what is done),
`log.jsonl`, `loss.png`, `checkpoints/`, then `adapter/` (or `model/`), `merged/`, `eval/`, `report.md`, `report.html`.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import filelock

from ropepatch import compat
from ropepatch.errors import OutputConflictError, OutputError, RecordError
from ropepatch.files import read_object, to_json, write_atomic, write_json
from ropepatch.training.log import LOG
from ropepatch.training.reading import dump
from ropepatch.training.recipe import Recipe

RUN, RECIPE, LOSS, CHECKPOINTS, EVAL = "run.json", "recipe.yaml", "loss.png", "checkpoints", "eval"
ADAPTER, MODEL, MERGED, REPORT = "adapter", "model", "merged", "report.md"
SCHEMA_VERSION = 1

# Settings that change how a run is carried out, and its result by rounding at most.
_FREE = {
    "description",
    "data.cache",
    "train.keep",
    "train.micro_batch_size",
    "train.processes",
    "train.report_to",
}


class TrainingFolder:
    """An open run folder. Make one with `TrainingFolder.open`, in one process of the run; use it in a `with` block.

    Attributes:
        path: the folder.
        resumed: whether it held a run of this recipe.
    """

    def __init__(self, path: Path, lock: filelock.BaseFileLock, *, resumed: bool) -> None:
        self.path = path
        self.resumed = resumed
        self._lock = lock

    @classmethod
    def open(cls, path: Path, recipe: Recipe, launch: dict[str, Any], *, resume: bool = True) -> TrainingFolder:
        """Create the folder, or go on with the run in it.

        Args:
            path: the folder; made if missing, with its parents.
            recipe: what is run.
            launch: the processes, as plain data.
            resume: False refuses a folder that holds a run.

        Raises:
            OutputConflictError: it belongs to a run of another recipe (names what differs), or holds other files.
            OutputError: it cannot be written, or another process has it open.
            RecordError: `run.json` is corrupt.
        """
        settings = json.loads(to_json(recipe.model_dump(mode="json")))
        run = path / RUN
        try:
            _refuse_foreign(path)
            path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(path / ".lock", thread_local=False)  # dies with its process
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise OutputError(
                f"another process is training in {path}", hint="wait for it, or choose another output folder"
            ) from error
        except OSError as error:
            raise OutputError(f"cannot write to {path}: {error.strerror or error}") from error
        try:
            there = run.exists()
            if there and not resume:
                raise OutputConflictError(f"the folder {path} holds a run already", hint="choose another folder")
            if there:
                _check_same(path, read_object(run).get("recipe"), settings)
                folder = cls(path, lock, resumed=True)
                folder.update(recipe=settings, launch=launch)
            else:
                folder = cls(path, lock, resumed=False)
                write_json(run, _new_record(settings, launch))
            write_atomic(path / RECIPE, dump(recipe))
        except BaseException:
            lock.release()
            raise
        return folder

    @property
    def record(self) -> dict[str, Any]:
        """The content of `run.json`."""
        return read_object(self.path / RUN)

    def update(self, **entries: Any) -> None:
        """Put entries into `run.json`.

        Raises:
            OutputError: it cannot be written.
        """
        write_json(self.path / RUN, {**self.record, **entries})

    def __enter__(self) -> TrainingFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _new_record(settings: dict[str, Any], launch: dict[str, Any]) -> dict[str, Any]:
    more = {name: importlib.metadata.version(name) for name in ("accelerate", "peft") if _installed(name)}
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {**compat.versions(), **more, "python": platform.python_version()},
        "launch": launch,
        "recipe": settings,
        "patch": None,
        "trained": None,
        "merged": False,
        "finished": False,
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _refuse_foreign(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise OutputError(f"cannot write to {path}: it is a file")
    names = (RECIPE, LOG, CHECKPOINTS, ADAPTER, MODEL, MERGED, EVAL)
    found = [name for name in names if (path / name).exists()]
    # recipe.yaml alone is a run that ended while it was made: run.json is written first.
    if found and not (path / RUN).exists():
        raise OutputConflictError(
            f"the folder {path} holds {', '.join(found)} but no {RUN}", hint="choose another output folder"
        )


def _check_same(path: Path, found: Any, asked: dict[str, Any]) -> None:
    if not isinstance(found, dict):
        raise RecordError(f"the file {path / RUN} has no recipe")
    before, now = flat(found), flat(asked)
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    differing = [name for name in names if name not in _FREE and not name.startswith("train.report_to.")]
    if differing:
        words = "; ".join(f"{name} is {_brief(before, name)} there and {_brief(now, name)} here" for name in differing)
        raise OutputConflictError(
            f"the folder {path} belongs to a run of another recipe: {words}",
            hint="choose another output folder, or repeat the command that made this one",
        )


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names; lists by number."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if not items:
        return {prefix.removesuffix("."): values}
    return {name: value for key, part in items for name, value in flat(part, f"{prefix}{key}.").items()}


def _brief(values: dict[str, Any], name: str, limit: int = 80) -> str:
    text = json.dumps(values[name], ensure_ascii=False) if name in values else "absent"
    return text if len(text) <= limit else text[:limit] + "..."

"""The output folder of one evaluation: created, resumed, appended to, finished.

A folder holds `run.json` (what was asked), `results.jsonl` (one line a trial), and, once finalized, `summary.json`,
`heatmap.png` and `report.html`. Other processes of a distributed run write `results.rank1.jsonl` and so on, which
rank 0 merges. A trial that was appended survives any later crash; a line that a crash cut short is dropped.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import io
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import filelock

import ropepatch
from ropepatch.errors import OutputConflictError, OutputError, RecordError, UsageError
from ropepatch.evaluation.suite import SUITES, Suite
from ropepatch.evaluation.summary import run_title
from ropepatch.evaluation.task import Place
from ropepatch.files import parse_line, read_object, to_json, write_atomic, write_json

RUN, RESULTS, SUMMARY, HEATMAP, REPORT = "run.json", "results.jsonl", "summary.json", "heatmap.png", "report.html"
SCHEMA_VERSION = 1
KEY_FIELDS = Place._fields

Row = dict[str, Any]


class RunFolder:
    """An open output folder. Make one with `RunFolder.open`, use it in a `with` block.

    Attributes:
        path: the folder.
        configuration: what was asked, as plain JSON data.
    """

    def __init__(self, path: Path, configuration: dict[str, Any], rank: int, world_size: int) -> None:
        self.path = path
        self.configuration = configuration
        self._finished: dict[Place, Row] = {}
        self._rank = rank
        self._world_size = world_size
        self._lock = filelock.FileLock(path / _lock_name(rank), thread_local=False)  # dies with its process
        self._file: io.FileIO | None = None

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], configuration: dict[str, Any], *, rank: int = 0, world_size: int = 1
    ) -> RunFolder:
        """Create the folder, or resume the run in it.

        In a distributed run every rank opens the folder with the same configuration, and none may append before all
        have opened it: the caller puts a barrier between.

        Args:
            path: the folder; made if missing, with its parents.
            configuration: plain data that fixes the results: suite, model, patch, lengths, seed, ...
            rank: this process's number, 0 to `world_size` - 1.
            world_size: number of processes that share the folder.

        Raises:
            OutputConflictError: the folder belongs to another configuration, or holds files of the same names.
            OutputError: the folder cannot be written, or another process has it open.
            RecordError: a file in it is corrupt.
            DependencyError: matplotlib, which draws the heatmap, is missing (said now, not after hours of work).
        """
        from ropepatch.plotting import require_matplotlib

        require_matplotlib()
        configuration = json.loads(to_json(configuration))
        folder = cls(Path(path), configuration, rank, world_size)
        try:
            folder._refuse_foreign_files()
            folder.path.mkdir(parents=True, exist_ok=True)
            folder._acquire(folder._lock)
            folder._claim()
            folder._load()
        except OSError as error:
            folder.close()
            raise OutputError(f"cannot write to {folder.path}: {error.strerror or error}") from error
        except BaseException:
            folder.close()
            raise
        return folder

    @property
    def finished(self) -> dict[Place, Row]:
        """The trials that are done by now; a copy."""
        return dict(self._finished)

    def append(self, row: Row) -> None:
        """Write one finished trial and make sure that it is on disk.

        Args:
            row: plain data with `task`, `length`, `depth` (a number or None) and `trial`.

        Raises:
            RecordError: the row is not strict JSON, lacks its key, or is finished already.
            OutputError: the disk refused; the folder is closed, what was appended before is kept.
        """
        if self._file is None:
            raise OutputError(f"the folder {self.path} is closed")
        key = _key(row, "the new row")
        if key in self._finished:
            raise RecordError("this trial is finished already", given=key._asdict())
        line = to_json(row).encode("utf-8") + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError("the disk took only a part of the line")
            os.fsync(self._file.fileno())
        except OSError as error:
            # The line may be there in part. The next `open` drops it, as long as nothing is written behind it.
            self.close()
            raise OutputError(f"cannot write to {self._own_file}: {error.strerror or error}") from error
        self._finished[key] = row

    def finalize(self, extra_summary: dict[str, Any] | None = None) -> dict[str, Any]:
        """Merge what all ranks measured, and write `summary.json`, the suite's figures and `report.html`.

        Rank 0 calls this, after the others have appended their last trial.

        Args:
            extra_summary: further entries of the summary.

        Returns:
            The summary.

        Raises:
            RecordError: no trial is finished, or a rank's file is corrupt.
            OutputError: the folder cannot be written.
        """
        from ropepatch.evaluation.report import report
        from ropepatch.plotting import figure_bytes

        if self._rank != 0:
            raise UsageError("only rank 0 finalizes a run", given=self._rank)
        self._merge(range(1, _highest_rank(self.path) + 1))
        if not self._finished:
            raise RecordError(f"the folder {self.path} holds no finished trial to summarise")
        rows = _ordered(self._finished)
        suite = suite_of(self.configuration)
        results = suite.summarise(rows, self.configuration)
        summary = {"schema_version": SCHEMA_VERSION, **results, **(extra_summary or {})}
        write_json(self.path / SUMMARY, summary)
        images = {name: figure_bytes(figure) for name, figure in suite.figures(summary).items()}
        for name, image in images.items():
            write_atomic(self.path / name, image)
        sections = suite.sections(summary, rows, images)
        write_atomic(self.path / REPORT, report(read_object(self.path / RUN), summary, sections))
        return summary

    def close(self) -> None:
        """Close the file and let the folder go. Closing twice is fine."""
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        finally:
            self._lock.release()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _own_file(self) -> Path:
        return self.path / _results_name(self._rank)

    def _acquire(self, lock: filelock.BaseFileLock) -> None:
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise OutputError(
                f"another process is writing to {self.path}", hint="wait for it, or choose another output folder"
            ) from error

    def _refuse_foreign_files(self) -> None:
        # In this order: another rank that is just creating the folder writes run.json first.
        names = [name for name in (RESULTS, SUMMARY, HEATMAP, REPORT) if (self.path / name).exists()]
        if names and not (self.path / RUN).exists():
            raise OutputConflictError(
                f"the folder {self.path} holds {', '.join(names)} but no {RUN}", hint="choose another output folder"
            )

    def _claim(self) -> None:
        """Write run.json, or check that the one that is there asks for the same."""
        run = self.path / RUN
        # Held by one rank at a time, so that all agree on who was first.
        with filelock.FileLock(self.path / ".create.lock"):
            if not run.exists():
                write_json(run, _run_record(self.configuration))
                return
        found = read_object(run).get("configuration")
        if not isinstance(found, dict):
            raise RecordError(f"the file {run} has no configuration")
        reasons = list(differences(found, self.configuration))
        if reasons:
            raise OutputConflictError(
                f"the folder {self.path} belongs to another configuration: " + "; ".join(reasons),
                hint="choose another output folder, or repeat the command that made this one",
            )

    def _load(self) -> None:
        """Read what is finished, drop a torn last line of this rank's own file, and open that file."""
        # Rank files first: rank 0 may be merging them into results.jsonl, after which they disappear.
        others = [rank for rank in range(_highest_rank(self.path), -1, -1) if rank != self._rank]
        for rank in others:
            self._add(_read_rows(self.path / _results_name(rank))[0])
        rows, intact = _read_rows(self._own_file)
        if self._own_file.exists() and self._own_file.stat().st_size > intact:
            os.truncate(self._own_file, intact)
        self._add(rows)
        if self._rank == 0:
            self._merge(self._abandoned())
        if self._file is None:
            self._file = io.FileIO(self._own_file, "a")

    def _abandoned(self) -> range:
        """The ranks that this run does not have but an earlier one had, once it is sure that they are gone."""
        ranks = range(self._world_size, _highest_rank(self.path) + 1)
        for rank in ranks:
            lock = filelock.FileLock(self.path / _lock_name(rank))
            self._acquire(lock)
            lock.release()
        return ranks

    def _add(self, rows: dict[Place, Row]) -> None:
        # A crash between the merge and the removal of a rank's file leaves a trial in both: the same trial.
        for key, row in rows.items():
            self._finished.setdefault(key, row)

    def _merge(self, ranks: range) -> None:
        """Bring the trials of these ranks into results.jsonl, then remove their files."""
        files = [path for path in (self.path / _results_name(rank) for rank in ranks) if path.exists()]
        if not files:
            return
        for path in files:
            self._add(_read_rows(path)[0])
        if self._file is not None:
            self._file.close()
        lines = (to_json(row) + "\n" for row in _ordered(self._finished))
        write_atomic(self.path / RESULTS, "".join(lines))
        for path in files:
            path.unlink()
        self._file = io.FileIO(self.path / RESULTS, "a")


def read_rows(path: Path) -> list[Row]:
    """The finished trials of a folder that nobody is writing, sorted by task, length, depth and trial.

    Raises:
        RecordError: the folder has no results, or a line is corrupt.
    """
    rows: dict[Place, Row] = {}
    for rank in range(_highest_rank(path) + 1):
        for key, row in _read_rows(path / _results_name(rank))[0].items():
            rows.setdefault(key, row)
    if not rows:
        raise RecordError(f"the folder {path} holds no finished trial")
    return _ordered(rows)


def suite_of(configuration: dict[str, Any]) -> type[Suite]:
    """The suite that a run's configuration belongs to.

    Raises:
        UnknownNameError: it names no suite that we have.
    """
    return SUITES.get(str(configuration.get("task")))


def differences(found: Any, asked: Any, name: str = "") -> Iterator[str]:
    """What fixes the results and differs between two configurations, or parts of them: one sentence for each leaf.

    Versions inside a patch record do not fix the results, nor does the place of a text whose digest is there.
    """
    if isinstance(found, dict) and isinstance(asked, dict):
        ignored = {"versions", "path"} if "sha256" in found and "sha256" in asked else {"versions"}
        for key in sorted((found.keys() | asked.keys()) - ignored):
            yield from differences(found.get(key), asked.get(key), f"{name}.{key}" if name else key)
    elif _entries(found) and _entries(asked) and len(found) == len(asked):
        for number, pair in enumerate(zip(found, asked, strict=True)):
            yield from differences(*pair, f"{name}.{number}")
    elif found != asked:
        yield f"{name} is {_brief(found)} there and {_brief(asked)} here"


def _ordered(rows: dict[Place, Row]) -> list[Row]:
    return [rows[place] for place in sorted(rows, key=lambda place: place.order)]


def _read_rows(path: Path) -> tuple[dict[Place, Row], int]:
    """The rows of one file and the number of bytes before a torn last line (a line without its line end)."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}, 0
    except OSError as error:
        raise RecordError(f"the file {path} cannot be read: {error.strerror or error}") from error
    intact = data.rfind(b"\n") + 1
    rows: dict[Place, Row] = {}
    for number, line in enumerate(data[:intact].split(b"\n")[:-1], start=1):
        where = f"the file {path}, line {number},"
        row = parse_line(line, where)
        key = _key(row, where)
        if key in rows:
            raise RecordError(f"{where} repeats a trial", given=key._asdict())
        rows[key] = row
    return rows, intact


def _key(row: Row, where: str) -> Place:
    numbers = {name: isinstance(row.get(name), (int, float)) for name in KEY_FIELDS}
    numbers |= {"task": isinstance(row.get("task"), str)}
    numbers["depth"] |= "depth" in row and row["depth"] is None
    missing = [name for name, there in numbers.items() if not there]
    if missing:
        raise RecordError(f"{where} does not say {', '.join(missing)}")
    return Place.of(row)


def _lock_name(rank: int) -> str:
    return ".lock" if rank == 0 else f".lock.rank{rank}"


def _results_name(rank: int) -> str:
    return RESULTS if rank == 0 else f"results.rank{rank}.jsonl"


def _highest_rank(path: Path) -> int:
    numbers = (
        file.name.removeprefix("results.rank").removesuffix(".jsonl") for file in path.glob("results.rank*.jsonl")
    )
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def _run_record(configuration: dict[str, Any]) -> dict[str, Any]:
    versions = {"ropepatch": ropepatch.__version__}
    versions |= {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {**versions, "python": platform.python_version()},
        "title": run_title(configuration),
        **{name: configuration.get(name) for name in ("seed", "model", "patch")},
        "configuration": configuration,
    }


def _entries(value: Any) -> bool:
    """Whether this is a list of objects, such as a run's texts."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _brief(value: Any, limit: int = 120) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[:limit] + "..."

"""`log.jsonl`: one line for each logged step, kept over interruptions."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

from ropepatch.errors import OutputError, RecordError
from ropepatch.files import parse_line, to_json, write_atomic

LOG = "log.jsonl"
Line = dict[str, Any]


def read_log(path: Path) -> list[Line]:
    """The lines of a log, in the order of their steps. A last line that a crash cut short is left out.

    Raises:
        RecordError: a line is corrupt.
        OutputError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}") from error
    whole = data[: data.rfind(b"\n") + 1].splitlines()
    return [parse_line(line, f"the file {path}, line {number},") for number, line in enumerate(whole, start=1)]


def read_folder(folder: Path) -> list[Line]:
    """The log of a run's folder, finished or not.

    Raises:
        RecordError: there is none, or it holds no step.
    """
    lines = read_log(folder / LOG)
    if not lines:
        raise RecordError(
            f"the folder {folder} holds no training log with a step", hint="name a folder of ropepatch train"
        )
    return lines


class Log:
    """The log of a run that is going on.

    Args:
        path: of `log.jsonl`.
        step: the step at which the run goes on: later lines are of steps that a crash undid, and are dropped.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        self.lines = [line for line in read_log(path) if line["step"] <= step]
        write_atomic(path, "".join(to_json(line) + "\n" for line in self.lines))
        last: Line = self.lines[-1] if self.lines else {"tokens": 0, "seconds": 0.0}
        self._tokens: int = last["tokens"]
        self._started = time.perf_counter() - last["seconds"]
        self._before: tuple[int, float] = (last["tokens"], last["seconds"])

    def count(self, tokens: int) -> None:
        """Tell that so many tokens were trained on, over all processes."""
        self._tokens += tokens

    def append(self, step: int, values: Line) -> Line:
        """Write a line: `step`, `values`, and tokens, tokens a second, peak memory and seconds so far.

        Raises:
            OutputError: the disk refuses.
        """
        seconds = time.perf_counter() - self._started
        tokens, before = self._before
        line = {
            "step": step,
            **values,
            "tokens": self._tokens,
            "tokens_per_s": round((self._tokens - tokens) / max(seconds - before, 1e-9), 1),
            "peak_memory_mib": peak_memory_mib(),
            "seconds": round(seconds, 3),
        }
        self._before = (self._tokens, seconds)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(to_json(line) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write to {self.path}: {error.strerror or error}") from error
        self.lines.append(line)
        return line


def peak_memory_mib() -> int:
    """The most memory that this process has held: of its accelerator, else resident memory. In MiB."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated() >> 20)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak >> 20 if sys.platform == "darwin" else peak >> 10)

"""Tokenised documents on disk: written once, checked when opened, mapped into memory and never read whole.

A store is a folder: `tokens.bin` (token ids, one document after the other), `ends.bin` (where each document ends),
for conversations `marks.bin` (which tokens the loss counts), and `manifest.json`, which is written last.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ropepatch.errors import OutputError, RecordError
from ropepatch.evaluation.progress import say
from ropepatch.files import read_object, to_json, write_json

FORMAT = 1
"""Goes up whenever what is in a store, or how it is tokenised, changes."""

_MANIFEST = "manifest.json"
_BLOCK = 2**24


class Writer:
    """Writes the documents of a store, one after the other.

    Args:
        folder: exists and is empty.
        vocabulary: ids are below this number.
        marked: documents come with marks.
    """

    def __init__(self, folder: Path, vocabulary: int, *, marked: bool) -> None:
        self.folder = folder
        self.dtype = np.dtype("<u2" if vocabulary <= 2**16 else "<u4")
        self.ends: list[int] = []
        self.size = 0
        self._tokens: BinaryIO = (folder / "tokens.bin").open("wb")
        self._marks: BinaryIO | None = (folder / "marks.bin").open("wb") if marked else None

    def add(self, ids: Any, marks: Any = None) -> None:
        """One document: ids [n], and marks [n] (0 or 1) in a marked store."""
        self._tokens.write(np.asarray(ids, dtype=self.dtype).tobytes())
        if self._marks is not None:
            self._marks.write(np.asarray(marks, dtype=np.uint8).tobytes())
        self.size += len(ids)
        self.ends.append(self.size)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        for file in filter(None, (self._tokens, self._marks)):
            file.close()

    def finish(self, settings: Mapping[str, Any]) -> None:
        """Write the rest, the manifest last, when the files are closed."""
        (self.folder / "ends.bin").write_bytes(np.asarray(self.ends, dtype="<i8").tobytes())
        files = {path.name: {"size": path.stat().st_size, "crc32": _crc(path)} for path in self.folder.glob("*.bin")}
        write_json(
            self.folder / _MANIFEST,
            {"format": FORMAT, "dtype": self.dtype.str, "files": files, "settings": dict(settings)},
        )


class Store:
    """An open store.

    Attributes:
        folder: where it is.
        ends: one past the last token of each document, int64 [documents].

    Raises:
        RecordError: a file of it is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_object(folder / _MANIFEST)
        try:
            self._dtype = np.dtype(manifest["dtype"])
            intact = manifest["format"] == FORMAT and all(
                (folder / name).stat().st_size == entry["size"] and _crc(folder / name) == entry["crc32"]
                for name, entry in manifest["files"].items()
            )
            self.marked = "marks.bin" in manifest["files"]
        except (OSError, KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"the tokenised cache {folder} is damaged: {error}") from error
        if not intact:
            raise RecordError(f"the tokenised cache {folder} is damaged")
        self.ends = np.fromfile(folder / "ends.bin", dtype="<i8").astype(np.int64, copy=False)
        self._map()

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document, int64 [documents]."""
        return np.diff(self.ends, prepend=0)

    @property
    def total(self) -> int:
        """Tokens of all documents."""
        return len(self._tokens)

    def span(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Token ids of a part of all documents, laid one after the other."""
        return np.asarray(self._tokens[start:stop])

    def ids(self, document: int, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Token ids of a part of a document, in the type they are stored in."""
        return self._slice(self._tokens, document, start, stop)

    def marks(self, document: int, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Which of these tokens the loss counts, uint8; a store without marks counts all."""
        if self._marks is None:
            return np.ones_like(self.ids(document, start, stop), dtype=np.uint8)
        return self._slice(self._marks, document, start, stop)

    def _slice(self, data: Any, document: int, start: int, stop: int | None) -> npt.NDArray[Any]:
        begin = int(self.ends[document - 1]) if document else 0
        end = int(self.ends[document])
        return np.asarray(data[begin + start : end if stop is None else min(end, begin + stop)])

    def _map(self) -> None:
        self._tokens: Any = _mapped(self.folder / "tokens.bin", self._dtype)
        self._marks: Any = _mapped(self.folder / "marks.bin", np.dtype(np.uint8)) if self.marked else None

    # A worker process maps the files itself: a pickled map would be a copy of all tokens.
    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_tokens", "_marks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()


def open_store(root: Path, settings: Mapping[str, Any], make: Callable[[Path], None]) -> Store:
    """The store of these settings below `root`; made where it is not there yet, or damaged.

    Safe with several processes at once: one makes it, the others wait.

    Args:
        root: the cache folder.
        settings: everything that the content depends on; their hash is the folder's name.
        make: writes a store into an empty folder.

    Raises:
        OutputError: the cache folder cannot be written.
    """
    import filelock

    folder = root / hashlib.sha256(to_json({"format": FORMAT, **settings}).encode()).hexdigest()[:32]
    # Without the lock first: a cache that is shared may be read-only.
    if (store := _intact(folder)) is not None:
        return store
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / f".{folder.name}.lock"):
            if (store := _intact(folder)) is not None:  # another process made it meanwhile
                return store
            if folder.exists():
                say(f"the tokenised cache {folder} is damaged; it is made again")
                shutil.rmtree(folder)
            _make(folder, make)
            return Store(folder)
    except OSError as error:
        raise OutputError(
            f"cannot write the tokenised cache {folder}: {error.strerror or error}",
            hint="set data.cache to a folder that can be written",
        ) from error


def _intact(folder: Path) -> Store | None:
    try:
        return Store(folder)
    except RecordError:  # not there, or damaged
        return None


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    """Write beside the final place, then move there in one step."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        make(temporary)
        temporary.chmod(0o755)  # mkdtemp keeps others out
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _mapped(path: Path, dtype: np.dtype[Any]) -> Any:
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


def _crc(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value

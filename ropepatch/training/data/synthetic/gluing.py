"""Pieces of text to tokens that are those of the whole text, without tokenising the whole text.

A window's haystack is tokenised once and for all; what changes from window to window is a few short pieces. A piece is
tokenised behind a full stop, since that is what it will follow: some tokenizers put a mark before the first word of a
text, others take a full stop and a line's end together as one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ropepatch.errors import PromptError
from ropepatch.training.data.synthetic.tasks import Said
from ropepatch.training.data.window import Numbers

_STOP = "."

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Piece:
    """A tokenised piece.

    Attributes:
        ids: int64 [n].
        answer: which of them are answers, bool [n]; none by default.
        fused: the piece together with a full stop before it, where the tokenizer makes one token across the two.
    """

    ids: Numbers
    answer: Mask | None = None
    fused: Piece | None = None


class Gluer:
    """Tokenises pieces.

    Args:
        tokenizer: a fast one (it must know character offsets).

    Raises:
        PromptError: it is not.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise PromptError(
                "the tokenizer does not know character offsets, which synthetic tasks need",
                given=type(tokenizer).__name__,
                hint="use a fast one",
            )
        self.tokenizer = tokenizer
        self.stop = np.asarray(self._encode([_STOP])["input_ids"][0], dtype=np.int64)
        self._bare: dict[int, int] = {}
        self._openings: dict[str, Piece] = {}

    def pieces(self, said: list[Said]) -> list[Piece]:
        """The tokens of each piece as they follow a full stop.

        Raises:
            PromptError: a part of one is unknown to the tokenizer.
        """
        encoded = self._encode([_STOP + piece.text for piece in said])
        return [
            self._piece(piece, encoded["input_ids"][n], encoded["offset_mapping"][n]) for n, piece in enumerate(said)
        ]

    def opening(self, text: str) -> Piece:
        """The tokens of the words that a window begins with: there are few of them, so they are kept."""
        if text not in self._openings:
            (known,) = self.pieces([Said(text)])
            self._openings[text] = Piece(self._alone(Said(text))[0]) if len(known.ids) else known
        return self._openings[text]

    def knows(self, texts: list[str]) -> list[bool]:
        """Whether the tokenizer has tokens for all of each text."""
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        return [bool(ids) and unknown not in ids for ids in self._encode(texts)["input_ids"]]

    def sequences(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text behind a space, without what the tokenizer puts before a first word."""
        found = []
        for ids in self._encode([f"{_STOP} {text}" for text in texts])["input_ids"]:
            found.append(ids[len(self.stop) :] if ids[: len(self.stop)] == self.stop.tolist() else ids)
        return found

    def bare(self, token: int) -> int:
        """The token of the same word at the beginning of a line, without its space; itself where there is none."""
        if token not in self._bare:
            word = self.tokenizer.decode([token]).lstrip()
            line, both = self._encode([f"{_STOP}\n", f"{_STOP}\n{word}"])["input_ids"]
            found = both[:-1] == line and self.tokenizer.decode(both[-1:]) == word
            self._bare[token] = both[-1] if found else token
        return self._bare[token]

    def _piece(self, said: Said, ids: list[int], offsets: list[tuple[int, int]]) -> Piece:
        lead = len(self.stop)
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown in ids[lead:]:
            start, end = (place - len(_STOP) for place in offsets[ids.index(unknown, lead)])
            raise PromptError(
                f"the tokenizer cannot represent {said.text[max(0, start) : end]!r} of a synthetic task",
                given=said.text.strip()[:80],
            )
        made, answer = np.asarray(ids, dtype=np.int64), _answers(said, offsets, len(_STOP))
        if np.array_equal(made[:lead], self.stop):
            return Piece(made[lead:], None if answer is None else answer[lead:])
        return Piece(*self._alone(said), fused=Piece(made, answer))

    def _alone(self, said: Said) -> tuple[Numbers, Mask | None]:
        encoded = self._encode([said.text])
        return np.asarray(encoded["input_ids"][0], dtype=np.int64), _answers(said, encoded["offset_mapping"][0], 0)

    def _encode(self, texts: list[str]) -> Any:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
            verbose=False,
        )


def _answers(said: Said, offsets: list[tuple[int, int]], shift: int) -> Mask | None:
    """Which tokens belong to an answer; None where there is none."""
    if not said.answers:
        return None
    starts, ends = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T - shift
    answer = np.zeros(len(starts), dtype=bool)
    for start, end in said.answers:
        answer |= (starts < end) & (ends > start)
    return answer


class Line:
    """A window that is put together from left to right."""

    def __init__(self, gluer: Gluer) -> None:
        self._gluer = gluer
        self._parts: list[tuple[Numbers, Mask]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, piece: Piece, *, begins_line: bool = False) -> None:
        """Append a piece; in the place of the full stop before it, where it is fused with one."""
        if begins_line:
            self._add(self._begun(piece.ids), piece.answer)
            return
        stop = self._gluer.stop
        last = self._parts[-1][0] if self._parts else stop[:0]
        if piece.fused is not None and len(last) >= len(stop) and np.array_equal(last[-len(stop) :], stop):
            ids, answer = self._parts.pop()
            self._add(ids[: -len(stop)], answer[: -len(stop)], counted=True)
            self._size -= len(stop)
            piece = piece.fused
        self._add(piece.ids, piece.answer)

    def hay(self, ids: Numbers, begins_line: bool) -> None:
        """Append a part of the haystack."""
        if len(ids):
            self._add(self._begun(ids) if begins_line else ids, None)

    def end(self, ids: Numbers, begins_line: bool, tail: Piece, size: int) -> None:
        """Append haystack and the tail: together `size` tokens."""
        stop = self._gluer.stop
        if tail.fused is not None:
            rest = size - len(tail.fused.ids) + len(stop)
            if rest >= len(stop) and np.array_equal(ids[:rest][-len(stop) :], stop):
                self.hay(ids[:rest], begins_line)
                self.put(tail)
                return
        self.hay(ids[: size - len(tail.ids)], begins_line)
        self._add(tail.ids, tail.answer)

    def _begun(self, ids: Numbers) -> Numbers:
        return np.concatenate([[self._gluer.bare(int(ids[0]))], ids[1:]])

    def joined(self) -> tuple[Numbers, Mask]:
        """Ids int64 [n], and which of them are answers, bool [n]."""
        ids, answers = zip(*self._parts, strict=True)
        return np.concatenate(ids), np.concatenate(answers)

    def _add(self, ids: Numbers, answer: Mask | None, *, counted: bool = False) -> None:
        self._parts.append((ids, np.zeros(len(ids), dtype=bool) if answer is None else answer))
        self._size += 0 if counted else len(ids)

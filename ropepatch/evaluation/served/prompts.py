"""How a prompt of exact token ids is told to a server: as these ids, as their text, or as the user's turn of a chat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ropepatch.errors import PromptError
from ropepatch.evaluation.prompt import Ids, TextEncoder
from ropepatch.evaluation.served.model import Way

_MARK = "<<the user's turn>>"


@dataclass(frozen=True, eq=False)
class Served:
    """What is sent for a prompt.

    Attributes:
        content: the ids, the text, or the user's turn.
        length: tokens that the server reads for it, by our own tokenizer and template.
        same_ids: whether these are the prompt's ids (in a chat: its first ones).
        begun: first words of the reply that the prompt ends with and a chat cannot; "" otherwise.
        begun_tokens: how many tokens of the prompt these are.
        frame: how many tokens of `length` are a chat's template, of which the server may have another; 0 otherwise.
    """

    content: list[int] | str
    length: int
    same_ids: bool
    begun: str = ""
    begun_tokens: int = 0
    frame: int = 0


class Speller:
    """Turns prompts into what is sent.

    Args:
        encoder: what the prompts are built with.
        way: how the server takes them.

    Raises:
        PromptError: the way is "chat", and the tokenizer's template puts nothing behind the user's turn.
    """

    def __init__(self, encoder: TextEncoder, way: Way) -> None:
        self.encoder = encoder
        self.way = way
        # A server puts special tokens in front of any text, whoever wrote it.
        self._reader = TextEncoder(encoder.tokenizer)
        if way == "chat":
            around = encoder.turn(_MARK, "")
            head, _, tail = around.partition(_MARK)
            self._frame = len(encoder.encode(around))
            self._head, self._tail = self._as_decoded(head), self._as_decoded(tail)
            if not self._tail.strip():
                raise PromptError("the chat template puts nothing between the user's turn and the reply")

    def spell(self, ids: Ids) -> Served:
        """What is sent for the prompt `ids`, shape [length].

        Raises:
            PromptError: the user's turn cannot be told from the template around it.
        """
        if self.way == "ids":
            return Served(ids.tolist(), len(ids), True)
        return self._text(ids) if self.way == "text" else self._turn(ids)

    def _text(self, ids: Ids) -> Served:
        added = self._added()
        first = len(added) if np.array_equal(ids[: len(added)], added) else 0
        text = self._decode(ids[first:])
        read = self._reader.encode(text).ids
        return Served(text, len(read), np.array_equal(read, ids))

    def _turn(self, ids: Ids) -> Served:
        text = self._decode(ids)
        end = text.rfind(self._tail)
        if not text.startswith(self._head) or end < len(self._head):
            raise PromptError("the tokenizer does not give back the chat template around a prompt")
        user, begun = text[len(self._head) : end], text[end + len(self._tail) :]
        read = self.encoder.encode(self.encoder.turn(user, "")).ids
        return Served(
            user,
            len(read),
            np.array_equal(read, ids[: len(read)]),
            begun=begun.strip(),
            begun_tokens=len(ids) - len(read),
            frame=self._frame,
        )

    def _added(self) -> Ids:
        """The special tokens that the tokenizer puts in front of every text."""
        tokens = self._reader.encode("a")
        return tokens.ids[: int(np.flatnonzero(tokens.ends > tokens.starts)[0])]

    def _as_decoded(self, text: str) -> str:
        return self._decode(self.encoder.encode(text).ids) if text else ""

    def _decode(self, ids: Ids) -> str:
        text = self.encoder.tokenizer.decode(
            ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)


def beyond(begun: str, reply: str) -> str:
    """The reply of a chat without the words that it should have begun with, and without marks in front of what counts.

    Args:
        begun: "The pass key is".
        reply: "The pass key is **12345**." gives "12345**.", so does "12345**.".
    """
    text = reply.strip()
    if begun and text.lower().startswith(begun.lower()):
        text = text[len(begun) :]
    return text.lstrip(" \t\r\n*_`\"'“”‘’:")

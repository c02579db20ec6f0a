"""Guesses at how a text goes on, from the text itself: what followed the last time that its end stood in it.

Answers repeat their prompt and themselves, so such guesses are often right; a model that reads several of them at once
and keeps those that it would have chosen generates what it would have generated token by token (prompt lookup, A.
Saxena, 2023; the check is that of speculative decoding, Leviathan et al., arXiv 2211.17192, at temperature 0).
"""

from __future__ import annotations

import numpy as np

from ropepatch.evaluation.prompt import Ids

_END = 3
"""Tokens of the end that must have stood in the text before."""

FEWEST, MOST = 2, 16
"""Guesses at once, and forwards without any after the fewest were all wrong. On a CPU eight tokens cost little more
than one."""


class Guesser:
    """The text of one query, and guesses at its next tokens; fewer at once where they were wrong, and at times none.

    Args:
        prompt: token ids, shape [n].
        room: how many tokens may follow it.
    """

    def __init__(self, prompt: Ids, room: int) -> None:
        self._ids = np.empty(len(prompt) + room, dtype=np.int32)
        self._ids[: len(prompt)] = prompt
        self._length = len(prompt)
        self._most = MOST // 2
        self._pause = FEWEST
        self._wait = 0

    def add(self, token: int) -> None:
        """The text goes on with this token."""
        self._ids[self._length] = token
        self._length += 1

    def guess(self) -> Ids:
        """The tokens that may follow, shape [k], k from 0 to `MOST`, and one less than there is room for: the model's
        own choice comes after them. Asked once for each forward."""
        text = self._ids[: self._length]
        if self._wait:
            self._wait -= 1
            return text[:0]
        most = min(self._most, len(self._ids) - self._length - 1)
        if most < 1 or len(text) <= _END:
            return text[:0]
        # Places before the end itself; the latest, since what a text does now it did there.
        earlier = np.lib.stride_tricks.sliding_window_view(text[:-1], _END)
        found = np.flatnonzero((earlier == text[-_END:]).all(axis=1))
        if not len(found):
            return text[:0]
        start = int(found[-1]) + _END
        return text[start : start + most].copy()

    def learn(self, guessed: int, right: int) -> None:
        """How many of the last guesses were right."""
        if not guessed:
            return
        if right:
            self._pause = FEWEST
        elif self._most == FEWEST:
            self._wait, self._pause = self._pause, min(MOST, 2 * self._pause)
        if right == guessed:
            self._most = min(MOST, 2 * self._most)
        elif right < guessed // 2:
            self._most = max(FEWEST, self._most // 2)

"""Windows of made-up retrieval tasks, each of exactly its length."""

from __future__ import annotations

from itertools import count
from random import Random
from typing import Any

import numpy as np

from ropepatch.errors import PromptError
from ropepatch.evaluation.words import ADJECTIVES, NOUNS
from ropepatch.training.data.plan import Plan
from ropepatch.training.data.synthetic.gluing import Gluer, Line, Piece
from ropepatch.training.data.synthetic.hay import Filler, Hay
from ropepatch.training.data.synthetic.tasks import Exam, Names, Said, fewest, make_exam, tasks_of
from ropepatch.training.data.tokenising import Framing
from ropepatch.training.data.window import IGNORED, Numbers, Window

_FEWEST_NAMES = 64
_ATTEMPTS = 100
_SPARE = 16
"""Tokens that must be left over in the first windows: the words of others may be longer."""
_GOLDEN = 0.6180339887498949
_EDGE = 8
"""Of so many windows in a row one has an answer at the very beginning of its haystack, and one at its end."""


class SyntheticWindows:
    """Windows of one task, or of all in turn.

    A window is a haystack with facts hidden in it, and questions with their answers at its end. Its content is drawn
    from the seed and its number alone. Depths of what is asked for spread evenly over any run of windows, both ends
    included. Within a window no name and no number occurs twice by accident, in the haystack neither.

    Args:
        task: "passkey", "key_value", "multi_hop" or "mixed".
        hay: what facts are hidden in.
        tokenizer: a fast one.
        plan: rows of this source.
        what: the seed and the source: what contents are drawn from.
        answer_only: labels are the answers (and the end token), nothing else.

    Raises:
        PromptError: the tokenizer does not know the words, a window is too short for the task (names the least), or the
            haystack for a window.
    """

    def __init__(
        self, task: str, hay: Hay, tokenizer: Any, plan: Plan, *, what: tuple[object, ...], answer_only: bool
    ) -> None:
        self.tasks, self.plan, self.what, self.answer_only = tasks_of(task), plan, what, answer_only
        self.gluer = Gluer(tokenizer)
        self.names = _known_names(self.gluer) if self.tasks != ("passkey",) else Names()
        framing = Framing(tokenizer)
        self._lead, self._end = (np.asarray(ids, dtype=np.int64) for ids in (framing.lead, framing.end))
        self.hay = hay
        # What can be refused is refused before training begins.
        for start, rows, length in zip(plan.starts, plan.counts, plan.lengths, strict=False):
            if rows:
                hay.check(length)
                for number in range(start, start + len(self.tasks)):
                    self._check(number, length)
                    self._make(number, length)

    def window(self, number: int) -> Window:
        return self._make(number, self.plan.place(number).length)

    def _check(self, number: int, length: int) -> None:
        task = self.tasks[number % len(self.tasks)]
        least, *_ = self._fitting(self._random(number, 0), task, length - _SPARE)
        if least > length - _SPARE:
            raise PromptError(
                f"the window is too short for the synthetic task {task}",
                given=length,
                allowed=f"at least {least + _SPARE}",
            )

    def _make(self, number: int, length: int) -> Window:
        for attempt in range(_ATTEMPTS):
            random = self._random(number, attempt)
            size, exam, head, facts, tail = self._fitting(random, self.tasks[number % len(self.tasks)], length)
            if size > length:
                continue
            # A piece may take the place of the full stop before it: then there is room for a token more.
            ids, begins = self.hay.take(random, length - size + len(facts) + 1)
            if not self._betrayed(exam, ids):
                return self._join(exam, head, facts, tail, (ids, begins), self._depths(exam, number, random), length)
        raise PromptError(
            f"no window of a synthetic task could be made in {_ATTEMPTS} draws",
            given=f"{length} tokens",
            hint="use a longer window, or a haystack that does not hold the names and numbers that are drawn",
        )

    def _random(self, number: int, attempt: int) -> Random:
        return Random("|".join(map(str, (*self.what, *self.tasks, number, attempt))))

    def _fitting(self, random: Random, task: str, length: int) -> tuple[int, Exam, Piece, list[Piece], Piece]:
        """An exam that fits into `length` tokens, or the one of the fewest facts; its tokens first, then its pieces."""
        for less in count():
            exam = make_exam(task, random, self.names, length, less)
            facts = [f"\n{fact}\n" if exam.lines else f" {fact}" for fact in exam.facts]
            head = self.gluer.opening(exam.head)
            *pieces, tail = self.gluer.pieces([*map(Said, facts), exam.tail])
            size = len(self._lead) + len(self._end) + sum(len(piece.ids) for piece in (head, *pieces, tail))
            if size <= length or fewest(task, less, length):
                return size, exam, head, pieces, tail
        raise AssertionError("unreachable")

    def _depths(self, exam: Exam, number: int, random: Random) -> list[float]:
        """Where each fact lies in the haystack, 0..1."""
        depths = [random.random() for _ in exam.facts]
        turn = number // len(self.tasks)
        edges = {0: 0.0, _EDGE // 2: 1.0}
        depths[0] = edges.get(turn % _EDGE, (turn + 1) * _GOLDEN % 1.0)
        return depths

    def _betrayed(self, exam: Exam, ids: Numbers) -> bool:
        """Whether the haystack holds a name or number by accident."""
        if isinstance(self.hay, Filler):
            return False
        return holds(ids, self.gluer.sequences(list(exam.secrets)))

    def _join(
        self,
        exam: Exam,
        head: Piece,
        facts: list[Piece],
        tail: Piece,
        hay: tuple[Numbers, Numbers],
        depths: list[float],
        length: int,
    ) -> Window:
        ids, begins = hay
        line = Line(self.gluer)
        line.put(Piece(self._lead))
        line.put(head)
        room = length - len(self._end) - len(tail.ids) - sum(len(piece.ids) for piece in facts) - len(line)
        spots = [int(begins[np.searchsorted(begins, depth * room, side="right") - 1]) for depth in depths]
        at, fresh = 0, True
        for spot, piece in sorted(zip(spots, facts, strict=True), key=lambda pair: pair[0]):
            line.hay(ids[at:spot], fresh)
            line.put(piece, begins_line=at == spot == 0 and not exam.lines)
            at, fresh = spot, exam.lines
        rest = length - len(self._end) - len(line)
        line.end(ids[at:], fresh, tail, rest)
        line.put(Piece(self._end, np.ones(len(self._end), dtype=bool)))
        made, answer = line.joined()
        labels = np.where(answer, made, IGNORED) if self.answer_only else made.copy()
        return Window(made, labels, np.ones(len(made), dtype=np.int64))


def _known_names(gluer: Gluer) -> Names:
    """Names of words that the tokenizer knows.

    Raises:
        PromptError: too few.
    """
    known = [
        tuple(word for word, fine in zip(words, gluer.knows([f" {word}" for word in words]), strict=True) if fine)
        for words in (ADJECTIVES, NOUNS)
    ]
    names = Names(*known)
    if len(names) < _FEWEST_NAMES:
        raise PromptError(
            "the tokenizer knows too few words for the names of synthetic tasks",
            given=f"{len(known[0])} adjectives, {len(known[1])} nouns",
            hint="use task: passkey, which needs none; ropepatch.training.data.synthetic.words(task) lists all words",
        )
    return names


def holds(ids: Numbers, sequences: list[list[int]]) -> bool:
    """Whether any of the sequences, none of them empty, occurs in `ids`."""
    size = 1 + max(int(ids.max(initial=0)), max(map(max, sequences)))
    often = np.bincount(ids, minlength=size).tolist()
    return any(min(often[t] for t in s) and _stands(ids, s, min(s, key=often.__getitem__)) for s in sequences)


def _stands(ids: Numbers, sequence: list[int], rarest: int) -> bool:
    at = np.flatnonzero(ids == rarest) - sequence.index(rarest)
    at = at[(at >= 0) & (at + len(sequence) <= len(ids))]
    for offset, token in enumerate(sequence):
        at = at[ids[at + offset] == token]
    return bool(len(at))

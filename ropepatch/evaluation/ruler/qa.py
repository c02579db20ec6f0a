"""Question answering: the paragraphs that hold the answer among others, from a file of SQuAD or of HotpotQA."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ropepatch.errors import PromptError
from ropepatch.evaluation.fitting import Draft
from ropepatch.evaluation.ruler.drawing import Draw
from ropepatch.evaluation.ruler.question import Question, RulerTask, joined

# RULER, scripts/data/synthetic/constants.py and qa.py.
TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "Question: {query}"
)
ANSWER_PREFIX = "Answer:"
DOCUMENT = "Document {number}:\n{text}"

_WORD_END = re.compile(r"\S(?=\s|\Z)")
_FEWEST_WORDS = 8


@dataclass(frozen=True)
class Item:
    """A question of a data set; `gold` and `related` number its documents."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class Documents:
    """A data set as RULER reads it: its documents sorted, its questions in the file's order."""

    texts: tuple[str, ...]
    items: tuple[Item, ...]
    path: str
    sha256: str

    @property
    def identity(self) -> dict[str, str]:
        """What a run's configuration says of it."""
        return {"path": self.path, "sha256": self.sha256}


def read_squad(path: str | Path) -> Documents:
    """SQuAD's own JSON (`data` > `paragraphs` > `context`, `qas`); questions without an answer are left out.

    Raises:
        PromptError: the file cannot be read, or is no such file.
    """
    return _read(path, "SQuAD", _squad_items)


def read_hotpot(path: str | Path) -> Documents:
    """HotpotQA's own JSON (a list of `question`, `answer` and `context`: pairs of a title and its sentences).

    Raises:
        PromptError: the file cannot be read, or is no such file.
    """
    return _read(path, "HotpotQA", _hotpot_items)


def _squad_items(data: Any) -> Iterator[tuple[list[str], list[tuple[str, list[str], list[str]]]]]:
    for article in data["data"]:
        paragraphs = [paragraph["context"] for paragraph in article["paragraphs"]]
        asked = [
            (qa["question"], [answer["text"] for answer in qa["answers"]], [paragraph["context"]])
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
            if not qa.get("is_impossible", False)
        ]
        yield paragraphs, asked


def _hotpot_items(data: Any) -> Iterator[tuple[list[str], list[tuple[str, list[str], list[str]]]]]:
    for entry in data:
        documents = [f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]]
        yield documents, [(entry["question"], [entry["answer"]], documents)]


def _read(path: str | Path, kind: str, parts: Any) -> Documents:
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PromptError(f"cannot read the {kind} file {path}: {error.strerror or error}") from error
    try:
        groups = list(parts(json.loads(raw)))
        texts = tuple(sorted({text for group, _ in groups for text in group}))
        number = {text: index for index, text in enumerate(texts)}
        items = tuple(
            Item(
                query,
                tuple(dict.fromkeys(answers)),
                tuple(dict.fromkeys(number[text] for text in gold)),
                tuple(dict.fromkeys(number[text] for text in group if text not in gold)),
            )
            for group, asked in groups
            for query, answers, gold in asked
        )
        strings = [*texts, *(item.query for item in items), *(answer for item in items for answer in item.answers)]
        if not all(isinstance(text, str) and text.strip() for text in strings):
            raise ValueError("an empty document, question or answer, or one that is no text")
        if not items or not all(item.answers for item in items):
            raise ValueError("a question without an answer" if items else "no question")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no field {error}" if isinstance(error, KeyError) else str(error)
        raise PromptError(
            f"{path} is not in the JSON format of {kind}: {reason}",
            hint=f"give the data set's own file ({kind} dev set)",
        ) from error
    return Documents(texts, items, str(path), hashlib.sha256(raw).hexdigest())


def ask(documents: Sequence[str], query: str) -> tuple[str, str]:
    """What the user says of some documents, and how the reply begins."""
    return TEMPLATE.format(context=_numbered(documents)[0], query=query), ANSWER_PREFIX


def _numbered(documents: Sequence[str]) -> tuple[str, list[int]]:
    return joined((DOCUMENT.format(number=n, text=text) for n, text in enumerate(documents, start=1)), "\n\n")


class QuestionAnswering(RulerTask):
    """RULER's `qa_1` (SQuAD) and `qa_2` (HotpotQA). A unit of filler is one word of a distracting document.

    Distractors are RULER's: first documents of the same article, then others. The last document is a distractor, and
    what is too much of it is cut off (now and then all of it, and a part of its heading). Questions are drawn from the
    whole file; a trial's question is the same at every length.
    """

    most_tokens = 32
    any_reference = True

    def __init__(self, name: str, *, seed: int, documents: Documents, trials: int) -> None:
        self.name = name
        self.documents = documents
        self.filler = f"the file {documents.path}"
        self._seed = seed
        if trials > len(documents.items):
            raise PromptError(
                f"the file {documents.path} has too few questions",
                given=f"{trials} trials",
                allowed=f"{len(documents.items)}",
            )
        self._order = Draw(seed, name).shuffled(range(len(documents.items)))

    def question(self, trial: int, length: int) -> Question:
        item = self.documents.items[self._order[trial]]
        draw = Draw(self._seed, self.name, trial)
        known = {*item.gold, *item.related}
        others = [number for number in range(len(self.documents.texts)) if number not in known]
        order = [*draw.shuffled(item.related), *draw.shuffled(others)]
        distractors: list[str] = []
        ends: list[list[int]] = []
        totals = [0]
        for number in order:
            if totals[-1] > length:
                break
            text = self.documents.texts[number]
            distractors.append(text)
            ends.append([match.end() for match in _WORD_END.finditer(text)])
            totals.append(totals[-1] + len(ends[-1]))
        gold = [self.documents.texts[number] for number in item.gold]

        def draft(units: int) -> Draft:
            whole = int(np.searchsorted(totals, units, side="left")) - 1
            words = max(units - totals[whole], min(_FEWEST_WORDS, len(ends[whole])))
            last = distractors[whole][: ends[whole][words - 1]]
            documents = [*gold, *distractors[:whole]]
            places = Draw(self._seed, self.name, trial, "order").shuffled(range(len(documents)))
            documents = [*(documents[place] for place in places), last]
            context, starts = _numbered(documents)
            user, _ = ask(documents, item.query)
            at = user.index(context)
            marks = {
                f"answer_{i}": (at + starts[places.index(i)], at + starts[places.index(i) + 1])
                for i in range(len(gold))
            }
            return Draft(user, (at + starts[-1], at + len(context)), marks)

        if not distractors:
            raise PromptError(f"{self.filler} has no document besides those of the question", given=item.query)
        return Question(
            references=item.answers,
            reply=ANSWER_PREFIX,
            ideal=item.answers[0],
            draft=draft,
            least=min(_FEWEST_WORDS, totals[-1]),
            most=totals[-1],
            details={"question": item.query},
        )

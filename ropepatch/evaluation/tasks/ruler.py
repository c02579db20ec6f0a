"""RULER: 13 synthetic tasks at exact prompt lengths (Hsieh et al., arXiv 2404.06654; github.com/NVIDIA/RULER).

Wording and scores are RULER's. Two things differ. RULER's prompts are as long as whole units of filler allow, and its
length includes the tokens to generate; here `length` is exactly the number of prompt tokens, and the last unit of
filler is cut at a token border to reach it. And words, keys and places are drawn by us, the same on every machine.

`evaluation/ruler/` has a file for each family of tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ropepatch.errors import PromptError, unknown_name
from ropepatch.evaluation.fitting import Draft, Fitted, fit
from ropepatch.evaluation.prompt import Ids, TextEncoder
from ropepatch.evaluation.ruler.cwe import CommonWords
from ropepatch.evaluation.ruler.essay import Essay
from ropepatch.evaluation.ruler.fwe import FrequentWords
from ropepatch.evaluation.ruler.matching import postprocessed, string_match_all, string_match_part
from ropepatch.evaluation.ruler.niah import KINDS, Niah
from ropepatch.evaluation.ruler.qa import Documents, QuestionAnswering, read_hotpot, read_squad
from ropepatch.evaluation.ruler.question import Question, RulerTask
from ropepatch.evaluation.ruler.vocabulary import Vocabulary, vocabulary
from ropepatch.evaluation.ruler.vt import VariableTracking
from ropepatch.evaluation.suite import RetrievalSuite, register
from ropepatch.evaluation.task import Grade, Place, Prompt, Retrieval
from ropepatch.evaluation.texts import RealText, default_text, read_text

if TYPE_CHECKING:
    from rich.table import Table

TASKS = (*KINDS, "vt", "cwe", "fwe", "qa_1", "qa_2")
"""RULER's tasks, in its order."""

PROSE = tuple(name for name, kind in KINDS.items() if kind.haystack == "essay")
"""The tasks whose haystack is running text."""

QA_FILES = {"qa_1": "squad", "qa_2": "hotpot"}
"""The setting that gives a task its file."""

_PROBE_UNITS = 64
# Of prose, however short the prompts: the minimal length must be found out. A word has a token at least.
_LEAST_WORDS = 1000


@register
class RulerSuite(RetrievalSuite):
    """Settings of a RULER run. Every trial is one (task, length, trial).

    Attributes:
        tasks: which of the 13; None for all, without those of qa_1 and qa_2 whose file is not given: the summary names
            them and says why.
        text: the prose of the tasks that hide needles in running text: a file, a folder of .txt, or a data set
            (`datasets:...`); None for the default text. RULER's own are essays by Paul Graham.
        words: "own" for our word lists, "wonderwords" for those of that package, as RULER has.
        squad: the JSON file of SQuAD (dev-v2.0.json in RULER), for qa_1.
        hotpot: the JSON file of HotpotQA (hotpot_dev_distractor_v1.json in RULER), for qa_2.
    """

    name = "ruler"

    task: Literal["ruler"] = "ruler"
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    text: str | None = None
    words: Literal["own", "wonderwords"] = "own"
    squad: str | None = None
    hotpot: str | None = None

    @field_validator("tasks", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        for name in names if isinstance(names, (list, tuple)) else ():
            if name not in TASKS:
                raise ValueError(str(unknown_name("RULER task", str(name), TASKS)))
        if isinstance(names, (list, tuple)):
            return tuple(name for name in TASKS if name in names)
        return names

    @model_validator(mode="after")
    def _files_and_tasks_agree(self) -> RulerSuite:
        for task, setting in QA_FILES.items():
            given = getattr(self, setting) is not None
            if self.tasks is not None and (task in self.tasks) != given:
                needs = (
                    f"{task} needs {setting}=FILE" if not given else f"{setting} is given, but {task} is not in tasks"
                )
                raise ValueError(needs)
        if self.text is not None and not set(PROSE).intersection(self.chosen()):
            raise ValueError(f"text is given, but none of the tasks takes prose (those that do: {', '.join(PROSE)})")
        return self

    def chosen(self) -> tuple[str, ...]:
        """The tasks that are run, in RULER's order."""
        return tuple(task for task in self.tasks or TASKS if task not in self.skipped())

    def skipped(self) -> dict[str, str]:
        """The tasks that are left out, with the reason."""
        if self.tasks is not None:
            return {}
        return {
            task: f"no file: set {setting}=FILE" for task, setting in QA_FILES.items() if getattr(self, setting) is None
        }

    def retrieval(self, tokenizer: Any) -> RulerTasks:
        tasks, longest = self.chosen(), max(self.lengths)
        prose = None
        if set(PROSE).intersection(tasks):
            prose = default_text() if self.text is None else read_text(self.text, tokens=longest)
        return RulerTasks(
            tokenizer,
            tasks=tasks,
            lengths=self.lengths,
            trials=self.trials,
            seed=self.seed,
            chat_template=self.chat_template,
            prose=prose,
            words=vocabulary(self.words),
            squad=None if self.squad is None else read_squad(self.squad),
            hotpot=None if self.hotpot is None else read_hotpot(self.hotpot),
            skipped=self.skipped(),
        )

    @classmethod
    def summarise(cls, rows: list[dict[str, Any]], configuration: dict[str, Any], *, title: str | None = None) -> Any:
        from ropepatch.evaluation.summary import summarise_tasks

        order = [task for task in TASKS if any(row["task"] == task for row in rows)]
        summary = summarise_tasks(rows, configuration, order, title=title)
        return {**summary, "skipped": configuration.get("skipped", {})}

    @classmethod
    def table(cls, summary: Mapping[str, Any]) -> Table:
        from ropepatch.evaluation.ruler.report import table

        return table(summary)

    @classmethod
    def sections(
        cls, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], figures: Mapping[str, bytes]
    ) -> list[str]:
        from ropepatch.evaluation.ruler.report import sections

        return sections(summary, rows, figures)


class RulerTasks(Retrieval):
    """Builds RULER's prompts for one tokenizer.

    Args:
        tokenizer: the model's own, fast Hugging Face tokenizer.
        tasks: names, in the order in which they are built.
        lengths, trials: the grid of every task; prompts beyond its longest length cannot be built.
        seed: of everything that is drawn.
        chat_template: put prompts into the tokenizer's chat template, RULER's answer prefix as the beginning of the
            reply.
        prose: needed by the tasks of `PROSE`.
        words: of keys and word lists; None for our own.
        squad, hotpot: needed by qa_1 and qa_2.
        skipped: tasks that were left out, with the reason, for the record.

    Raises:
        PromptError: no chat template, a tokenizer without offsets, more trials than questions.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        tasks: Sequence[str],
        lengths: Sequence[int],
        trials: int = 1,
        seed: int = 0,
        chat_template: bool = False,
        prose: RealText | None = None,
        words: Vocabulary | None = None,
        squad: Documents | None = None,
        hotpot: Documents | None = None,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self.encoder = TextEncoder(tokenizer, chat_template=chat_template)
        self.seed = seed
        self._grid = tuple(tasks), lengths, trials
        self._skipped = dict(skipped or {})
        words = vocabulary("own") if words is None else words
        essay = None if prose is None else Essay(prose, max(*lengths, _LEAST_WORDS))
        files = {"qa_1": squad, "qa_2": hotpot}
        self._files = {"text": prose, "squad": squad, "hotpot": hotpot}
        self.tasks = {name: self._task(name, trials, words, essay, files) for name in tasks}
        self._tokens_per_unit: dict[str, float] = {}
        self._last_units: dict[tuple[str, int], int] = {}

    def places(self) -> list[Place]:
        tasks, lengths, trials = self._grid
        return [Place(task, n, None, trial) for task in tasks for n in lengths for trial in range(trials)]

    def inputs(self) -> dict[str, Any]:
        tasks, _, _ = self._grid
        digests = {name: None if file is None else file.identity for name, file in self._files.items()}
        return {"tasks": list(tasks), "skipped": self._skipped, **digests}

    def build(self, place: Place) -> Prompt:
        """The prompt of one trial. Its row has what the task adds, and `answer_at`: where it is known, the first tokens
        of the pieces that give the answer.

        Raises:
            PromptError: the length is too short (the message names the minimum), the filler too short, or the
                tokenizer cannot carry the task.
        """
        task = self.tasks[place.task]
        question = task.question(place.trial, place.length)
        tokens, draft, _ = self._fitted(task, question, place.length)
        answer = self._answer(task, question, draft)
        details = dict(question.details)
        if draft.marks:
            details["answer_at"] = [tokens.span(*draft.marks[name])[0] for name in sorted(draft.marks)]
        # A tokenizer that needs more tokens for the ideal reply than RULER allows gets them.
        most = max(task.most_tokens, len(answer))
        return Prompt(place, tokens.ids, answer, question.references, most, details)

    def enough(self, prompt: Prompt, text: str) -> bool:
        return self._score(prompt.place.task, prompt.expected, text) == 1

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """RULER's score of the reply; the row's `output` ends where it could not rise any more."""
        return Grade(postprocessed(text), self._score(prompt.place.task, prompt.expected, text))

    def _score(self, task: str, references: Sequence[str], text: str) -> float:
        match = string_match_part if self.tasks[task].any_reference else string_match_all
        return match(postprocessed(text), references)

    def _task(
        self,
        name: str,
        trials: int,
        words: Vocabulary,
        essay: Essay | None,
        files: Mapping[str, Documents | None],
    ) -> RulerTask:
        if name in KINDS:
            if name in PROSE and essay is None:
                raise PromptError(f"{name} needs a text")
            return Niah(name, seed=self.seed, words=words, essay=essay if name in PROSE else None)
        if name == "vt":
            return VariableTracking(seed=self.seed, encoder=self.encoder)
        if name == "cwe":
            return CommonWords(seed=self.seed, encoder=self.encoder, words=words)
        if name == "fwe":
            return FrequentWords(seed=self.seed)
        documents = files[name]
        if documents is None:
            raise PromptError(f"{name} needs the file {QA_FILES[name]}")
        return QuestionAnswering(name, seed=self.seed, documents=documents, trials=trials)

    def _fitted(self, task: RulerTask, question: Question, length: int) -> Fitted:
        def draft(more: int) -> Draft:
            return self._whole(question, question.least + more)

        def size(more: int) -> int:
            return len(self.encoder.encode(draft(more).text))

        minimum = size(0)
        if length < minimum:
            raise PromptError(
                f"the length is too short for {task.name}",
                given=length,
                allowed=f"at least {minimum} for this tokenizer",
            )
        most = question.most - question.least
        if task.name not in self._tokens_per_unit:
            probe = max(1, min(_PROBE_UNITS, most))
            self._tokens_per_unit[task.name] = max(0.1, (size(probe) - minimum) / probe) if most else 1.0
        each = self._tokens_per_unit[task.name]
        guess = self._last_units.get((task.filler, length), round((length - minimum) / each))
        fitted = fit(self.encoder, length, draft, guess=guess, most=most, tokens_per_unit=each)
        if fitted is None:
            if (reached := size(most)) < length:
                raise PromptError(
                    f"{task.filler} is too short for {task.name}", given=length, allowed=f"at most {reached} tokens"
                )
            raise PromptError(f"no prompt of {task.name} of exactly this length can be built", given=length)
        self._last_units[task.filler, length] = fitted.units
        return fitted

    def _whole(self, question: Question, units: int) -> Draft:
        """The prompt's text."""
        made = question.draft(units)
        text = self.encoder.turn(made.text, question.reply)
        at = text.index(made.text)
        marks = {name: (start + at, end + at) for name, (start, end) in made.marks.items()}
        return Draft(text, (made.spare[0] + at, made.spare[1] + at), marks)

    def _continued(self, text: str, ideal: str) -> Ids:
        forms = [text]
        if text[-1].isspace():
            # A prompt that ends with a space (vt's does): some tokenizers fuse it with what follows. The answer is then
            # what stands at the beginning of a line, or, where line ends are lost too, what follows the last word.
            forms += [f"{text.rstrip()}\n", text.rstrip()]
        for form in forms[:-1]:
            with suppress(PromptError):
                return self.encoder.answer(form, ideal)
        return self.encoder.answer(forms[-1], ideal)

    def _answer(self, task: RulerTask, question: Question, draft: Draft) -> Ids:
        answer = self._continued(draft.text, question.ideal)
        if self._score(task.name, question.references, self.encoder.decode(answer)) < 1:
            raise PromptError(f"the tokenizer cannot represent the answer of {task.name}", given=question.ideal[:80])
        return answer

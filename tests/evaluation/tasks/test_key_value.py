"""Key-value prompts: the paper's wording, valid JSON, exact length, as many pairs as fit, shared prefixes, scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from material import TOKENIZERS, decoded, every_prompt, flat, generated, teach, tokenizer
from small import model
from small import tokenizer as small_tokenizer

from ropepatch.errors import OptionError, PromptError
from ropepatch.evaluation import evaluate
from ropepatch.evaluation.suites import load_suite
from ropepatch.evaluation.task import Grid, Place
from ropepatch.evaluation.tasks.key_value import KeyValueTask
from ropepatch.evaluation.trie import common_prefix, trie_size, walk

# The paper's prompt, written out once more: the test must not take it from the code.
HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
TAIL = '\n\nKey: "{key}"\nCorresponding value:'
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


def _task(
    name: str = "byte_level", lengths: Any = (900,), depths: Any = (0.5,), trials: int = 1, **how: Any
) -> KeyValueTask:
    return KeyValueTask(tokenizer(name), Grid(lengths, depths, trials), **how)


def _pairs(content: str) -> tuple[list[tuple[str, str]], str]:
    """The pairs and the key that is asked for, out of a prompt without white space."""
    found = re.fullmatch(re.escape(flat(HEAD)) + r'(\{.*\})key:"(.*)"correspondingvalue:', content)
    assert found
    return json.loads(found[1], object_pairs_hook=list), found[2]


@given(
    name=st.sampled_from(TOKENIZERS),
    length=st.integers(250, 2500),
    depth=st.floats(0, 1),
    trial=st.integers(0, 20),
    in_place=st.booleans(),
)
@settings(max_examples=80)
def test_prompts_are_exact_and_json(name: str, length: int, depth: float, trial: int, in_place: bool) -> None:
    try:
        task = _task(name, lengths=[length], depths=[depth], trials=1, in_place=in_place)
        prompt = task.build(Place("key_value", length, depth, trial))
    except PromptError as error:
        assume("too short" not in str(error))
        raise
    assert len(prompt.ids) == prompt.place.length == length
    pairs, key = _pairs(flat(decoded(name, prompt.ids)))
    assert len(pairs) == prompt.details["pairs"]
    assert len({one for pair in pairs for one in pair}) == 2 * len(pairs)
    assert pairs.index((key, prompt.expected)) == int(depth * (len(pairs) - 1) + 0.5)
    # Whole UUIDs, but for the digits at the end of the last value that is not asked for.
    *others, last = [pair for pair in pairs if pair[0] != key]
    assert all(re.fullmatch(UUID, one) for pair in [*others, (key, prompt.expected)] for one in pair)
    assert re.fullmatch(UUID, last[0]) and re.fullmatch(f"{UUID}[0-9a-f]*", last[1])
    span = prompt.ids[prompt.details["pair_start"] : prompt.details["pair_end"]]
    assert f'"{key}":"{prompt.expected}"' in flat(decoded(name, span))
    assert flat(decoded(name, prompt.answer)) == f'"{prompt.expected}"'


def test_wording_is_the_papers() -> None:
    prompt = _task().build(Place("key_value", 900, 0.5, 0))
    text = decoded("byte_level", prompt.ids)
    pairs, key = _pairs(flat(text))
    body = ",\n ".join(f'"{one}": "{other}"' for one, other in pairs)
    assert text == f"{HEAD}{{{body}}}{TAIL.format(key=key)}"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_as_many_pairs_as_fit(name: str) -> None:
    """What is left over is less than a pair: one more length after the other, up to the next pair and beyond."""
    task = _task(name, lengths=[700])
    one, rest = 0, []
    for length in range(700, 820, 4):
        prompt = task.build(Place("key_value", length, 0.0, 0))
        one = prompt.details["pair_end"] - prompt.details["pair_start"]
        pairs, _ = _pairs(flat(decoded(name, prompt.ids)))
        rest.append((len(pairs), len(pairs[-1][1]) - 36))
    assert [pairs for pairs, _ in rest] == sorted(pairs for pairs, _ in rest)
    assert rest[-1][0] - rest[0][0] in (1, 2, 3)
    # A hexadecimal digit is at most one token, a letter of a pair at most two digits' worth.
    assert max(digits for _, digits in rest) <= 3 * one


def test_depth_moves_the_pair() -> None:
    task = _task(lengths=[4000])
    starts = [task.build(Place("key_value", 4000, d, 0)).details["pair_start"] for d in (0, 0.25, 0.5, 0.75, 1)]
    room = starts[-1] - starts[0]
    assert [(start - starts[0]) / room for start in starts] == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=0.03)


def test_prefixes_are_shared() -> None:
    grid = _task(lengths=[1500, 2000], depths=[0.9, 1.0], trials=3)
    prompts = every_prompt(grid)
    assert trie_size(walk([prompt.ids for prompt in prompts])) < 0.4 * sum(len(prompt.ids) for prompt in prompts)
    short, long = (grid.build(Place("key_value", n, 0.9, 1)) for n in (1500, 2000))
    assert common_prefix(short.ids, long.ids) >= short.details["pair_start"] - 1
    assert short.expected == long.expected
    short, long = (grid.build(Place("key_value", n, 0.0, 1)) for n in (1500, 2000))
    assert common_prefix(short.ids, long.ids) > 1200


def test_depths_ask_one_object_in_place() -> None:
    """Depths differ in the question, and in the digits that make up for its tokens; trials in their objects."""
    depths = [0, 0.25, 0.5, 0.75, 1]
    task = _task(lengths=[3000], depths=depths, trials=2, in_place=True)
    contents = {
        (depth, trial): _pairs(flat(decoded("byte_level", task.build(Place("key_value", 3000, depth, trial)).ids)))
        for depth in depths
        for trial in (0, 1)
    }
    for trial in (0, 1):
        objects = [[key for key, _ in contents[depth, trial][0]] for depth in depths]
        fewest = min(map(len, objects))
        assert all(keys[:fewest] == objects[0][:fewest] and len(keys) <= fewest + 1 for keys in objects)
        assert len({contents[depth, trial][1] for depth in depths}) == len(depths)
    assert not set(contents[0, 0][0]) & set(contents[0, 1][0])
    prompts = every_prompt(task)
    total = sum(len(prompt.ids) for prompt in prompts)
    assert total / trie_size(walk([prompt.ids for prompt in prompts])) > 3.5  # of 5, the number of depths


@pytest.mark.parametrize("in_place", [False, True])
def test_building_twice_gives_the_same_prompt(in_place: bool) -> None:
    grid: dict[str, Any] = {"lengths": [700, 900], "depths": [0.2, 0.8], "trials": 2, "in_place": in_place}
    other = {prompt.place: prompt for prompt in reversed(every_prompt(_task("fused_newlines", **grid)))}
    longer = _task("fused_newlines", **{**grid, "lengths": [700, 900, 2000]})
    for prompt in every_prompt(_task("fused_newlines", **grid)):
        assert prompt.ids.tolist() == other[prompt.place].ids.tolist() == longer.build(prompt.place).ids.tolist()


def test_contents_are_frozen() -> None:
    # Frozen: a change would silently make old and new results incomparable.
    prompt = _task().build(Place("key_value", 900, 0.0, 0))
    pairs, key = _pairs(flat(decoded("byte_level", prompt.ids)))
    assert (key, prompt.expected) == ("25b0dbd2-bfc2-42b1-9a69-884549e2099a", "968cc4ad-2ffa-436f-ad52-bd62d0be1006")
    assert pairs[1][0] == "555dbe88-e431-4f77-a5e6-8f68afecfc94"


@pytest.mark.parametrize(
    ("text", "correct", "exact"),
    [
        (' "{v}"', 1, 1),
        (" {v}", 1, 1),
        (' "{v}"\nKey: "x"', 1, 1),
        (" It is {V}, I think", 1, 0),
        (' "{v}0"', 1, 0),
        (' "{w}"', 0, 0),
        ("", 0, 0),
    ],
)
def test_scores(text: str, correct: int, exact: int) -> None:
    task = _task()
    prompt = task.build(Place("key_value", 900, 0.5, 0))
    value = str(prompt.expected)
    given = text.replace("{v}", value).replace("{V}", value.upper()).replace("{w}", value[:-1])
    grade = task.grade(prompt, given)
    assert (grade.correct, grade.details, task.enough(prompt, given)) == (correct, {"exact": exact}, bool(correct))


def test_chat_template_is_counted() -> None:
    prompt = _task("byte_level_bos", chat_template=True).build(Place("key_value", 900, 0.5, 0))
    text = tokenizer("byte_level_bos").decode(prompt.ids.tolist())
    assert len(prompt.ids) == 900
    assert text.startswith(f"<s><|user|>\n{HEAD}")
    assert text.endswith('"<|end|>\n<|assistant|>\nCorresponding value:')


def test_too_short_names_the_minimum() -> None:
    with pytest.raises(PromptError, match="at least \\d+") as caught:
        _task(lengths=[20, 900], trials=4)
    minimum = int(str(caught.value.allowed).split()[-1])
    prompts = every_prompt(_task(lengths=[minimum], trials=4))
    assert [(len(prompt.ids), prompt.details["pairs"]) for prompt in prompts] == [(minimum, 2)] * 4
    with pytest.raises(PromptError, match="too short"):
        _task(lengths=[minimum - 1], trials=4)


@pytest.mark.parametrize("depth", [None, -0.01, 1.01, float("nan")])
def test_depth_out_of_range(depth: float | None) -> None:
    with pytest.raises(PromptError, match="Depth"):
        _task().build(Place("key_value", 900, depth, 0))


@pytest.mark.parametrize("name", ["letters_only", "word_piece", "metaspace"])
def test_tokenizer_that_lacks_characters(name: str) -> None:
    """These of `small` know the passkey's characters only."""
    with pytest.raises(PromptError, match="cannot represent"):
        KeyValueTask(small_tokenizer(name), grid=Grid([1200]))


@pytest.mark.parametrize("options", [{"depths": []}, {"pairs": 10}, {"trials": 0}])
def test_settings_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        load_suite("key_value", options)


def test_rows_are_what_plain_generation_gives() -> None:
    net = model("llama")
    options: dict[str, Any] = {"lengths": [400], "depths": [0.5], "trials": 2}
    result = evaluate(net, tokenizer("byte_level"), "key_value", progress=False, **options)
    task = load_suite("key_value", options).retrieval(tokenizer("byte_level"))
    assert [Place.of(row) for row in result.trials] == task.places()
    for row in result.trials:
        prompt = task.build(Place.of(row))
        assert row["output"] == generated(net, "byte_level", prompt).strip()
        assert row["correct"] == int(str(prompt.expected) in row["output"])
        assert row["pairs"] == prompt.details["pairs"]


def test_a_run_in_a_folder_is_resumed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net = model("llama")
    options: dict[str, Any] = {"lengths": [500, 700], "depths": [0, 1], "trials": 2}
    teach(net, every_prompt(load_suite("key_value", options).retrieval(tokenizer("byte_level"))))
    options |= {"output": tmp_path / "run", "progress": False}
    whole = evaluate(net, tokenizer("byte_level"), "key_value", **options)
    assert all(row["correct"] == row["exact"] == row["forced"] == 1 for row in whole.trials)
    results = tmp_path / "run" / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join(lines[:3]) + lines[3][:40])
    again = evaluate(net, tokenizer("byte_level"), "key_value", **options)
    assert again.sum_of_prompts < whole.sum_of_prompts
    assert [(Place.of(row), row["output"]) for row in again.trials] == [
        (Place.of(row), row["output"]) for row in whole.trials
    ]

"""Recipes from YAML: numbers, overrides, every problem at once with its path, and the way back to YAML."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ropepatch.errors import OptionError, RecordError, RopepatchError, UnknownNameError, UsageError
from ropepatch.training._yaml import parse, write
from ropepatch.training.reading import default_output, dump, load_recipe

WHOLE = """
model: {name: some/model}
data:
  length: 128
  sources: [{kind: files, path: stdlib}, {kind: synthetic, weight: 3}]
train: {max_steps: 10, learning_rate: 1e-4}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(WHOLE)
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(OptionError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# -- YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E3", 1000.0), ("2.5e5", 2.5e5), ("-1.e+2", -100.0), (".5e1", 5.0), ("1e", "1e"),
        ("e4", "e4"), ("4", 4), ("4.0", 4.0), ("'1e-4'", "1e-4"), ("1e-4x", "1e-4x"), ("null", None), ("true", True),
    ],
)  # fmt: skip
def test_numbers_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    assert parse(text) == value
    assert type(parse(text)) is type(value)


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(["1e-4", "yes"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(PLAIN)
def test_what_is_written_is_read_back(document: Any) -> None:
    assert parse(write(document)) == document


def test_an_alias_is_a_copy(recipe: Path) -> None:
    recipe.write_text(WHOLE + "eval:\n  runs: [&a {suite: passkey, settings: {trials: 1}}, *a]\n")
    runs = load_recipe(recipe, ["eval.runs.0.settings.trials=9"]).eval.runs
    assert [run.settings["trials"] for run in runs] == [9, 1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  name: [a\ndata: 3", "line 3, column 5"),
        ("train: {}\nmodel: {}\ntrain: {}", "line 3, column 1: the name 'train' is given twice"),
        ("a: 2026-13-01", "month must be in"),
        ("[" * 700, "recursion"),
        ("a: &a [*a]", "recursion"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("- a", "not a mapping of sections"),
        ("", "not a mapping of sections"),
    ],
)
def test_broken_yaml_names_its_place(recipe: Path, text: str, said: str) -> None:
    recipe.write_text(text)
    with pytest.raises(RecordError, match="mine.yaml") as caught:
        load_recipe(recipe)
    assert said in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match="not UTF-8"):
        load_recipe(binary)
    with pytest.raises(UsageError, match="No recipe file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(UnknownNameError, match="Unknown recipe 'smol'"):
        load_recipe("smol")


# -- settings


def test_a_recipe_is_read_and_its_defaults_filled(recipe: Path) -> None:
    read = load_recipe(recipe)
    assert read.train.learning_rate == 1e-4
    assert read.train.optim == "adamw_torch"
    assert read.lora is not None
    assert [source.kind for source in read.data.sources] == ["files", "synthetic"]


def test_every_problem_is_told_at_once(recipe: Path) -> None:
    recipe.write_text(
        """
model: {name: 3, dtyp: float32, quantization: nf5}
lora: {r: 0, lora_dropout: 1, target_modules: 7}
data:
  length: zero
  sources: [{kind: filez, path: x}, {kind: files, pth: x}, {path: z}, 3]
train: {learning_rate: .nan, stages: [{steps: 1}], positions: {kind: posse}, report_to: wandb}
trian: {}
"""
    )
    message = refused(recipe, "data.sources.7.weight=1", "nonsense", "train.early_stop.0.x=1")
    for said in (
        "20 problems",
        "data.sources is a list of 4: take an index from 0 to 3 (given '7')",
        "'nonsense' is no override",
        "train.early_stop is not in the recipe",
        "model.name must be text (given 3)",
        "model.dtyp: there is no such setting, did you mean 'dtype'",
        "model.quantization must be 'nf4' or 'int8' or null (given 'nf5')",
        "lora.r must be a whole number >= 1 (given 0)",
        "lora.lora_dropout must be a finite number >= 0 and < 1 (given 1)",
        "lora.target_modules must be a list, each text or 'attention' or 'all-linear' (given 7)",
        "data.length must be a whole number >= 1 (given 'zero')",
        "data.sources.0.kind must be one of 'files', 'dataset', 'chat', 'synthetic' (given 'filez'",
        "data.sources.1.path is missing (it must be text)",
        "data.sources.1.pth: there is no such setting, did you mean 'path'",
        "data.sources.2.kind must be one of 'files', 'dataset', 'chat', 'synthetic'",
        "data.sources.3 must be a mapping with kind, path",
        "train.stages.0.length is missing (it must be a whole number >= 1)",
        "train.learning_rate must be a finite number > 0 (given nan)",
        "train.positions.kind must be 'pose' or 'random' (given 'posse')",
        "train.report_to must be a list, each text (given 'wandb')",
        "trian: there is no such setting, did you mean 'train'",
    ):
        assert said in message, said


NAMES = [
    "model",
    "name",
    "patch",
    "options",
    "lora",
    "r",
    "data",
    "sources",
    "kind",
    "files",
    "train",
    "stages",
    "runs",
]
LEAVES = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.sampled_from([*NAMES, "1e-4", ""])
DOCUMENTS = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.integers(0, 2), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(
    st.dictionaries(st.sampled_from(NAMES), DOCUMENTS),
    st.lists(
        st.sampled_from(["model.name=x", "data.sources.0.kind=files", "a.0.b=[", "=", "train=3", "eval.runs.1=x"])
    ),
)
def test_no_document_gets_anything_but_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any], overrides: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(document))
    with suppress(RopepatchError):
        load_recipe(path, overrides)


# -- overrides


def test_overrides_reach_into_sections_and_lists(recipe: Path) -> None:
    read = load_recipe(
        recipe,
        [
            "lora.r=8",
            "patch.method=yarn",
            "patch.options={factor: 4}",
            "patch.options.beta_fast=16.0",
            "data.sources.1.weight=2",
            "train.stages=[{steps: 3, length: 64}, {steps: 7, length: 128}]",
            "train.stages.1.steps=9",
            "train.learning_rate=5e-5",
            "eval.before=false",
        ],
    )
    assert read.lora is not None and read.lora.r == 8
    assert read.patch is not None and read.patch.options == {"factor": 4, "beta_fast": 16.0}
    assert read.data.sources[1].weight == 2
    assert read.train.stages is not None and [stage.steps for stage in read.train.stages] == [3, 9]
    assert read.train.learning_rate == 5e-5
    assert not read.eval.before


def test_null_takes_a_section_away(recipe: Path) -> None:
    assert load_recipe(recipe, ["lora=null"]).lora is None


def test_the_value_may_hold_an_equals_sign(recipe: Path) -> None:
    assert load_recipe(recipe, ["description=a=b"]).description == "a=b"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("lora.rank=8", "lora.rank: there is no such setting"),
        ("lora.us_dora=true", "did you mean 'use_dora'"),
        ("lora.r=1e3", "lora.r must be a whole number >= 1 (given 1000.0)"),
        ("lora.r=true", "given True"),
        ("model.name.x=1", "model.name is 'some/model', which has no 'x'"),
        ("data.sources.x.weight=1", "take an index from 0 to 1 (given 'x')"),
        ("data.sources.2={kind: files}", "take an index from 0 to 1 (given '2')"),
        ("train.stages.0.steps=1", "train.stages is not in the recipe: give the whole list"),
        ("train.max_steps=[", "the value '[' is not YAML (line 1, column 2"),
        ("train..max_steps=1", "is no override"),
        ("=1", "is no override"),
        ("train.max_steps", "is no override"),
        ("data.sources=[]", "data.sources must not be empty"),
    ],
)
def test_refused_overrides(recipe: Path, override: str, said: str) -> None:
    assert said in refused(recipe, override)


def test_an_override_twice_is_refused(recipe: Path) -> None:
    assert "lora.r is given twice" in refused(recipe, "lora.r=4", "lora.r=8")


# -- and back


def test_a_dumped_recipe_reads_back_equal(recipe: Path, tmp_path: Path) -> None:
    read = load_recipe(
        recipe, ["patch.method=yarn", "patch.options={factor: 4.0, words: ['1e-4', 'null', é]}", "train.stages=[]"]
    )
    again = tmp_path / "again.yaml"
    again.write_text(dump(read), encoding="utf-8")
    assert load_recipe(again) == read
    assert "lora_alpha" in dump(read), "defaults are written out"


def test_default_output() -> None:
    assert default_output("smollm2-135m/yarn") == Path("runs/smollm2-135m/yarn")
    assert default_output("smollm2-135m/yarn.yaml") == Path("runs/smollm2-135m/yarn")
    assert default_output("here/mine.yaml") == Path("runs/mine")

"""The schema: strict types, frozen sections, and every field documented or plain."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from ropepatch.training import recipe as schema
from ropepatch.training._problems import allowed
from ropepatch.training.recipe import Recipe, Section

SECTIONS = [value for value in vars(schema).values() if isinstance(value, type) and issubclass(value, Section)]
LEAST: dict[str, Any] = {
    "model": {"name": "x"},
    "data": {"length": 8, "sources": [{"kind": "files", "path": "x"}]},
    "train": {},
}


def test_the_least_recipe() -> None:
    read = Recipe.model_validate(LEAST)
    assert read.patch is None
    assert read.train.batch_size == 8


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_sections_are_strict_and_frozen(section: type[BaseModel]) -> None:
    assert section.model_config["extra"] == "forbid"
    assert section.model_config["strict"]
    assert section.model_config["frozen"]
    assert section.__doc__


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_can_be_put_into_words(section: type[BaseModel]) -> None:
    for name, field in section.model_fields.items():
        words = allowed(field)
        assert words, name
        assert "Annotated" not in words and "class" not in words, words


@pytest.mark.parametrize(
    ("section", "value"),
    [("train", {"max_steps": "10"}), ("train", {"max_steps": True}), ("data", {"length": 8.0, "sources": []})],
)
def test_text_and_truth_are_no_numbers(section: str, value: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Recipe.model_validate({**LEAST, section: value})

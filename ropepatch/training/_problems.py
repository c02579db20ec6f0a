"""What pydantic finds wrong in a recipe, as lines that name the path, the value given and what is allowed."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ropepatch.errors import did_you_mean

_LONGEST = 80


def describe(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """A line for each wrong place of the document, in its order: "lora.r must be a whole number >= 1 (given 0)"."""
    lines: dict[str, str] = {}
    for details in error.errors(include_url=False):
        path, field, owners = _find(details["loc"], schema)
        # Each branch of a union complains: the first line tells of all of them.
        lines.setdefault(path, _line(path, field, owners, details))
    return list(lines.values())


def _line(path: str, field: Any, owners: Sequence[type[BaseModel]], details: Any) -> str:
    given = f" (given {short(details['input'])})"
    match details["type"]:
        case "extra_forbidden":
            names = sorted({name for owner in owners for name in owner.model_fields})
            near = guess(path.rpartition(".")[2], names)
            return f"{path}: there is no such setting" + (near or f" (there are {', '.join(names)})")
        case "missing":
            return f"{path} is missing (it must be {allowed(field)})"
        case "union_tag_not_found" | "union_tag_invalid":
            kinds = details["ctx"].get("expected_tags") or ", ".join(map(repr, _tags(field)))
            tag = details["ctx"].get("tag")
            given = f" (given {tag!r}{guess(tag, _tags(field))})" if tag else ""
            return f"{path}.kind must be one of {kinds}{given}"
        case "too_short":
            return f"{path} must not be empty"
    return f"{path or 'the recipe'} must be {allowed(field)}{given}"


def _find(place: Sequence[Any], schema: type[BaseModel]) -> tuple[str, Any, list[type[BaseModel]]]:
    """The path in the document of pydantic's `loc`, the type expected there, and the sections that hold it.

    pydantic also names branches of unions in `loc`: tags of sources, and types. The document has no such parts.
    """
    path: list[str] = []
    here: Any = schema
    owners: list[type[BaseModel]] = []
    for part in place:
        branches = list(_branches(here))
        models = [branch for branch in branches if isinstance(branch, type) and issubclass(branch, BaseModel)]
        lists = [branch for branch in branches if typing.get_origin(branch) is list]
        if isinstance(part, int) and lists:
            here = typing.get_args(lists[0])[0]
        elif fields := [model.model_fields[part] for model in models if part in model.model_fields]:
            owners, here = models, fields[0]
        elif tagged := [model for model in models if part in _tags(model)]:
            here = tagged[0]
            continue
        elif models:
            owners, here = models, None
        else:  # a branch of a union, or a name in a free mapping
            continue
        path.append(str(part))
    return ".".join(path), here, owners


def allowed(expected: Any) -> str:
    """What may stand in a place, in words: "a whole number >= 1"."""
    words = []
    for branch in _branches(expected):
        origin = typing.get_origin(branch)
        if branch is type(None):
            words.append("null")
        elif isinstance(branch, type) and issubclass(branch, BaseModel):
            words.append("a mapping with " + ", ".join(branch.model_fields))
        elif origin is list:
            words.append(f"a list, each {allowed(typing.get_args(branch)[0])}")
        elif origin is dict:
            words.append("a mapping")
        else:
            # Deferred: the module loads torch.
            from ropepatch.methods._options import allowed_values

            words.append(allowed_values(FieldInfo.from_annotation(branch)))
    return " or ".join(words)


def _branches(expected: Any) -> Iterable[Any]:
    """The types that a field or annotation is made of, with bounds where they have some, without unions."""
    if isinstance(expected, FieldInfo):
        bounds = tuple(expected.metadata)
        inner = list(_branches(expected.annotation))
        return [typing.Annotated[inner[0], *bounds], *inner[1:]] if bounds and _plain(inner[0]) else inner
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is typing.Annotated:
        return [expected] if _plain(arguments[0]) else _branches(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return [branch for argument in arguments for branch in _branches(argument)]
    return [] if expected is None else [expected]


def _plain(annotation: Any) -> bool:
    return annotation in (int, float, str, bool)


def _tags(expected: Any) -> list[str]:
    """The values of `kind` that tell sources apart."""
    models = (branch for branch in _branches(expected) if isinstance(branch, type) and issubclass(branch, BaseModel))
    fields = (model.model_fields.get("kind") for model in models)
    return [tag for field in fields if field is not None for tag in typing.get_args(field.annotation)]


def guess(given: str, names: Iterable[str]) -> str:
    """ ", did you mean 'x'" for the names nearest to `given`, or "" when none is near."""
    near = did_you_mean(given, names)
    return f", {near.removesuffix('?')}" if near else ""


def short(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."

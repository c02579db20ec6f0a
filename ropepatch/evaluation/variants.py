"""The variants of a matrix: a model unpatched, and under patches; read from YAML or plain data and checked by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ropepatch.errors import OptionError, RecordError

UNPATCHED = "unpatched"
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,99}")


class Variant(BaseModel):
    """One way to run a model.

    Attributes:
        name: of its folder; made from method and options where it is not given.
        method: of the patch; None for the model as it is.
        options: what `ropepatch.patch` takes besides: the method's options, `base`, `layers`, ...
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    method: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)


def load_matrix(name: str | Path) -> list[Variant]:
    """The variants of a matrix file: a YAML list of what `parse_variants` takes.

    Args:
        name: a shipped matrix's name, or the path of a YAML file.

    Raises:
        UnknownNameError, UsageError: no such matrix or file.
        RecordError: the file cannot be read or is no YAML list.
        UnknownNameError, OptionError: as `parse_variants`.
    """
    import yaml

    from ropepatch._data import find_data

    file = find_data("matrices", str(name))
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecordError(f"the matrix {file} cannot be read: {error}") from error
    if not isinstance(content, list):
        raise RecordError(f"the matrix {file} is not a list of variants", given=type(content).__name__)
    return parse_variants(content)


def parse_variants(items: Sequence[str | Mapping[str, Any] | Variant]) -> list[Variant]:
    """Variants, checked as far as can be without a model.

    Args:
        items: each "unpatched", the name of a method, a mapping with `method`, `options` and `name`, or a `Variant`.

    Raises:
        UnknownNameError: no such method.
        OptionError: wrong options of a method, names that are no folder names, the same name twice, or no variant.
    """
    if not items:
        raise OptionError("a matrix has at least one variant", hint="for example: [unpatched, rerope]")
    variants = [_variant(item, number) for number, item in enumerate(items, start=1)]
    seen: dict[str, Variant] = {}
    for variant in variants:
        if not FOLDER_NAME.fullmatch(variant.name):
            raise OptionError(
                "a variant's name is the name of its folder", given=variant.name, allowed="letters, digits and ._+=-"
            )
        # Some file systems do not tell capitals apart.
        if variant.name.casefold() in seen:
            raise OptionError("two variants have the same name", given=variant.name, hint="give one of them a `name`")
        seen[variant.name.casefold()] = variant
        _check_patch(variant)
    return variants


def _variant(item: Any, number: int) -> Variant:
    if isinstance(item, Variant):
        return item
    content = {"method": item} if isinstance(item, str) else item
    if not isinstance(content, Mapping):
        raise OptionError(
            f"variant {number} is no variant", given=item, allowed="unpatched, a method, or a mapping with `method`"
        )
    content = dict(content)
    if content.get("method") is None and "name" not in content:
        raise OptionError(f"variant {number} names no method", given=item, hint=f"the model as it is: {UNPATCHED}")
    if content.get("method") == UNPATCHED:
        content["method"] = None
    content.setdefault("name", UNPATCHED if content["method"] is None else _default_name(content))
    try:
        return Variant.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors())
        raise OptionError(f"variant {number} is wrong: {problems}", given=item) from error


def _default_name(content: Mapping[str, Any]) -> str:
    """The method and its options: "yarn-2", "lm_infinite-truncate-false"."""
    options = content.get("options") or {}
    words = [str(content["method"]), *(_words(options) if isinstance(options, Mapping) else ())]
    return re.sub(r"[^A-Za-z0-9._+=-]+", "_", "-".join(words))


def _words(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if name not in ("factor", "method"):
            yield str(name)
        if isinstance(value, Mapping):
            yield from _words(value)
        elif isinstance(value, (list, tuple)):
            yield "_".join(map(_word, value))
        else:
            yield _word(value)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _check_patch(variant: Variant) -> None:
    """Refuse an unknown method and wrong options of it, before any model is loaded."""
    from ropepatch.api import patch
    from ropepatch.methods._base import METHODS
    from ropepatch.methods._options import parse_options

    if variant.method is None:
        if variant.options:
            raise OptionError(f"variant {variant.name!r} has options but no method", given=variant.options)
        return
    keywords = {name for name, p in inspect.signature(patch).parameters.items() if p.kind is p.KEYWORD_ONLY}
    entry = METHODS.get(variant.method)
    for name in ("model", "method"):
        if name in variant.options:
            raise OptionError(f"{name!r} is not an option of a method", given=variant.options)
    parse_options(entry, {name: value for name, value in variant.options.items() if name not in keywords})
    base = variant.options.get("base")
    if isinstance(base, Mapping):
        base = base.get("method")
    if base is not None:
        METHODS.get(base)

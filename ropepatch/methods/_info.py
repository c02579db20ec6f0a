"""Option schemas as plain tables, for `ropepatch.methods()` and the command line."""

from __future__ import annotations

import types
import typing
from typing import Any

from ropepatch.methods._base import MethodOptions


def option_table(schema: type[MethodOptions]) -> tuple[dict[str, Any], ...]:
    """One dict an option: name, type, default, required, help."""
    return tuple(
        {
            "name": name,
            "type": _type_name(field.annotation),
            "default": None if field.is_required() else field.get_default(call_default_factory=True),
            "required": field.is_required(),
            "help": field.description or "",
        }
        for name, field in schema.model_fields.items()
    )


def _type_name(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(part) for part in typing.get_args(annotation) if part is not type(None))
    if origin is typing.Literal:
        return " | ".join(repr(value) for value in typing.get_args(annotation))
    if origin is typing.Annotated:
        return _type_name(typing.get_args(annotation)[0])
    if origin is not None:
        inside = ", ".join(_type_name(part) for part in typing.get_args(annotation) if part is not Ellipsis)
        return f"{origin.__name__} of {inside}" if inside else str(origin.__name__)
    return str(getattr(annotation, "__name__", annotation))

"""YAML as people write it: `1e-4` is a number, and a name given twice is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml

# PyYAML follows YAML 1.1, where an exponent needs a point and a sign: 1e-4 and 1.5e5 would be text. These are the
# numbers with an exponent of YAML 1.2 (section 10.3.2) that it leaves out.
_EXPONENT = re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
_FLOAT = "tag:yaml.org,2002:float"


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # PyYAML would keep the last of two without a word.
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the name {key.value!r} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


# Line ends of Unicode, which PyYAML reads as spaces again unless they are written as escapes.
_LINE_ENDS = "\r\x85\u2028\u2029"


class _Dumper(yaml.SafeDumper):
    """Knows the same numbers, so that the text "1e-4" is written in quotes."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if any(end in data for end in _LINE_ENDS) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)

for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_FLOAT, _EXPONENT, list("-+.0123456789"))


def parse(text: str) -> Any:
    """The one document in `text`.

    Raises:
        yaml.YAMLError: no YAML, or a name twice in one mapping.
    """
    try:
        return _tree(yaml.load(text, Loader=_Loader))  # a SafeLoader: no Python objects
    except (ValueError, RecursionError) as error:  # a date such as 2026-13-01; lists in lists without end
        raise yaml.YAMLError(str(error)) from error


def _tree(value: Any) -> Any:
    """`value` without sharing: what an alias repeats is a copy, which an override may change alone."""
    if isinstance(value, dict):
        return {key: _tree(item) for key, item in value.items()}
    return [_tree(item) for item in value] if isinstance(value, list) else value


def write(document: Any) -> str:
    """`document` (plain data) as YAML in the given order; `parse` reads back an equal one."""
    return str(yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def place(error: yaml.YAMLError) -> str:
    """What is wrong, with line and column where they are known, both counted from 1."""
    mark = getattr(error, "problem_mark", None)
    # A character that YAML does not allow comes without a mark and with two lines of text.
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    context = getattr(error, "context", None)
    said = f"{problem} ({context})" if context else problem
    return said if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: {said}"

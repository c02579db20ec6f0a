"""Whether a generated text gives an answer. Case and white space never count: tokenizers change both."""

from __future__ import annotations

from collections.abc import Sequence

_CLOSING = ".,;!?。！？\"'”’)"


def squeezed(text: str) -> str:
    """The text in lower case, without any white space."""
    return "".join(text.split()).casefold()


def found(answers: Sequence[str], text: str) -> list[int]:
    """1 for each answer that the text contains, 0 for the others."""
    content = squeezed(text)
    return [int(squeezed(answer) in content) for answer in answers]


def is_exactly(answer: str, text: str) -> bool:
    """Whether the text's first line is the answer; a closing mark, and what may follow it, are allowed."""
    lines = text.strip().splitlines()
    line, wanted = squeezed(lines[0] if lines else ""), squeezed(answer)
    rest = line[len(wanted) :]
    return line.startswith(wanted) and (not rest or rest[0] in _CLOSING)

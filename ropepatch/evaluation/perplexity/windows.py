"""Sliding windows over a document: which tokens a model sees, and which of them count."""

from __future__ import annotations

from typing import NamedTuple


class Window(NamedTuple):
    """One input of the model, in indices of the document's tokens.

    Attributes:
        start: the first token that the model sees.
        first: the first token that is scored.
        end: one past the last token that is scored.
    """

    start: int
    first: int
    end: int


def windows(tokens: int, window: int, stride: int, *, prefix: int = 0) -> list[Window]:
    """Windows that start every `stride` tokens; each scores what no earlier one scored.

    The overlapping evaluation of Press et al. (Shortformer, arXiv 2012.15832; ALiBi, arXiv 2108.12409, appendix B).
    Every token is scored exactly once, but for the document's first where there is no prefix. Behind the first window
    each has at least `window - stride` tokens of context. Where that is none (a stride of the whole window and no
    prefix), the window reaches one token further back, so that its first token has one token to go by.

    Args:
        tokens: length of the document.
        window: the most tokens that the model sees at once, prefix included.
        stride: tokens between the starts of two windows, 1 to `window - prefix`.
        prefix: tokens that stand in front of every window and are not the document's: 1 for a BOS token, or 0.

    Returns:
        The windows, in order; those that would score nothing are left out.
    """
    found: list[Window] = []
    scored = 1 - prefix
    for start in range(0, tokens, stride):
        end = min(start + window - prefix, tokens)
        if end > scored:
            lonely = start == scored and not prefix
            found.append(Window(start - lonely, scored, end))
            scored = end
        if end == tokens:
            break
    return found

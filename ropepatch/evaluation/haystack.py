"""The text that a key is hidden in, with the borders at which it may be cut."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ropepatch.errors import PromptError
from ropepatch.evaluation.prompt import TextEncoder

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The repeated filler of the passkey benchmark (Landmark Attention, arXiv 2305.16300)."""

# A sentence ends at its closing mark, quotes and brackets included, before white space (none after CJK marks), or at
# the end of a paragraph.
_SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*(?=\s|\Z)|[。！？]["'”’)\]」』]*|\S(?=\s*\n\s*\n)""")
_WORD_END = re.compile(r"\S(?=\s|\Z)")

NEAR = 64
"""Tokens within which a sentence border is looked for; a text without sentences is cut at a word, then at a token."""


@dataclass(frozen=True)
class RealText:
    """A user's own text.

    Attributes:
        text: the content; of a folder, its .txt files in the order of their paths, joined by a blank line.
        path: where it came from.
        sha256: hex digest of the text in UTF-8.
    """

    text: str
    path: str
    sha256: str

    @property
    def identity(self) -> dict[str, str]:
        """What a run's configuration says of it."""
        return {"path": self.path, "sha256": self.sha256}


def read_text(path: str | Path) -> RealText:
    """Read a text file, or every .txt file in a folder and below it.

    Raises:
        PromptError: missing, unreadable, empty, or not UTF-8 text.
    """
    path = Path(path)
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise PromptError(f"the folder {path} holds no .txt file")
    text = "\n\n".join(filter(None, (_read_file(file) for file in files)))
    if not text:
        raise PromptError(f"the text {path} is empty")
    return RealText(text, str(path), hashlib.sha256(text.encode()).hexdigest())


def _read_file(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(f"cannot read the text {path}: {error.strerror or error}") from error
    try:
        if b"\0" in data:
            raise ValueError("it holds zero bytes")
        text = data.decode("utf-8-sig")
    except ValueError as error:
        raise PromptError(f"{path} is not UTF-8 text: {error}") from error
    return text.replace("\r\n", "\n").strip()


class Haystack:
    """A filler text at least `tokens` tokens long, cut only at borders.

    Positions are characters in `text`. Token counts are those of the text standing alone: near a cut they may be off
    by a token in the finished prompt, which is why prompts are measured, not computed.

    Args:
        encoder: the model's tokenizer.
        tokens: how many tokens of filler the longest prompt may need.
        source: the user's text, or None for the benchmark's repeated sentences.

    Raises:
        PromptError: the text is shorter than that.
    """

    def __init__(self, encoder: TextEncoder, tokens: int, source: RealText | None = None) -> None:
        self.source = source
        self.text, self._ends = self._long_enough(encoder, tokens)
        self._sentences = np.asarray([m.end() for m in _SENTENCE_END.finditer(self.text)], dtype=np.int64)
        self._words = np.asarray([m.end() for m in _WORD_END.finditer(self.text)], dtype=np.int64)

    def _long_enough(self, encoder: TextEncoder, tokens: int) -> tuple[str, np.ndarray]:
        characters = 6 * tokens + 200
        while True:
            if self.source is None:
                text = " ".join([FILLER] * (characters // len(FILLER) + 1))
            else:
                text = self.source.text[:characters]
            encoded = encoder.encode(text)
            ends = encoded.ends[encoded.ends > encoded.starts]
            if len(ends) >= tokens:
                return text, ends
            if self.source is not None and characters >= len(self.source.text):
                raise PromptError(
                    f"the text {self.source.path} is too short: it has {len(ends)} tokens, "
                    f"and the longest prompt needs up to {tokens}",
                    hint="give more text or shorter lengths",
                )
            characters *= 2

    def tokens_before(self, position: int) -> int:
        """The number of tokens that end at or before a character position."""
        return int(np.searchsorted(self._ends, position, side="right"))

    def cut(self, tokens: int) -> int:
        """The border nearest to `tokens` tokens from the start that is not beyond it: the end of a sentence; where
        none is near, of a word; where none is near either, of a token. 0 tokens: 0."""
        if tokens <= 0:
            return 0
        limit = self.token_end(tokens)
        for borders in (self._sentences, self._words):
            index = int(np.searchsorted(borders, limit, side="right")) - 1
            position = int(borders[index]) if index >= 0 else 0
            if tokens - self.tokens_before(position) <= NEAR:
                return position
        return limit

    def token_end(self, tokens: int) -> int:
        """The character position after the first `tokens` tokens."""
        if tokens > len(self._ends):
            raise PromptError("the filler text is too short", given=tokens, allowed=f"at most {len(self._ends)} tokens")
        return int(self._ends[tokens - 1]) if tokens > 0 else 0

    def __len__(self) -> int:
        return len(self._ends)

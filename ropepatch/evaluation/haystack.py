"""The text that something is hidden in, with the borders at which it may be cut."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from ropepatch.errors import PromptError
from ropepatch.evaluation.prompt import TextEncoder
from ropepatch.evaluation.texts import RealText

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""The repeated filler of the passkey benchmark (Landmark Attention, arXiv 2305.16300)."""

# A sentence ends at its closing mark, quotes and brackets included, before white space (none after CJK marks), or at
# the end of a paragraph.
_SENTENCE_END = re.compile(r"""[.!?]["'”’)\]]*(?=\s|\Z)|[。！？]["'”’)\]」』]*|\S(?=\s*\n\s*\n)""")
_WORD_END = re.compile(r"\S(?=\s|\Z)")

NEAR = 64
"""Tokens within which a sentence border is looked for; a text without sentences is cut at a word, then at a token."""


LONGEST_SENTENCE = 512
"""Tokens between two sentence borders beyond which a text is held to have no sentences there."""

# After these, and after single letters (initials, "U.S.", "e.g."), a full stop ends no sentence.
_ABBREVIATION = re.compile(
    r"""(?:^|[\s(\["'“‘])(?:(?:[^\W\d_]\.)*[^\W\d_]|[Cc]f|[Ee]tc|[Vv]iz|[Vv]s|[Nn]os?|[Aa]rt|[Ss]ec|[Cc]hap|[Ff]ig|[Vv]ols?|[Pp]p|"""
    r"""Mr|Mrs|Ms|Messrs|Dr|St|Jr|Sr|Hon|Rev|Gen|Col|Capt|Maj|Lieut|Lt|Sgt|Gov|Sen|Rep|Prof)\.\Z"""
)
_CLOSED = re.compile(r"""[.!?。！？]["'”’)\]」』]*\Z""")
_BREAK = re.compile(r"\s*(?:\n\s*\n|\Z)")
_GOES_ON = re.compile(r"\s*[a-z]")
_LOOK_BACK = 12
_FAR = 4000


def is_sentence_end(text: str, position: int) -> bool:
    """Whether a sentence ends at this position: with a closing mark (not as a heading does), and either the paragraph
    ends too or the mark belongs to no abbreviation and no small letter follows."""
    if not _CLOSED.search(text[max(0, position - _LOOK_BACK) : position]):
        return False
    if _BREAK.match(text, position):
        return True
    return not (_GOES_ON.match(text, position) or _ABBREVIATION.search(text[max(0, position - _LOOK_BACK) : position]))


def rotated(source: RealText, share: float) -> RealText:
    """The same text begun elsewhere: at the first sentence (where none is near, word) after `share` of its characters;
    what lies before comes at the end, behind a blank line."""
    at = int(share * len(source.text))
    near = source.text[at : at + _FAR]
    ends = (at + match.end() for match in _SENTENCE_END.finditer(near))
    words = (at + match.end() for match in _WORD_END.finditer(near))
    start = next((end for end in ends if is_sentence_end(source.text, end)), None) or next(words, 0)
    begun = source.text[start:].lstrip()
    return replace(source, text=f"{begun}\n\n{source.text[:start].rstrip()}" if begun else source.text)


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
        self.text, self._ends = self._long_enough(encoder, tokens, source)
        self._sentences = np.asarray([m.end() for m in _SENTENCE_END.finditer(self.text)], dtype=np.int64)
        self._whole = np.asarray([end for end in self._sentences if is_sentence_end(self.text, end)], dtype=np.int64)
        self._words = np.asarray([m.end() for m in _WORD_END.finditer(self.text)], dtype=np.int64)

    def _long_enough(self, encoder: TextEncoder, tokens: int, source: RealText | None) -> tuple[str, np.ndarray]:
        characters = 6 * tokens + 200
        while True:
            if source is None:
                text = " ".join([FILLER] * (characters // len(FILLER) + 1))
            else:
                text = source.text[:characters]
            encoded = encoder.encode(text)
            ends = encoded.ends[encoded.ends > encoded.starts]
            if len(ends) >= tokens:
                return text, ends
            if source is not None and characters >= len(source.text):
                raise PromptError(
                    f"the text {source.path} is too short: it has {len(ends)} tokens, "
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

    def sentence_end(self, tokens: int) -> int:
        """As `cut`, but the sentence may end far before, and neither an abbreviation nor a full stop before a small
        letter ends one. Only where there are no sentences (none of at most `LONGEST_SENTENCE` tokens) as `cut`."""
        if tokens <= 0:
            return 0
        index = int(np.searchsorted(self._whole, self.token_end(tokens), side="right"))
        last = int(self._whole[index - 1]) if index else 0
        following = int(self._whole[index]) if index < len(self._whole) else len(self.text)
        if self.tokens_before(following) - self.tokens_before(last) <= LONGEST_SENTENCE:
            return last
        return self.cut(tokens)

    def token_end(self, tokens: int) -> int:
        """The character position after the first `tokens` tokens."""
        if tokens > len(self._ends):
            raise PromptError("the filler text is too short", given=tokens, allowed=f"at most {len(self._ends)} tokens")
        return int(self._ends[tokens - 1]) if tokens > 0 else 0

    def __len__(self) -> int:
        return len(self._ends)

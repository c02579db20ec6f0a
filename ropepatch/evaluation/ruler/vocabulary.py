"""The words that keys and word lists are made of: our own lists, or those of the package wonderwords.

RULER and lm-evaluation-harness take theirs from wonderwords. `words/*.txt` are common English words of our own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec

from ropepatch.errors import DependencyError
from ropepatch.evaluation.ruler.drawing import Draw


@dataclass(frozen=True)
class Vocabulary:
    """Words by their kind, each list sorted."""

    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]

    @functools.cached_property
    def singles(self) -> tuple[str, ...]:
        """All words, sorted."""
        return tuple(sorted({*self.adjectives, *self.nouns, *self.verbs}))

    def pair(self, draw: Draw) -> str:
        """An adjective and a noun, joined by a hyphen."""
        return f"{draw.choice(self.adjectives)}-{draw.choice(self.nouns)}"

    def distinct_pairs(self, draw: Draw) -> Iterator[str]:
        """Pairs that are all different, without end as long as there are any."""
        seen: set[str] = set()
        while len(seen) < len(self.adjectives) * len(self.nouns):
            pair = self.pair(draw)
            if pair not in seen:
                seen.add(pair)
                yield pair

    @functools.cached_property
    def plain_singles(self) -> tuple[str, ...]:
        """The words that no other word contains: found in a reply, they were meant."""
        return _in_no_other(self.singles)

    @functools.cached_property
    def plain_nouns(self) -> tuple[str, ...]:
        """The nouns that no other noun contains."""
        return _in_no_other(self.nouns)


def _in_no_other(words: tuple[str, ...]) -> tuple[str, ...]:
    everything = "\n".join(words)
    return tuple(word for word in words if everything.find(word, everything.find(word) + 1) < 0)


def vocabulary(source: str) -> Vocabulary:
    """The word lists called "own" or "wonderwords".

    Raises:
        DependencyError: wonderwords is asked for and not installed.
    """
    if source == "own":
        folder = resources.files("ropepatch.evaluation.ruler") / "words"
        names = ("adjectives.txt", "nouns.txt", "verbs.txt")
    else:
        if find_spec("wonderwords") is None:
            raise DependencyError("words=wonderwords needs the package wonderwords", hint="pip install wonderwords")
        folder = resources.files("wonderwords") / "assets"
        names = ("adjectivelist.txt", "nounlist.txt", "verblist.txt")
    lists = ((folder / name).read_text(encoding="utf-8").splitlines() for name in names)
    return Vocabulary(*(tuple(sorted({word.strip() for word in words} - {""})) for words in lists))

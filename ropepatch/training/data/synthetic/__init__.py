"""Retrieval tasks made on the spot: facts hidden in text, questions about them at the end, answers as labels."""

from ropepatch.training.data.synthetic.source import SyntheticWindows
from ropepatch.training.data.synthetic.tasks import words

__all__ = ["SyntheticWindows", "words"]

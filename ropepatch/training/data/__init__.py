"""Training data: rows of token ids from texts, data sets, conversations and made-up tasks."""

from ropepatch.training.data.building import build

__all__ = ["build"]

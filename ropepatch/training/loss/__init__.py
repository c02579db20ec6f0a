"""The training loss: next-token cross entropy that never holds the logits of a whole sequence."""

from ropepatch.training.loss.backends import choose_backend
from ropepatch.training.loss.causal import causal_loss
from ropepatch.training.loss.checking import check
from ropepatch.training.loss.chunked import chunked_cross_entropy

__all__ = ["causal_loss", "check", "choose_backend", "chunked_cross_entropy"]

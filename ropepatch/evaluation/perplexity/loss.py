"""The loss of each token: cross entropy in nats, in float32 whatever the model's dtype, memory bounded."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ropepatch.evaluation.prompt import Ids

# Rows of float32 log-probabilities that are made at a time: 16 MiB.
_BLOCK_ELEMENTS = 2**22


class Losses(NamedTuple):
    """What a model makes of some tokens in a row.

    Attributes:
        nll: negative log-probability of each, nats, shape [n], float32.
        hits: whether it was the most likely token, shape [n].
    """

    nll: npt.NDArray[np.float32]
    hits: npt.NDArray[np.bool_]

    @classmethod
    def join(cls, parts: list[Losses]) -> Losses:
        return cls(np.concatenate([part.nll for part in parts]), np.concatenate([part.hits for part in parts]))


def token_losses(logits: torch.Tensor, targets: Ids) -> Losses:
    """The losses of tokens by the logits that predict them.

    Args:
        logits: [n, vocabulary], any dtype.
        targets: the tokens, shape [n].
    """
    wanted = torch.from_numpy(targets.astype("int64")).to(logits.device)
    step = max(1, _BLOCK_ELEMENTS // logits.shape[-1])
    nll, hits = [], []
    for start in range(0, len(logits), step):
        block, target = logits[start : start + step].float(), wanted[start : start + step]
        nll.append(torch.nn.functional.cross_entropy(block, target, reduction="none"))
        hits.append(_most_likely(block, target))
    return Losses(torch.cat(nll).cpu().numpy(), torch.cat(hits).cpu().numpy())


def _most_likely(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Whether a greedy reader would choose the targets, bool [n]: of equal logits the first."""
    largest = logits.gather(1, targets[:, None])[:, 0] == logits.amax(-1)
    hits = largest.clone()
    # Only these are asked which of equals comes first: on a CPU that takes as long as the loss itself.
    hits[largest] = logits[largest].argmax(-1) == targets[largest]
    return hits

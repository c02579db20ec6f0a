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
        hits.append(block.argmax(-1) == target)
    return Losses(torch.cat(nll).cpu().numpy(), torch.cat(hits).cpu().numpy())

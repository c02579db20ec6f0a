"""Which tokens of a sequence a process holds, and its part of a batch.

Shapes: B batch, b = 1 or B rows, L tokens of the batch, S tokens after padding, t = S / processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ropepatch.attention.visibility import INVISIBLE
from ropepatch.errors import OptionError

IGNORED = -100
_NAMES = ("input_ids", "labels", "shifted_labels", "position_ids", "attention_mask")


def contiguous_slots(length: int, size: int) -> list[Tensor]:
    """For each process a run of slots, int64 [length / size]."""
    return list(torch.arange(length).chunk(size))


def balanced_slots(length: int, size: int) -> list[Tensor]:
    """For each process r the chunks r and 2 size - 1 - r of 2 size, int64 [length / size].

    Under a causal mask late tokens see more than early ones: so every process has as much to do as the others.
    """
    chunks = torch.arange(length).chunk(2 * size)
    return [torch.cat((chunks[rank], chunks[2 * size - 1 - rank])) for rank in range(size)]


@dataclass(frozen=True, eq=False)
class Whole:
    """A batch before it was cut, padded at the right to a length that can be.

    Attributes:
        input_ids: int64 [B, S].
        labels: int64 [B, S], the token that each token predicts (shifted), or IGNORED; None without labels.
        position_ids: int64 [b, S].
        stated: the batch came with positions.
        attention_mask: [B, S] as it came (bool, or numbers), 0 for the padding; None without one.
        padding: tokens that were added.
    """

    input_ids: Tensor
    labels: Tensor | None
    position_ids: Tensor
    stated: bool
    attention_mask: Tensor | None
    padding: int

    @property
    def documents(self) -> Tensor | None:
        """Without a mask, documents as transformers tells them: a position that is not the next one begins another.

        Returns:
            int64 [b, S], INVISIBLE for added tokens; None where a mask was given, or it is one document.
        """
        if self.attention_mask is not None:
            return None
        jumps = self.position_ids.diff(dim=1, prepend=self.position_ids[:, :1] - 1) != 1
        documents = jumps.long().cumsum(1)
        if self.padding:
            documents[:, -self.padding :] = INVISIBLE
        return documents if bool((documents != 0).any()) else None

    def slice(self, slots: Tensor) -> dict[str, Tensor]:
        """The part of the tokens at `slots`, under the names that models and the loss take."""
        slots = slots.to(self.input_ids.device)
        part = {"input_ids": self.input_ids[:, slots], "position_ids": self.position_ids[:, slots]}
        if self.labels is not None:
            part["shifted_labels"] = self.labels[:, slots]
        if self.attention_mask is not None:
            part["attention_mask"] = self.attention_mask[:, slots]
        return part


def whole_of(batch: Mapping[str, Tensor | None], multiple: int) -> Whole:
    """A batch with shifted labels, padded to a multiple of `multiple` tokens.

    Raises:
        OptionError: another entry than those known, none of `input_ids`, or one of another shape.
    """
    given = {name: value for name, value in batch.items() if value is not None}
    unknown = sorted(set(given) - set(_NAMES))
    if unknown or "input_ids" not in given or ("labels" in given and "shifted_labels" in given):
        raise OptionError(
            "this batch cannot be split over processes",
            given=sorted(given),
            allowed="input_ids, labels or shifted_labels, position_ids, attention_mask",
        )
    input_ids = given["input_ids"]
    batch_size, length = input_ids.shape
    for name, value in given.items():
        if value.dim() != 2 or value.shape[0] not in (1, batch_size) or value.shape[1] != length:
            raise OptionError(
                f"{name} of a shape that cannot be split over processes",
                given=list(value.shape),
                allowed=f"[{batch_size}, {length}]",
            )
    labels = given.get("shifted_labels")
    if "labels" in given:
        labels = pad(given["labels"][:, 1:], (0, 1), value=IGNORED)
    positions = given.get("position_ids")
    stated = positions is not None
    if positions is None:
        positions = torch.arange(length, device=input_ids.device)[None].expand(batch_size, -1)
    mask = given.get("attention_mask")
    missing = -length % multiple
    return Whole(
        input_ids=pad(input_ids, (0, missing)),
        labels=None if labels is None else pad(labels, (0, missing), value=IGNORED),
        position_ids=pad(positions, (0, missing)),
        stated=stated,
        attention_mask=None if mask is None else pad(mask, (0, missing)),
        padding=missing,
    )

"""Which rows a process reads: step s trains on rows [s * batch, (s + 1) * batch), however many processes share them.

The Trainer shards nothing here: who reads which row follows from the step's number by arithmetic, so that another
number of processes, another micro batch and a resumed run see the same rows in each optimizer step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ropepatch.errors import OptionError

Row = dict[str, Any]


@dataclass(frozen=True)
class Share:
    """What one process reads of each step.

    Attributes:
        steps: optimizer steps of the whole run.
        batch_size: rows of a step, over all processes.
        micro_batch_size: rows of one forward.
        group: number of this process's data-parallel group; processes that share a sequence are one group.
        groups: how many there are.
    """

    steps: int
    batch_size: int
    micro_batch_size: int = 1
    group: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % (self.micro_batch_size * self.groups):
            raise OptionError(
                "train.batch_size must be a multiple of train.micro_batch_size x the data-parallel processes",
                given=f"{self.batch_size}, with {self.micro_batch_size} x {self.groups}",
                hint=f"the next multiple is {self._next_multiple()}",
            )

    def _next_multiple(self) -> int:
        unit = self.micro_batch_size * self.groups
        return -(-self.batch_size // unit) * unit

    @property
    def accumulation(self) -> int:
        """Forwards of this process in one step."""
        return self.batch_size // (self.micro_batch_size * self.groups)

    @property
    def forwards(self) -> int:
        """Forwards of this process in the whole run."""
        return self.steps * self.accumulation

    def micro_batches(self, first_step: int) -> Iterator[list[int]]:
        """The rows of each forward of this process, from the given step on."""
        rows = self.batch_size // self.groups
        for step in range(first_step, self.steps):
            start = step * self.batch_size + self.group * rows
            for offset in range(0, rows, self.micro_batch_size):
                yield list(range(start + offset, start + offset + self.micro_batch_size))


class StepSampler(Sampler[list[int]]):
    """Batches of row numbers for a map-style dataset.

    Args:
        share: what this process reads.
        first_step: how many steps are done already. The length is still that of the whole run, as the Trainer
            counts its steps by it.
    """

    def __init__(self, share: Share, first_step: int) -> None:
        self.share = share
        self.first_step = first_step

    def __iter__(self) -> Iterator[list[int]]:
        return self.share.micro_batches(self.first_step)

    def __len__(self) -> int:
        return self.share.forwards


def loader(
    dataset: Dataset[Row], share: Share, collate: Callable[[Sequence[Row]], dict[str, Any]], *, first_step: int = 0
) -> DataLoader[Any]:
    """The batches of this process, in order; as many as it has forwards in the rest of the run.

    Args:
        dataset: from `ropepatch.training.data.build`.
        share: what this process reads.
        collate: makes tensors of a list of rows.
        first_step: how many steps are done already.

    Raises:
        OptionError: the dataset has fewer rows than the run has steps.
    """
    count = len(dataset)  # type: ignore[arg-type]
    if count < share.steps * share.batch_size:
        raise OptionError(
            "the data has fewer windows than the run asks for", given=count, allowed=f"{share.steps * share.batch_size}"
        )
    # A loader draws a seed when it begins. From the global generator, that would shift what a resumed run draws.
    own = torch.Generator().manual_seed(0)
    return DataLoader(dataset, batch_sampler=StepSampler(share, first_step), collate_fn=collate, generator=own)

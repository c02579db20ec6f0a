"""From training rows to a batch: token ids, labels, positions, and the mask that makes models read the positions right.

What a batch holds depends on what the recipe asks for:

| recipe | position_ids | attention_mask |
|---|---|---|
| nothing special | 0, 1, 2, ... | ones |
| skipped positions | skipping | ones: without it transformers takes each skip for a new document |
| isolated documents | from 0 in each document | none: transformers isolates by the resets |
| isolated documents, numbered | from 0, or skipping, in each document | document numbers 1, 2, ... |

The third row holds for calls with `use_cache=False` only, since transformers looks for no resets in a call that fills a
cache, and it costs a matrix of tokens x tokens. `training_attention` leads to the fourth.

Padding stands at the right, where a causal model does not see it. Among isolated documents it is number 0; elsewhere it
goes on with ones, since a mask with a zero costs a matrix of tokens x tokens. The label of an isolated document's first
token is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ropepatch.errors import OptionError
from ropepatch.training.positions.skipped import generator_of, pose_positions, random_positions
from ropepatch.training.recipe import Recipe
from ropepatch.training.stages import Schedule

IGNORED = -100


class Collator:
    """Makes a batch of rows (`ropepatch.training.data`). A pure function of the recipe and the rows' numbers.

    Args:
        recipe: its `data.isolate_documents`, `train.positions` and `train.seed` are read.
        target_length: skipped positions stay below it where the recipe states no target: the patch's target length, in
            tokens; one for each stage where they differ; None where no patch states one.
        numbered: the model reads document numbers from its mask, as `training_attention` says.

    Raises:
        OptionError: skipped positions without a target, or within isolated documents of a model that reads no numbers.
    """

    def __init__(
        self, recipe: Recipe, target_length: int | Sequence[int | None] | None = None, *, numbered: bool = False
    ) -> None:
        skipped = recipe.train.positions
        self.schedule = Schedule.of(recipe)
        self.isolate = recipe.data.isolate_documents
        self.numbered = numbered
        self.skipped = skipped
        self.seed = recipe.train.seed
        stages = len(self.schedule.legs)
        given = target_length if isinstance(target_length, Sequence) else [target_length] * stages
        if len(given) != stages:
            raise OptionError("one target length for each stage", given=len(given), allowed=str(stages))
        self.targets = [skipped.target_length or target for target in given] if skipped is not None else []
        if skipped is not None and any(target is None for target in self.targets):
            raise OptionError(
                "skipped positions need a target length, and neither the recipe nor a patch states one",
                hint="set train.positions.target_length",
            )
        if skipped is not None and self.isolate and not numbered:
            raise OptionError(
                "skipped positions within isolated documents need a model that reads document numbers",
                hint="run it within ropepatch.training.positions.training_attention, and pass what that yields",
            )

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch of B rows of L tokens.

        Returns:
            `input_ids`, `labels` (not shifted, -100 is ignored) and `position_ids`, int64 [B, L]; and
            `attention_mask`, int64 [B, L], unless the table above says none.

        Raises:
            OptionError: rows of several lengths, or a window longer than the target.
        """
        lengths = sorted({len(row["input_ids"]) for row in rows})
        if len(lengths) != 1:
            raise OptionError("the rows of a batch have one length", given=lengths)
        batch = {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
        documents = torch.tensor([row["documents"] for row in rows])
        batch["position_ids"] = torch.stack(
            [self._positions(numbers, int(row["index"])) for numbers, row in zip(documents, rows, strict=True)]
        )
        if not self.isolate:
            return {**batch, "attention_mask": torch.ones_like(documents)}
        # A document's first token is foretold by nothing that it belongs to.
        begins = torch.nn.functional.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
        batch["labels"] = batch["labels"].masked_fill(begins, IGNORED)
        return {**batch, "attention_mask": documents} if self.numbered else batch

    def _positions(self, documents: Tensor, index: int) -> Tensor:
        """int64 [L] of one row."""
        if not self.isolate:
            # Padding takes its places at the end of the target, so that nothing reaches beyond.
            real = int((documents != 0).sum())
            pieces = [real, documents.numel() - real]
        else:
            pieces = torch.unique_consecutive(documents, return_counts=True)[1].tolist()
        if self.skipped is None:
            if not self.isolate:
                return torch.arange(documents.numel())
            return torch.cat([torch.arange(piece) for piece in pieces])
        target = self.targets[self.schedule.number_of_row(index)]
        assert target is not None
        generator = generator_of(self.seed, index)
        if self.isolate:
            return torch.cat([self._skipping(piece, target, generator) for piece in pieces])
        real, padding = pieces
        first = self._skipping(real, target - padding, generator) if real else torch.arange(0)
        start = int(first[-1]) + 1 if real else 0
        return torch.cat((first, torch.arange(start, start + padding)))

    def _skipping(self, length: int, target: int, generator: torch.Generator) -> Tensor:
        assert self.skipped is not None
        if self.skipped.kind == "random":
            return random_positions(length, target, generator)
        return pose_positions(length, target, min(self.skipped.chunks, length), generator)

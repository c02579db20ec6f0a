"""Do documents and skipped positions do in this model what they should? Proven on a few tokens before training.

Every way to get this wrong is silent: a mask of ones lets packed documents see each other, no mask cuts a window at
each skip, and some models never look at the positions they are given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ropepatch.api import record_of
from ropepatch.errors import OptionError, UnsupportedModelError, VerificationError
from ropepatch.surgery._probe import run, tokens
from ropepatch.training.positions.collator import Collator
from ropepatch.training.stages import Schedule

if TYPE_CHECKING:
    from ropepatch.training.recipe import Recipe

_HALF = 4
_TOKENS = 2 * _HALF
# Rows to choose the widest skip from.
_ROWS = 32
# What one token changes in another document, as a share of what it changes in its own: rounding, at most.
_LEAK = 1e-3


def verify(host: Any, recipe: Recipe, *, numbered: bool) -> None:
    """Run rows of a few tokens through the model, as the collator makes them.

    Args:
        host: the PreTrainedModel.
        numbered: it reads document numbers from its mask.

    Raises:
        VerificationError: isolated documents see each other, or tokens do not see across a skip.
        UnsupportedModelError: positions change nothing in this model, so that skipping them is of no use.
        OptionError: a target length that the patch or the model does not reach.
    """
    target = 2 * _TOKENS
    collator = Collator(recipe, [target] * len(Schedule.of(recipe).legs), numbered=numbered)
    ids = tokens(host, _TOKENS)[0].tolist()
    if recipe.data.isolate_documents:
        _check_documents(host, collator, ids)
    if recipe.train.positions is not None:
        _check_skips(host, collator, ids)
        _check_reach(host, recipe, ids)


def _check_documents(host: Any, collator: Collator, ids: list[int]) -> None:
    documents = [1] * _HALF + [2] * _HALF
    changed = _difference(
        _outputs(host, collator([_row(ids, documents)])),
        _outputs(host, collator([_row(_other(ids, _HALF - 2), documents)])),
    )
    # The document's last token, just behind the changed one, and all of the next document.
    own, leak = float(changed[_HALF - 1]), float(changed[_HALF:].max())
    if own == 0.0 or leak > _LEAK * own:
        raise VerificationError(
            "packed documents are not kept apart in this model" if own else "tokens do not see their own document",
            given=f"a token changes the next document's outputs by {leak:.2g}, its own document's by {own:.2g}",
            hint="set data.isolate_documents to false",
        )


def _check_skips(host: Any, collator: Collator, ids: list[int]) -> None:
    rows = [_row(ids, [1] * _TOKENS, index) for index in range(_ROWS)]
    skips = [collator([row])["position_ids"][0].diff() for row in rows]
    row, skip = max(zip(rows, skips, strict=True), key=lambda pair: int(pair[1].max()))
    behind = int(skip.argmax()) + 1
    batch = collator([row])
    skipping = _outputs(host, batch)
    blind = _outputs(host, collator([{**row, "input_ids": _other(ids, behind - 1)}]))
    if float(_difference(skipping, blind)[behind]) == 0.0:
        raise VerificationError(
            "tokens behind a skip of positions do not see those before it",
            given=f"positions {batch['position_ids'][0].tolist()}",
            hint="leave train.positions out",
        )
    plain = {**batch, "position_ids": torch.arange(_TOKENS)[None]}
    if torch.equal(skipping, _outputs(host, plain)):
        raise UnsupportedModelError(
            "positions that are given change nothing in this model, so skipping them shows it no long distances",
            hint="leave train.positions out, and train on long windows",
        )


def _check_reach(host: Any, recipe: Recipe, ids: list[int]) -> None:
    """The last position that a row may get: within what the patch aims at, and one that the model has."""
    record, train = record_of(host), recipe.train
    assert train.positions is not None
    stated, reached = train.positions.target_length, record["target_length"] if record is not None else None
    changing = any(stage.options for stage in train.stages or ())
    # Methods of the attention seam have no limit, or none that is a length.
    if stated and reached and record and record["seam"] != "attention" and not changing and stated > reached:
        raise OptionError(
            "train.positions.target_length lies beyond what the patch reaches",
            given=stated,
            allowed=f"<= {reached}",
            hint="raise the patch's factor, or leave target_length out",
        )
    target = stated or reached
    if target is None:
        return
    positions = torch.arange(_TOKENS)[None]
    positions[0, -1] = max(target, _TOKENS) - 1
    try:
        run(host, torch.tensor([ids]), position_ids=positions, attention_mask=torch.ones_like(positions))
    except IndexError as error:
        raise OptionError(
            "train.positions.target_length lies beyond the positions that the model has",
            given=target,
            hint="patch it to that length, or lower target_length",
        ) from error


def _row(ids: list[int], documents: list[int], index: int = 0) -> dict[str, Any]:
    return {"input_ids": ids, "labels": ids, "documents": documents, "index": index}


def _other(ids: list[int], place: int) -> list[int]:
    """The same tokens with one of them replaced by its neighbour."""
    return [*ids[:place], ids[place - 1], *ids[place + 1 :]]


def _outputs(host: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the model gives for each token, float32 [tokens, width]."""
    inputs = {name: value for name, value in batch.items() if name not in ("input_ids", "labels")}
    first: Tensor = run(host, batch["input_ids"], **inputs)[0]
    return first[0].float().cpu()


def _difference(x: Tensor, y: Tensor) -> Tensor:
    """By token, the largest absolute difference."""
    return (x - y).abs().amax(-1)

"""A model in the state that training batches are made for: it reads document numbers, and groups are shifted.

A model on its own attention isolates documents by a matrix of tokens x tokens. Run through the kernels of the attention
seam, with its own rotation and nothing else changed, it needs vectors of document numbers only. Shifted groups need the
same kernels, so they too run there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ropepatch.attention import interface
from ropepatch.errors import UnsupportedModelError
from ropepatch.families import host_of
from ropepatch.families._rotary import owner_of
from ropepatch.methods._attention import LayerGeometry
from ropepatch.surgery._changes import AttributeChange, Change, revert_all
from ropepatch.surgery._neutral import check_neutral, outputs
from ropepatch.surgery._probe import record
from ropepatch.surgery._seam import Seam
from ropepatch.surgery._takeover import refuse, take_over, watch
from ropepatch.training.positions.verify import verify
from ropepatch.training.precision import own_precision
from ropepatch.training.shifted import ShiftedGroups

if TYPE_CHECKING:
    from torch import nn

    from ropepatch.training.recipe import Recipe

_TOKENS = 6


@contextmanager
def training_attention(model: nn.Module, recipe: Recipe, *, checked: bool = True) -> Iterator[bool]:
    """Attention as a recipe trains with it, for the length of a with block; the model is as before when it ends.

    A patch may be undone and another put in force within the block, of the same seam.

    Args:
        model: patched as the recipe says, not yet sharded; a PeftModel, or what wraps one.
        checked: run a few tokens through the model first, and prove on them that isolated documents do not see each
            other, and that skipped positions are seen, count, and hide nothing.

    Yields:
        Whether the model reads document numbers from its mask: for `Collator(..., numbered=...)`.

    Raises:
        UnsupportedModelError: the model's attention cannot be taken over; the message says why.
        VerificationError: taken over it gives other outputs, or positions and documents do not do what they should.
        OptionError: skipped positions beyond what the patch or the model reaches, or groups without a half.
    """
    host: Any = host_of(model)
    changes: list[Change] = []
    try:
        on_seam = any(interface.SEAM in vars(module) for module in host.modules())
        if recipe.data.isolate_documents or recipe.train.shifted_groups is not None:
            if not on_seam:
                with own_precision(host):
                    _attend_by_kernels(host, changes)
            on_seam = True
        if checked:
            verify(host, recipe, numbered=on_seam)
        if recipe.train.shifted_groups is not None:
            groups = ShiftedGroups(recipe.train.shifted_groups.group)
            for path, module in host.named_modules():
                if interface.SEAM in vars(module):
                    changes.append(AttributeChange.apply(host, path, interface.KERNEL, groups))
        yield on_seam
    finally:
        revert_all(host, changes)


def _attend_by_kernels(host: Any, changes: list[Change]) -> None:
    """The model's own attention through the seam's kernels: it goes on rotating by itself."""
    refuse(host)
    borrowed: list[Change] = []
    try:
        take_over(host, "", borrowed)
        calls = record(host)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"isolated documents and shifted groups need the kernels of the attention seam: {error.message}",
            given=host.config.model_type,
            hint="set data.isolate_documents to false and leave train.shifted_groups out; a model with ALiBi of its "
            "own goes there by a patch with method: alibi",
        ) from error
    finally:
        revert_all(host, borrowed)
    modules, shapes = [call.module for call in calls], [call.query.shape for call in calls]
    names = {module: path for path, module in host.named_modules()}
    paths = [names[module] for module in modules]
    places = {owner_of(host, path) for path in paths}
    if len(places) != 1:
        raise UnsupportedModelError("its attention modules belong to several models", given=sorted(places))
    place = places.pop()
    owner = host.get_submodule(place)
    wanted = outputs(owner, modules[0], _TOKENS)
    take_over(host, place, changes)
    watch(host, place, interface.before_call, changes)
    for number, (path, shape) in enumerate(zip(paths, shapes, strict=True)):
        # Geometry is for schemes of methods; the model's own attention reads none of it.
        seam = Seam(number, LayerGeometry(1, shape[1], shape[3]), None)
        changes.append(AttributeChange.apply(host, path, interface.SEAM, seam))
    check_neutral(owner, outputs(owner, modules[0], _TOKENS), wanted, "attention")

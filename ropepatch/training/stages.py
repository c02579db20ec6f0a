"""The plan of a run in stages: which window and which patch options belong to which optimizer step.

Stages come one after the other; each has its own window (a progressive length schedule), and may have its own patch
options (a schedule of the base frequency, say, by `abf` and another rope_theta). Without stages a run is one leg.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ropepatch.errors import OptionError

if TYPE_CHECKING:
    from torch import nn

    from ropepatch.training.recipe import PatchSection, Recipe


@dataclass(frozen=True)
class Leg:
    """One stage of a run.

    Attributes:
        number: from 0.
        start, stop: optimizer steps start .. stop - 1, counted from 0.
        length: tokens of a window.
        options: of the patch; None where the recipe has no patch.
    """

    number: int
    start: int
    stop: int
    length: int
    options: dict[str, Any] | None


@dataclass(frozen=True)
class Schedule:
    """All legs of a run in their order, and the rows of one optimizer step."""

    legs: tuple[Leg, ...]
    batch_size: int

    @classmethod
    def of(cls, recipe: Recipe) -> Schedule:
        """The plan of a recipe. A stage without options takes those of the patch section; with options, these in place
        of the section's entries of the same names, and null drops an entry.

        Raises:
            OptionError: neither steps nor stages, steps that disagree with the stages, or options without a patch.
        """
        train, patch = recipe.train, recipe.patch
        own = dict(patch.options) if patch is not None else None
        if train.stages is None:
            if train.max_steps is None:
                raise OptionError("the recipe says nowhere how long to train", hint="set train.max_steps")
            return cls((Leg(0, 0, train.max_steps, recipe.data.length, own),), train.batch_size)
        if not train.stages:
            raise OptionError("train.stages is an empty list", hint="leave it out, or name a stage")
        legs: list[Leg] = []
        step = 0
        for number, stage in enumerate(train.stages):
            if stage.options is not None and patch is None:
                raise OptionError(
                    f"train.stages.{number}.options are options of a patch, and the recipe has none",
                    given=stage.options,
                    hint="add a patch section, or leave the options out",
                )
            options = own if stage.options is None or own is None else _replaced(own, stage.options)
            legs.append(Leg(number, step, step + stage.steps, stage.length, options))
            step += stage.steps
        if train.max_steps not in (None, step):
            raise OptionError(
                "train.max_steps is not the sum of the stages' steps",
                given=train.max_steps,
                allowed=str(step),
                hint="leave max_steps out",
            )
        return cls(tuple(legs), train.batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.legs[-1].stop

    @property
    def rows(self) -> int:
        """Rows of the whole run."""
        return self.steps * self.batch_size

    def stage_at(self, step: int) -> Leg:
        """The leg that an optimizer step, counted from 0, belongs to; the last one from the end of the run on.

        Raises:
            OptionError: a negative step.
        """
        if step < 0:
            raise OptionError("steps are counted from 0", given=step)
        return next((leg for leg in self.legs if step < leg.stop), self.legs[-1])

    def options_at(self, step: int) -> dict[str, Any] | None:
        """The patch's options at a step; None where the recipe has no patch."""
        return self.stage_at(step).options

    def number_of_row(self, index: int) -> int:
        """The number of the leg that a row belongs to."""
        return self.stage_at(index // self.batch_size).number


def _replaced(options: dict[str, Any], by: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**options, **by}.items() if value is not None}


def repatch(model: nn.Module, patch: PatchSection, options: dict[str, Any]) -> bool:
    """Give a live patched model, adapters and optimizer untouched, other options of its method.

    Parameters stay the same objects with the same values, so an optimizer, its state and DDP's hooks go on; what the
    patch computes is, bit for bit, what a fresh patch with these options computes.

    Args:
        model: patched as `patch` says, with options of an earlier leg; a PeftModel, or what wraps one.
        patch: the recipe's section.
        options: of the leg that begins.

    Returns:
        False where the options are in force already, and nothing was done.

    Raises:
        OptionError: the method learns parameters of its own, which a new patch would throw away; or options that do
            not fit. The model is then patched as before.
        NotPatchedError: the model is not patched.
    """
    import ropepatch
    from ropepatch.api import record_of
    from ropepatch.errors import NotPatchedError
    from ropepatch.methods._base import METHODS
    from ropepatch.methods._options import parse_options

    record = record_of(model)
    if record is None:
        raise NotPatchedError("the model is not patched, so its options cannot change", given=patch.method)
    entry: Any = METHODS.get(patch.method)
    # A record leaves out what speaks of another kind of model.
    if parse_options(entry, options) == parse_options(entry, record["options"]):
        return False
    if getattr(entry, "learned", None) is not None:
        raise OptionError(
            f"{entry.name!r} learns parameters of its own, which other options would throw away",
            given=options,
            hint="leave options out of the stages",
        )
    before = dict(record["options"])
    ropepatch.unpatch(model)
    try:
        apply_patch(model, patch, options)
    except BaseException:
        apply_patch(model, patch, before)
        raise
    return True


def apply_patch(model: nn.Module, patch: PatchSection, options: dict[str, Any]) -> None:
    """`ropepatch.patch` with a recipe's section, and these options."""
    import ropepatch
    from ropepatch.training.precision import own_precision

    with own_precision(model):
        ropepatch.patch(
            model,
            patch.method,
            original_length=patch.original_length,
            on_scaled=patch.on_scaled,
            layer_types=patch.layer_types,
            layers=patch.layers,
            base=patch.base,
            **options,
        )

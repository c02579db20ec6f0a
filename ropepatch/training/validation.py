"""A recipe tried out up to its first step, without its weights."""

from __future__ import annotations

from ropepatch.errors import RopepatchError, first_line
from ropepatch.training.checks import check, lacking
from ropepatch.training.recipe import Recipe


def validate(recipe: Recipe) -> list[str]:
    """Check a recipe as far as this machine can, and train one step on a tiny model of the same architecture.

    Nothing is written. What lies on the hub and cannot be reached is left out: the schema, the settings together, the
    method's options and the evaluations are checked all the same.

    Returns:
        What this machine lacks, and what could not be checked, a line each.

    Raises:
        OptionError: settings that do not go together.
        RopepatchError: whatever the data, the patch, the adapters or the first step refuse.
    """
    from ropepatch.training.loading import load_config
    from ropepatch.training.run import rehearse

    check(recipe)
    notes = [f"not on this machine: {line}" for line in lacking(recipe)]
    try:
        # First, since it is small: a hub that cannot be reached is waited for once.
        load_config(recipe.model)
        rehearse(recipe)
    except RopepatchError as error:
        if not _unreachable(error):
            raise
        notes.append(f"not checked: tokenizer, data, patch and first step ({first_line(error)})")
    return notes


def _unreachable(error: BaseException) -> bool:
    """Whether the hub could not be reached; a name that it does not know is another thing."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionError | LocalEntryNotFoundError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False

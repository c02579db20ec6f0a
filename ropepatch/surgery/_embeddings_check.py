"""Did the model follow? A row of the table is made NaN for one forward: what comes out tells whether it was read.

This sees a table however the model keeps and reads it, and the forward past the old limit runs through the whole part
that reads it, so that nothing else in there can still stand in the way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ropepatch.errors import RopepatchError, VerificationError
from ropepatch.families._rotary import owner_of, owners_of
from ropepatch.surgery._probe import run, tokens


def check_read(host: nn.Module, path: str, name: str, start: int, old: int, new: int) -> None:
    """See that position 0 reads row `start`, and position `old` the first row that was not there before.

    Args:
        path, name: of the table.
        start: the row of position 0.
        old, new: positions that the table had and has.

    Raises:
        VerificationError: the model reads other rows, or does not run.
    """
    table = getattr(host.get_submodule(path), name)
    owner = host.get_submodule(owner_of(host, path))
    if "input_features" in inspect.signature(type(owner).forward).parameters:
        return _check_audio(table, owner, start, new, f"{path}.{name}")
    # A decoder may want its encoder around it: where one part does not run by itself, the next larger one is tried.
    *inner, outermost = owners_of(host, path)
    for place in inner:
        try:
            return _check_tokens(table, host.get_submodule(place), start, old, new, f"{path}.{name}")
        except _CannotRunError:
            continue
    return _check_tokens(table, host.get_submodule(outermost), start, old, new, f"{path}.{name}")


def _check_tokens(table: Tensor, owner: nn.Module, start: int, old: int, new: int, where: str) -> None:
    try:
        first = reads(table, start, lambda: _run(owner, 1))
    except Exception as error:
        raise _cannot_run(error) from error
    if not first:
        raise VerificationError(
            f"the model does not read row {start} of {where} for the first of its tokens",
            hint="pass verify=False if other inputs read it",
        )
    if new > old and not _reads_beyond(table, start + old, owner, old + 1, where):
        raise VerificationError(f"the model does not read row {start + old} of {where} at position {old}")


def _check_audio(table: Tensor, owner: Any, start: int, new: int, where: str) -> None:
    """An encoder of speech is given sound as long as its table; Whisper's reads all rows whatever it is given."""
    for row in (start, start + new - 1):
        try:
            read = reads(table, row, lambda: run_whole(owner, input_features=_sound(owner.config, new)))
        except Exception as error:
            raise _cannot_run(error) from error
        if not read:
            raise VerificationError(f"the model does not read row {row} of {where}")


def _sound(config: Any, positions: int) -> Tensor:
    """Frames of silence for so many positions: [1, bins, frames] for Whisper, [1, frames, bins] for Speech2Text."""
    if hasattr(config, "num_mel_bins"):
        return torch.zeros(1, config.num_mel_bins, 2 * positions)
    return torch.zeros(1, 2**config.num_conv_layers * positions, config.input_feat_per_channel)


def _reads_beyond(table: Tensor, row: int, owner: nn.Module, length: int, where: str) -> bool:
    try:
        return reads(table, row, lambda: _run(owner, length))
    except RopepatchError:
        raise
    except Exception as error:
        raise VerificationError(
            f"the table {where} is longer, but the model does not run on {length} tokens "
            f"({type(error).__name__}: {error})"
        ) from error


class _CannotRunError(VerificationError):
    """A part of a model that does not run by itself."""


def _cannot_run(error: Exception) -> _CannotRunError:
    return _CannotRunError(
        "the model could not be run on a token to see whether the patch takes effect "
        f"({type(error).__name__}: {error})",
        hint="pass verify=False and check the model's outputs yourself",
    )


def reads(table: Tensor, row: int, forward: Callable[[], Any]) -> bool:
    """Whether what `forward` computes depends on a row of the table."""
    with _marked(table, row):
        return any(bool(torch.isnan(tensor).any()) for tensor in _floats(forward()))


@contextmanager
def _marked(table: Tensor, row: int) -> Iterator[None]:
    rows = table.detach().view(-1, table.shape[-1])
    kept = rows[row].clone()
    with torch.no_grad():
        rows[row] = float("nan")
        try:
            yield
        finally:
            rows[row] = kept


def run_whole(owner: nn.Module, **inputs: Tensor) -> Any:
    """One forward in evaluation mode, without gradients; floating inputs in the dtype of the model."""
    like = next(tensor for tensor in owner.parameters() if not tensor.is_meta)
    inputs = {name: value.to(like) if value.is_floating_point() else value for name, value in inputs.items()}
    training = owner.training
    owner.train(False)
    try:
        with torch.no_grad():
            return owner._call_impl(**inputs)
    finally:
        owner.train(training)


def _run(owner: nn.Module, length: int) -> Any:
    ids = tokens(owner, length)
    names = inspect.signature(type(owner).forward).parameters
    more = {"decoder_input_ids": ids} if "decoder_input_ids" in names else {}
    return run(owner, ids, **more)


def _floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _floats(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _floats(part)

"""Time-series models after a patch: do they read the new rows, and run on the longer context? And is the input as long
as they want it?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ropepatch.errors import UsageError, VerificationError, first_line
from ropepatch.families._rotary import owners_of
from ropepatch.surgery._embeddings_check import reads, run_whole

PAST = "past_values"


def past_length(config: Any) -> int:
    """Past values that a model wants: its context, and what the longest of its lags reaches back beyond that."""
    return int(config.context_length + max(getattr(config, "lags_sequence", None) or [0]))


def reader_of(host: nn.Module, path: str) -> str | None:
    """Path of the smallest part of a model around the module at `path` that takes past values; None: there is none."""
    return next((place for place in owners_of(host, path) if PAST in _names(host.get_submodule(place))), None)


def example(model: nn.Module) -> dict[str, Tensor]:
    """Past values as long as the model wants them, with all else that its forward then asks for."""
    config: Any = model.config
    names = _names(model)
    lags = getattr(config, "lags_sequence", None) is not None
    channels = getattr(config, "input_size", 1) if lags else getattr(config, "num_input_channels", 0)
    axes = (channels,) if channels > 1 or (channels and not lags) else ()
    past = past_length(config)

    def counted(steps: int) -> Tensor:
        # Whole numbers that are not all the same: some distributions bear no others.
        return (torch.arange(steps) % 3 + 1.0).reshape(1, steps, *(1 for _ in axes)).expand(1, steps, *axes).clone()

    given = {PAST: counted(past)}
    if lags:
        features = config.num_time_features + config.num_dynamic_real_features
        given |= {
            "past_time_features": torch.full((1, past, features), 0.5),
            "past_observed_mask": torch.ones_like(given[PAST]),
            "future_values": counted(config.prediction_length),
            "future_time_features": torch.full((1, config.prediction_length, features), 0.5),
        }
        if config.num_static_categorical_features:
            given["static_categorical_features"] = torch.zeros(1, config.num_static_categorical_features).long()
        if config.num_static_real_features:
            given["static_real_features"] = torch.ones(1, config.num_static_real_features)
    if "past_values_padding" in names:
        given["past_values_padding"] = torch.zeros(1, past)
    if "freq" in names and "past_values_padding" in names:
        given["freq"] = torch.zeros(1, 1).long()
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in given.items()}


def check_reads(host: nn.Module, path: str, name: str, spans: Sequence[tuple[int, int]]) -> None:
    """See that the model reads both ends of one of these spans of rows.

    Args:
        path, name: of the table.
        spans: first and last row, of the context or of the forecast.

    Raises:
        VerificationError: it reads none, or not both ends, or does not run.
    """
    where = f"{path}.{name}"
    table = getattr(host.get_submodule(path), name)
    reader = host.get_submodule(reader_of(host, path) or "")
    for first, last in spans:
        if not _reads(table, first, reader):
            continue
        if not _reads(table, last, reader):
            raise VerificationError(f"the model reads row {first} of {where}, but not row {last}")
        return
    raise VerificationError(
        f"the model reads none of the rows {', '.join(str(first) for first, _ in spans)} of {where}"
    )


def check_runs(host: nn.Module) -> None:
    """See that the whole model runs on the length that its config now says.

    Raises:
        VerificationError: it does not.
    """
    _tried(host, lambda: _run(host))


def _reads(table: Tensor, row: int, reader: nn.Module) -> bool:
    return bool(_tried(reader, lambda: reads(table, row, lambda: _run(reader))))


def _run(model: nn.Module) -> Any:
    # Informer samples queries, and masked pretraining patches.
    with torch.random.fork_rng():
        return run_whole(model, **example(model))


def _tried(model: Any, forward: Callable[[], Any]) -> Any:
    try:
        return forward()
    except Exception as error:
        raise VerificationError(
            f"the model does not run on a context of {model.config.context_length} time steps "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error


def _names(module: nn.Module) -> Any:
    return inspect.signature(type(module).forward).parameters


@dataclass(frozen=True)
class PastLength:
    """A hook before the forward that takes past values: as many as the model wants, or one clear error.

    Attributes:
        wanted: past values of a series.
        context: of these, what the model attends to; the rest is read at its lags.
        place: of `past_values` among the positional arguments.
    """

    wanted: int
    context: int
    place: int

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module
        past = kwargs.get(PAST, args[self.place] if len(args) > self.place else None)
        if torch.compiler.is_compiling() or not isinstance(past, Tensor) or past.dim() < 2:
            return
        if past.shape[1] != self.wanted:
            raise UsageError(
                f"the model's context is {self.context} time steps now, by its patch",
                given=f"{past.shape[1]} past values",
                allowed=f"{self.wanted} past values (config.context_length, and what the lags reach back)",
                hint="pass more of the past, or unpatch",
            )

"""Modules that turn distances into buckets (or sines), and how each is asked to use other distances.

A kind is told by what a module has, not by its class. The functions below stand in for one method of the module; they
are given the original, so that everything else about it stays the model's.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ropepatch.methods._buckets import Buckets, divided


@dataclass(frozen=True)
class Kind:
    """One way of bucketing.

    Attributes:
        method: the module's method from distances to buckets, which is replaced.
        parts: further attributes by which the kind is told.
        largest: the attribute that holds the distance at which the last bucket begins; None where a default argument
            does, or nothing.
        stretches: module to whether it has logarithmic buckets, which can be stretched.
        scaled: (module, original method, Buckets) to what replaces the method.
    """

    method: str
    parts: tuple[str, ...]
    largest: str | None
    stretches: Callable[[Any], bool]
    scaled: Callable[[Any, Any, Buckets], Callable[..., Any]]


def bucketing_modules(host: nn.Module) -> Iterator[tuple[str, Kind]]:
    """The path and kind of every module that buckets distances, in module order; those without a bias of their own
    (T5's later layers, which take the first one's) are left out."""
    for path, module in host.named_modules():
        for kind in KINDS:
            # T5's layers all have the method; only those with the table use it.
            if callable(getattr(module, kind.method, None)) and all(hasattr(module, part) for part in kind.parts):
                yield path, kind
                break


# -- T5, mT5, UMT5, LongT5, Switch Transformers, Pop2Piano, UDOP, Pix2Struct; CPM-Ant; MPNet


def _bucketed(original: Callable[..., Tensor], divisor: float, relative_position: Tensor, *args: Any, **kw: Any) -> Any:
    return original(divided(relative_position, divisor), *args, **kw)


def _by_distance(module: Any, original: Any, buckets: Buckets) -> Callable[..., Any]:
    del module
    return functools.partial(_bucketed, original, buckets.divisor)


def _by_default(module: Any, original: Any, buckets: Buckets) -> Callable[..., Any]:
    """The largest distance is a default argument that no caller gives."""
    del module
    largest = inspect.signature(original).parameters["max_distance"].default
    stretched = functools.partial(original, max_distance=round(largest * buckets.stretch))
    return functools.partial(_bucketed, stretched, buckets.divisor)


# -- DeBERTa-v2, SEW-D


def _relative_positions(
    encoder: Any,
    divisor: float,
    hidden_states: Tensor,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
) -> Tensor | None:
    import torch

    if not encoder.relative_attention or relative_pos is not None:
        return relative_pos
    rows = (query_states if query_states is not None else hidden_states).size(-2)
    places = [torch.arange(size, device=hidden_states.device) for size in (rows, hidden_states.size(-2))]
    distance = divided(places[0][:, None] - places[1][None, :], divisor)
    if encoder.position_buckets > 0 and encoder.max_relative_positions > 0:
        bucket: Any = inspect.getmodule(type(encoder))
        distance = bucket.make_log_bucket_position(distance, encoder.position_buckets, encoder.max_relative_positions)
    return distance.long()[None]


def _by_pairs(module: Any, original: Any, buckets: Buckets) -> Callable[..., Any]:
    del original
    return functools.partial(_relative_positions, module, buckets.divisor)


# -- XLNet


def _sines(original: Callable[..., Tensor], divisor: float, pos_seq: Tensor, *args: Any, **kw: Any) -> Tensor:
    return original(pos_seq / divisor, *args, **kw)


def _by_sines(module: Any, original: Any, buckets: Buckets) -> Callable[..., Any]:
    del module
    return functools.partial(_sines, original, buckets.divisor)


def _always(module: Any) -> bool:
    del module
    return True


def _never(module: Any) -> bool:
    del module
    return False


KINDS = (
    Kind(
        "_relative_position_bucket",
        ("relative_attention_bias", "relative_attention_max_distance"),
        "relative_attention_max_distance",
        _always,
        _by_distance,
    ),
    Kind("relative_position_bucket", ("relative_attention_bias", "compute_position_bias"), None, _always, _by_default),
    Kind(
        "_position_bucket",
        ("relative_attention_bias", "max_distance", "num_segments"),
        "max_distance",
        _always,
        _by_distance,
    ),
    Kind(
        "get_rel_pos",
        ("relative_attention", "position_buckets", "max_relative_positions"),
        "max_relative_positions",
        lambda module: module.position_buckets > 0,
        _by_pairs,
    ),
    Kind("positional_embedding", ("relative_positional_encoding", "clamp_len"), None, _never, _by_sines),
)

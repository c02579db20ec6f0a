"""Models with a learned bias by distance (or XLNet's sines of it): their distances scaled before they are looked up.

What is replaced is the one method of a module that turns distances into buckets, per instance. Nothing depends on the
length of a call, so cached generation and a full forward agree as they did. No length is out of range for such a
model: distances beyond the largest share one bucket, and the target length says up to where they are told apart as in
training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ropepatch.errors import RopepatchError, UnsupportedModelError, VerificationError
from ropepatch.families._rotary import owner_of, part_of
from ropepatch.families._site import Site
from ropepatch.methods._base import MethodOptions
from ropepatch.methods._buckets import BucketMethod, Buckets
from ropepatch.surgery import _relative_grid
from ropepatch.surgery._bucketing import Kind, bucketing_modules
from ropepatch.surgery._changes import AttributeChange, Change, revert_all
from ropepatch.surgery._lengths import stated_length
from ropepatch.surgery._probe import run, tokens

# Enough for a distance that is not 0.
_TOKENS = 4


@dataclass(frozen=True)
class Patched:
    """What was done.

    Attributes:
        changes: in the order they were made.
        sites: the modules as plain dicts.
        original_length, target_length: in tokens; None where nothing states the trained length.
    """

    changes: list[Change]
    sites: list[dict[str, Any]]
    original_length: int | None
    target_length: int | None


def takes(sites: Sequence[Site], method: Any) -> bool:
    """Whether relative biases are what the model's text part knows order by, and `method` is one that changes them."""
    text = [site for site in sites if site.part == "text"]
    biased = any(site.mechanism == "relative_bias" for site in text)
    # With position tables beside the bias, half a patch would be a wrong one.
    alone = all(site.mechanism in ("relative_bias", "none") for site in text)
    return biased and alone and "relative_bias" in method.mechanisms


def apply(
    host: nn.Module, method: Any, options: MethodOptions, *, original_length: int | None, verify: bool
) -> Patched:
    """Put `linear` or a `BucketMethod` in force. On any failure the model is as before.

    Args:
        verify: run a few tokens and see that the model asks each changed module.

    Raises:
        UnsupportedModelError: the model buckets its distances in no way that is known, or in no logarithmic one.
        VerificationError: a changed module is not asked.
    """
    buckets = method.compute(options) if isinstance(method, BucketMethod) else Buckets(divisor=options.factor)  # type: ignore[attr-defined]
    found = [(path, kind) for path, kind in bucketing_modules(host) if part_of(host, path) == "text"]
    _refuse(host, method, buckets, found)
    changes: list[Change] = []
    try:
        for path, kind in found:
            _change(host, path, kind, buckets, changes)
        if verify:
            for path, kind in found:
                _check_asked(host, path, kind.method)
    except BaseException:
        revert_all(host, changes)
        raise
    config: Any = host.config
    length = original_length or stated_length(config)
    factor = buckets.divisor * buckets.stretch
    described = [{"path": path, "method": kind.method, "mechanism": "relative_bias"} for path, kind in found]
    return Patched(changes, described, length, None if length is None else round(length * factor))


def _refuse(host: Any, method: Any, buckets: Buckets, found: Sequence[tuple[str, Kind]]) -> None:
    kind = host.config.model_type
    if not found and _relative_grid.windows(host):
        images = getattr(host, "main_input_name", "") == "pixel_values"
        raise UnsupportedModelError(
            f"the biases of this {kind} model are for offsets within a window, and "
            + (f"{method.name!r} has no form for these" if images else "it reads no images that could grow with it"),
            hint="'linear' makes the windows larger" if images else None,
        )
    if not found:
        raise UnsupportedModelError(f"how this {kind} model turns distances into biases is not known")
    rigid = [path for path, way in found if not way.stretches(host.get_submodule(path))]
    if buckets.stretch != 1 and rigid:
        raise UnsupportedModelError(
            f"{method.name!r} stretches logarithmic buckets, and this {kind} model has none at {rigid[0]}",
            hint="'linear' divides its distances",
        )


def _change(host: nn.Module, path: str, kind: Kind, buckets: Buckets, changes: list[Change]) -> None:
    module: Any = host.get_submodule(path)
    scaled = kind.scaled(module, getattr(module, kind.method), buckets)
    if kind.largest is not None and buckets.stretch != 1:
        largest = round(getattr(module, kind.largest) * buckets.stretch)
        changes.append(AttributeChange.apply(host, path, kind.largest, largest))
    changes.append(AttributeChange.apply(host, path, kind.method, scaled))


class _Asked(BaseException):
    """Not an Exception, so that a model's own error handling does not swallow it."""


def _stop(*_: Any, **__: Any) -> None:
    raise _Asked


def _check_asked(host: nn.Module, path: str, name: str) -> None:
    owner = host.get_submodule(owner_of(host, path))
    change = AttributeChange.apply(host, path, name, _stop)
    try:
        run(owner, tokens(owner, _TOKENS))
    except _Asked:
        return
    except RopepatchError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"its text part does not run on a few tokens ({type(error).__name__}: {error})", hint="or pass verify=False"
        ) from error
    finally:
        change.revert(host)
    raise VerificationError(f"the model does not ask {path}.{name}, so the patch would have no effect")

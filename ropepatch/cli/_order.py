"""The pictures of order that `ropepatch plot` draws: of a model as it is and patched, or of a made table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ropepatch.cli._shared import apply_patch
from ropepatch.errors import ModelLoadError, UsageError, first_line

if TYPE_CHECKING:
    from ropepatch.plotting.order.reading import Attention

LONGEST = 1 << 17
"""Tokens that a picture covers at most by default."""


class Wish(NamedTuple):
    """What the command line asks for.

    Attributes:
        model: folder, hub id or demo; None draws a table of sines and cosines, or a plain rotation.
        patch, options: a method and its options.
        length: tokens to cover; None chooses.
        dim: width of a made table, rotated dimensions of a made rotation.
        thetas: bases of made tables or rotations.
        site: the table or attention to draw, a part of its name; None is the first.
        output: the file.
    """

    model: str | None
    patch: str | None
    options: dict[str, Any]
    length: int | None
    dim: int
    thetas: list[float]
    site: str | None
    output: Path


class _Seen(NamedTuple):
    """A model's attention before and after the patch."""

    before: Attention
    after: Attention | None
    label: str
    trained: int | None
    target: int | None


def draw(kind: str, wish: Wish) -> None:
    """Draw one of `KINDS` to `wish.output`."""
    KINDS[kind](wish)


def _table(wish: Wish) -> None:
    from ropepatch.plotting.order.table import position_table

    rows, title = _rows(wish)
    position_table(rows, title=title, path=wish.output)


def _likeness(wish: Wish) -> None:
    from ropepatch.plotting.order.table import position_likeness

    rows, title = _rows(wish)
    position_likeness(rows, title=title, path=wish.output)


def _rows(wish: Wish) -> tuple[Any, str]:
    import torch

    if wish.model is None:
        from ropepatch.methods._sinusoid import sinusoid_table

        if len(wish.thetas) != 1:
            raise UsageError("a table has one base", given=wish.thetas)
        length = wish.length or 50
        title = f"sines and cosines, {length} positions, {wish.dim} dimensions, base {wish.thetas[0]:g}"
        return sinusoid_table(torch.arange(length), wish.dim, base=wish.thetas[0]), title
    from ropepatch.plotting.order.reading import tables

    model = _weights(wish.model)
    apply_patch(model, wish.patch, wish.options)
    table = _choose(tables(model), wish.site)
    name = f"{wish.model}: {table.where}, {table.mechanism}" + (f", {wish.patch}" if wish.patch else "")
    return table.rows[: wish.length], name


def _decay(wish: Wish) -> None:
    import torch

    from ropepatch.plotting.order import numbers
    from ropepatch.plotting.order.lines import decay

    trained = None
    if wish.model is None:
        shown = {f"theta {theta:g}": made for theta, made in _rotations(wish).items()}
        length = wish.length or 4096
    else:
        seen = _attention(wish)
        trained = seen.trained
        shown = {"unpatched": seen.before} | ({seen.label: seen.after} if seen.after else {})
        length = wish.length or _reach(seen)
    distances = torch.arange(length)
    curves = {
        name: tuple(
            numbers.over_distance(measure, part.scheme, part.rotary, length - 1, distances)
            for measure in (numbers.match, numbers.bound)
        )
        for name, part in shown.items()
    }
    decay(distances, curves, trained_length=trained, path=wish.output)  # type: ignore[arg-type]


def _wavelengths(wish: Wish) -> None:
    from ropepatch.plotting.order.lines import plane_wavelengths

    if wish.model is None:
        shown = {f"theta {theta:g}": made for theta, made in _rotations(wish).items()}
        trained = target = None
    else:
        seen = _attention(wish)
        shown = {"unpatched": seen.before} | ({seen.label: seen.after} if seen.after else {})
        trained, target = seen.trained, seen.target
    frequencies = {name: _frequencies(part, wish) for name, part in shown.items()}
    plane_wavelengths(frequencies, trained_length=trained, target_length=target, path=wish.output)


def _bias(wish: Wish) -> None:
    from ropepatch.plotting.order.lines import bias_curves
    from ropepatch.plotting.order.numbers import bias_by_distance, spread
    from ropepatch.plotting.order.reading import native_biases

    if wish.model is not None and native_biases(_outline(wish.model)):
        model = _weights(wish.model)
        apply_patch(model, wish.patch, wish.options)
        native = _choose(native_biases(model), wish.site)
        distances, bias = native.over(wish.length or 512)
        label = _label(wish) if wish.patch else wish.model
        bias_curves(distances, bias, title=f"{label}, {native.where}", path=wish.output)
        return
    seen = _attention(wish)
    part = seen.after or seen.before
    length = wish.length or min(_reach(seen), 4096)
    distances = spread(length, 1024)
    bias = bias_by_distance(part.scheme, part.learned, length - 1, distances)
    bias_curves(distances, bias, title=f"{seen.label}, {part.where}", path=wish.output)


def _remap(wish: Wish) -> None:
    from ropepatch.plotting.order.remap import distance_matrix

    seen = _attention(wish)
    part = seen.after or seen.before
    length = wish.length or _reach(seen)
    distance_matrix(
        part.scheme, length, trained_length=seen.trained, title=f"{seen.label}, {part.where}", path=wish.output
    )


def _planes(wish: Wish) -> None:
    from ropepatch.plotting.order.planes import rotation_planes

    if wish.model is None:
        if len(wish.thetas) != 1:
            raise UsageError("the planes of one base are drawn", given=wish.thetas)
        (made,) = _rotations(wish).values()
        rotation_planes(_frequencies(made, wish), wish.length or 4096, path=wish.output)
        return
    seen = _attention(wish)
    rotation_planes(
        _frequencies(seen.after or seen.before, wish),
        wish.length or _reach(seen),
        trained_length=seen.trained,
        path=wish.output,
    )


KINDS: dict[str, Callable[[Wish], None]] = {
    "bias": _bias,
    "decay": _decay,
    "likeness": _likeness,
    "planes": _planes,
    "remap": _remap,
    "table": _table,
    "wavelengths": _wavelengths,
}


def _rotations(wish: Wish) -> dict[float, Attention]:
    """A plain rotation for each base."""
    import torch

    from ropepatch.attention.scheme import Rotary, rotated
    from ropepatch.plotting.order.reading import Attention

    if wish.dim < 2 or wish.dim % 2:
        raise UsageError("rotary dimensions are rotated in pairs", given=wish.dim, allowed="an even number from 2")
    exponents = torch.arange(0, wish.dim, 2, dtype=torch.float64) / wish.dim
    return {theta: Attention("", 0, rotated(), Rotary((theta**-exponents).float())) for theta in wish.thetas}


def _frequencies(part: Attention, wish: Wish) -> Any:
    """The frequencies that the first rotated segment turns by at the end of the input."""
    last = (wish.length or 1) - 1
    for segment in part.scheme.segments(last, last + 1):
        used = segment.rotary or part.rotary
        if segment.query is not None and used is not None:
            return used.inv_freq
    raise UsageError(f"{part.where or 'the attention'} rotates nothing, so it has no planes to draw")


def _attention(wish: Wish) -> _Seen:
    import ropepatch
    from ropepatch.plotting.order.reading import attentions

    if wish.model is None:
        raise UsageError("this picture is one of a model", hint="name it with --model")
    model = _weights(wish.model) if _runs(wish.patch) else _outline(wish.model)
    before = _choose(attentions(model), wish.site)
    trained = ropepatch.inspect(model).trained_length
    if wish.patch is None:
        return _Seen(before, None, wish.model, trained, trained)
    apply_patch(model, wish.patch, wish.options)
    found = ropepatch.inspect(model)
    return _Seen(before, _choose(attentions(model), wish.site), _label(wish), trained, found.target_length)


def _label(wish: Wish) -> str:
    """The patch in words."""
    settings = ", ".join(f"{name}={value}" for name, value in wish.options.items())
    return str(wish.patch) + (f" ({settings})" if settings else "")


def _reach(seen: _Seen) -> int:
    """Tokens to cover: the target length, at least twice the trained one."""
    return min(LONGEST, max(2 * (seen.trained or 2048), seen.target or 0))


def _choose(found: list[Any], site: str | None) -> Any:
    if site is None:
        return found[0]
    named = [item for item in found if site in item.where]
    if not named:
        raise UsageError("no such site", given=site, allowed=[item.where for item in found])
    return named[0]


def _runs(patch: str | None) -> bool:
    """Whether the method watches the model run, which takes weights."""
    import ropepatch

    return any(
        patch in (method.name, *method.aliases) for method in ropepatch.methods() if method.seam != "frequencies"
    )


def _outline(name: str) -> Any:
    from ropepatch.cli._skeleton import build_skeleton
    from ropepatch.loading import model_source

    return build_skeleton(model_source(name))


def _weights(name: str) -> Any:
    """Any model of transformers with its weights, by the class that its config names."""
    from ropepatch.cli._skeleton import class_of
    from ropepatch.loading import model_source
    from ropepatch.saving import from_pretrained, is_saved_patched

    source = model_source(name)
    if is_saved_patched(source):
        return from_pretrained(source)
    import transformers
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        return class_of(config).from_pretrained(source).eval()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelLoadError(f"cannot load {name}: {first_line(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()

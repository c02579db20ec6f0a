"""What ropepatch does to every model type that reads images, video, sound or time series, measured, never guessed.

    python scripts/vision_support.py --output docs/support-vision.md      # some three minutes on one core
    python scripts/vision_support.py --type swin --type clip              # prints the page for these

A tiny random model of the real class is built for each type, and each of its parts is patched with every method,
verified and undone. Types whose tiny model cannot be built are listed with the cause. Ends with status 1 when anything
but a clear refusal went wrong.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from ropepatch.compat import versions
from ropepatch.testing.modalities import (
    ATTENTION,
    FACTOR,
    METHODS,
    PLAIN,
    POSITIONS,
    PartSupport,
    measure_parts,
    modality_types,
)

PARTS = ("images", "video", "sound", "time series", "text", "other")
TITLES = {"images": "Images", "sound": "Sound", "text": "The text of these models", "other": "Other inputs"}
ABOUT = """Every model type of transformers' auto classes that reads images, video, sound or time series, alone or
beside text. One row for parts that behave alike; types are named by their `model_type`. A part that is not text is
patched by itself: `ropepatch.patch(model.vision_tower, ...)`.

- *positions*: what `ropepatch.inspect` finds there.
- "yes": patched by `linear` and `yarn` with factor {factor:g} and by `nope`, verified, and undone to the last bit. For
  images, `linear` was run on an image of twice the size.
- "unverified": `verify` refuses, because the part cannot be run on tokens alone; with `verify=False` it is patched and
  undone, and whether it took effect was not looked at.
- "no": a clear error, and the part as before; the reasons stand below each table. `yarn` stands for all methods that
  change rotary frequencies; it is refused where a part is not rotary, and this is not repeated below."""
WINDOWS = """## Biases over windows of patches

BEiT, Data2Vec and Swin learn a number for each offset down and across within a window of patches. `linear` interpolates
this grid along both axes, bilinearly or (`interpolation="cubic"`) bicubically; the rows of BEiT's class token are kept.

- BEiT and Data2Vec: the window is the whole image, so both grow by the factor. With `interpolation="linear"` the
  patched model equals, to the last bit, what transformers computes for the larger image. Oblong images are refused:
  transformers reads their table with its axes mixed up.
- Swin, also as the encoder of Donut and MaskFormer: a larger image needs no larger table, because windows keep their
  size. `linear` makes windows and images larger by the factor, as the published finetuning for larger images does:
  `ropepatch.patch(model, "linear", factor=12 / 7, interpolation="cubic")` makes 384 x 384 pixels in windows of 12 x 12
  of 224 x 224 in windows of 7 x 7.
- Swin v2 and Swin2SR: the biases are computed from the offsets, spread over the same range whatever the window. Nothing
  is interpolated; the model is the one that transformers builds for a larger `window_size`. A checkpoint with
  `pretrained_window_sizes` reaches larger windows by its own law, and is refused.
- SAM, ViTDet's kin: rows for each axis, which the model itself interpolates; the table beside them is made larger.
- An absolute table beside the biases is made larger too, as in ViT."""
NONE = """## No positions to patch

`inspect` finds none in these.

- No attention at all; order comes from convolution, pooling or recurrence: {plain}.
- Attention, and nothing that is called a position: {attention}.
- Attention, and something that is called a position (in brackets) but is neither a table nor frequencies: computed in
  every forward, or a convolution over neighbours: {positions}."""


def page(rows: list[PartSupport]) -> str:
    """The whole page."""
    found = ", ".join(f"{name} {number}" for name, number in versions().items())
    built = [row for row in rows if row.part]
    counted = "{} types: {} built, {} with positions, {} of them patched in one part at least."
    placed = [row for row in built if row.mechanism != "none"]
    patched = [row for row in placed if any(word == "yes" for word, _ in row.outcomes.values())]
    parts = [
        "# Support of models that read images, sound and time series",
        "Written by `python scripts/vision_support.py`, with " + found + ". Every cell is a measurement on a tiny "
        "random model of the real class; nothing is typed in by hand.",
        ABOUT.format(factor=FACTOR),
        counted.format(*(len(types(some)) for some in (rows, built, placed, patched))),
    ]
    for part in PARTS:
        parts += section(part, [row for row in built if row.part == part and row.outcomes])
    parts.append(WINDOWS)
    parts.append(without([row for row in built if row.mechanism == "none"]))
    idle = [row for row in rows if not row.part]
    if idle:
        parts.append("## Not measured\n\nTheir tiny models could not be built here:\n\n" + not_built(idle))
    return "\n\n".join(parts) + "\n"


def types(rows: list[PartSupport]) -> set[str]:
    """The model types of some parts."""
    return {row.model_type for row in rows}


def section(part: str, rows: list[PartSupport]) -> list[str]:
    """One table, and the reasons of its refusals."""
    if not rows:
        return []
    merged: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for row in rows:
        words = tuple("no" if row.outcomes[name][0] == "refused" else row.outcomes[name][0] for name in METHODS)
        merged.setdefault((row.mechanism, words), []).append(row.model_type)
    lines = ["| positions | " + " | ".join(f"`{name}`" for name in METHODS) + " | types |", "|---" * 5 + "|"]
    for (mechanism, words), names in sorted(merged.items()):
        lines.append(f"| {mechanism} | {' | '.join(words)} | {listed(names)} |")
    return [f"## {TITLES.get(part, part.capitalize())}", "\n".join(lines), *reasons(rows)]


def reasons(rows: list[PartSupport]) -> list[str]:
    """Every reason once, with the types and methods that it is about."""
    about: dict[str, tuple[set[str], set[str]]] = {}
    for row in rows:
        for method, (_, why) in row.outcomes.items():
            if why and not (method == "yarn" and "rotary" not in row.mechanism):
                types, methods = about.setdefault(why, (set(), set()))
                types.add(row.model_type)
                methods.add(f"`{method}`")
    lines = [
        f"- {', '.join(sorted(methods)) if len(methods) < len(METHODS) else 'all'}: {why}: {listed(types)}."
        for why, (types, methods) in sorted(about.items(), key=lambda item: (-len(item[1][0]), item[0]))
    ]
    return ["\n".join(lines)] if lines else []


def without(rows: list[PartSupport]) -> str:
    """The types in which nothing was found."""
    called = [f"{row.model_type} ({row.detail.removeprefix(POSITIONS)})" for row in rows if POSITIONS in row.detail]
    return NONE.format(
        plain=listed(row.model_type for row in rows if row.detail == PLAIN),
        attention=listed(row.model_type for row in rows if row.detail == ATTENTION),
        positions=listed(called),
    )


def not_built(rows: list[PartSupport]) -> str:
    """One line a cause."""
    about: dict[str, list[str]] = {}
    for row in rows:
        about.setdefault(cause(row.detail), []).append(row.model_type)
    return "\n".join(f"- {listed(names)}: {why}" for why, names in sorted(about.items(), key=lambda item: item[1]))


def cause(detail: str) -> str:
    """Why a model was not built, in a line: of a missing library, its name."""
    words = detail.removeprefix("no tiny model can be built (").removesuffix(")").split()
    if "library" in words:
        return f"needs the package {words[words.index('library') - 1]}"
    # Not where this machine keeps its packages.
    line = re.sub(r" (from|in) '/\S*", "", " ".join(words))
    return line if len(line) <= 160 else line[:157].rstrip() + "..."


def listed(names: Iterable[str]) -> str:
    """Names in order, or a word for none."""
    return ", ".join(sorted(set(names))) or "none"


def main() -> int:
    """Measure, write, and say whether anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", action="append", dest="types", help="measure these model types only")
    parser.add_argument("--output", type=Path, help="the page, Markdown")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    wanted = [name for name in modality_types() if not arguments.types or name in arguments.types]
    rows: list[PartSupport] = []
    for number, name in enumerate(wanted, 1):
        rows += measure_parts(name)
        print(f"[{number}/{len(wanted)}] {name}: {rows[-1].mechanism or rows[-1].detail}", file=sys.stderr, flush=True)
    if arguments.output:
        arguments.output.write_text(page(rows), encoding="utf-8")
    else:
        print(page(rows))
    wrong = [
        f"{row.model_type} ({row.part}): {method}: {word} {why}"
        for row in rows
        for method, (word, why) in row.outcomes.items()
        if word not in ("yes", "refused", "unverified")
    ]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

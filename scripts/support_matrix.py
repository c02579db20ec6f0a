"""What ropepatch does to every text model type of the installed transformers, measured, never guessed.

    python scripts/support_matrix.py [--kind causal-lm] [--type llama] --output docs/support.md --json docs/support.json

For each type: a tiny random model of the real class is built, inspected, patched with every case, compared with a
model that transformers itself scales the same way, rebuilt from the patched config, unpatched, and held against its
former self bit for bit. Ends with status 1 when anything but a clear refusal went wrong.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path

import transformers

from ropepatch.compat import versions
from ropepatch.testing import model_types
from ropepatch.testing.support import CASES, CLOSE_FREQUENCIES, CLOSE_LOGITS, CLOSE_RELOADED, Outcome, Support, measure
from ropepatch.testing.tiny import KINDS

TITLES = {
    "causal-lm": "Causal language models",
    "encoder": "Encoders",
    "encoder-decoder": "Encoder-decoders",
    "text": "Other text models, mostly the text parts of multimodal models",
}
MARKS = {
    "exact": "=",
    "close": "≈",
    "patched": "✓",
    "refused": "–",
    "differs": "**≠**",
    "no effect": "**0**",
    "error": "**!**",
}
WRONG = ("differs", "no effect", "error")


def measured(model_type: str, kind: str) -> Support:
    """`measure`, with a bug that stops it turned into an error of every case."""
    try:
        return measure(model_type, kind)
    except Exception as error:  # noqa: BLE001 (the matrix reports bugs, it does not stop at the first)
        traceback.print_exc()
        outcome = Outcome("error", detail=f"{type(error).__name__}: {' '.join(str(error).split())}")
        return Support(model_type, kind, built=True, outcomes={case.name: outcome for case in CASES})


def markdown(rows: list[Support]) -> str:
    """The whole page."""
    found = versions()
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    parts = [
        "# Support matrix",
        "Written by `python scripts/support_matrix.py`, with "
        + ", ".join(f"{name} {number}" for name, number in found.items())
        + ". Every cell is a measurement on a tiny random model of the real class; nothing is typed in by hand.",
        legend(),
        summary(rows, kinds),
    ]
    for kind in kinds:
        parts += [f"## {TITLES[kind]}", *sections([row for row in rows if row.kind == kind])]
    return "\n\n".join(parts) + "\n"


CONFIG = (
    "*config*: plain transformers, given the patched model's config and weights, computes the same logits: yes, no, or "
    "only for some methods. Where it says no, the patched model works, but its config alone does not rebuild it."
)


def legend() -> str:
    """What the marks mean."""
    return "\n".join(
        [
            "| mark | meaning |",
            "|---|---|",
            "| = | patched; the logits equal those of a model that transformers itself scales so, bit for bit |",
            f"| ≈ | the same, frequencies within {CLOSE_FREQUENCIES:g} (relative) and logits within {CLOSE_LOGITS:g} |",
            "| ✓ | patched; transformers has no way of its own to do this to this model |",
            "| – | refused, with the reason below; the model is untouched |",
            "| **≠**, **0**, **!** | unlike transformers' own; without effect; failed |",
            "",
            CONFIG,
        ]
    )


def summary(rows: list[Support], kinds: Iterable[str]) -> str:
    """One line a kind, one line a case."""
    lines = ["| kind | types | built and run | rotary | patched by `linear` | agree with transformers' `linear` |"]
    lines += ["|---|---|---|---|---|---|"]
    for kind in kinds:
        mine = [row for row in rows if row.kind == kind]
        rotary = [row for row in mine if row.mechanism.startswith("rotary")]
        linear = [row.outcomes["linear"].status for row in rotary if row.outcomes]
        agree = sum(status in ("exact", "close") for status in linear)
        patched = agree + linear.count("patched")
        run = sum(bool(row.outcomes) for row in mine)
        lines.append(f"| {kind} | {len(mine)} | {run} | {len(rotary)} | {patched} | {agree} |")
    lines += ["", "| method, rotary models of all kinds | = | ≈ | ✓ | – | wrong |", "|---|---|---|---|---|---|"]
    for case in CASES:
        counts = collections.Counter(
            row.outcomes[case.name].status for row in rows if row.outcomes and row.mechanism.startswith("rotary")
        )
        wrong = sum(counts[status] for status in WRONG)
        cells = [counts["exact"], counts["close"], counts["patched"], counts["refused"], wrong]
        lines.append(f"| {case.name} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def sections(rows: list[Support]) -> list[str]:
    """The rotary types as a table, the others by mechanism, what could not be run, and the notes."""
    rotary = [row for row in rows if row.outcomes and row.mechanism.startswith("rotary")]
    others = [row for row in rows if row.outcomes and not row.mechanism.startswith("rotary")]
    idle = [row for row in rows if not row.outcomes]
    parts = []
    if rotary:
        header = ["type", "mechanism", *(case.name for case in CASES), "config"]
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(cells(row)) + " |" for row in rotary]
        parts.append("\n".join(lines))
    if others:
        by_mechanism: dict[str, list[str]] = {}
        for row in others:
            by_mechanism.setdefault(row.mechanism, []).append(row.model_type)
        lines = ["No rotary positions; every method above is refused, and the model untouched:", ""]
        lines += [f"- {mechanism}: {', '.join(names)}" for mechanism, names in sorted(by_mechanism.items())]
        parts.append("\n".join(lines))
    if idle:
        parts.append("\n".join(["Not measured:", "", *(f"- {row.model_type}: {row.detail}" for row in idle)]))
    notes = reasons(rotary)
    if notes:
        parts.append("\n".join(["Notes:", "", *notes]))
    return parts


def cells(row: Support) -> list[str]:
    """One line of the table."""
    mechanism = f"{row.mechanism}, {row.native_scaling}" if row.native_scaling else row.mechanism
    marks = [MARKS[row.outcomes[case.name].status] for case in CASES]
    return [row.model_type, mechanism, *marks, config_says(row)]


def config_says(row: Support) -> str:
    """Whether the patched config is the whole truth for plain transformers."""
    told = [
        outcome.reloaded is not None and outcome.reloaded <= CLOSE_RELOADED
        for outcome in row.outcomes.values()
        if outcome.status not in ("refused", "error")
    ]
    return "" if not told else "yes" if all(told) else "some" if any(told) else "no"


def reasons(rows: list[Support]) -> list[str]:
    """Every detail once, with the types and cases that it is about."""
    about: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for name, outcome in row.outcomes.items():
            detail = outcome.detail.replace(f"of {row.model_type} ", "").replace("|", r"\|")
            if outcome.status in ("differs", "no effect") and not detail:
                detail = f"{outcome.status} (logits {outcome.logits}, frequencies {outcome.frequencies})"
            if detail:
                about.setdefault(detail, {}).setdefault(row.model_type, []).append(name)
    return [
        "- " + "; ".join(f"{name} ({', '.join(which)})" for name, which in types.items()) + f": {detail}"
        for detail, types in about.items()
    ]


def as_json(rows: list[Support]) -> str:
    """Every number, one line a type, so that two runs can be compared line by line."""
    lines = ",\n".join(json.dumps(row.to_dict(), allow_nan=False) for row in rows)
    return f'{{"versions": {json.dumps(versions())},\n"types": [\n{lines}\n]}}\n'


def main() -> int:
    """Measure, write, and say whether anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", action="append", choices=KINDS, help="measure these kinds only")
    parser.add_argument("--type", action="append", dest="types", help="measure these model types only")
    parser.add_argument("--output", type=Path, help="the page, Markdown")
    parser.add_argument("--json", type=Path, help="every number")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()

    wanted = [
        (kind, name)
        for kind in arguments.kind or KINDS
        for name in model_types(kind)
        if not arguments.types or name in arguments.types
    ]
    rows: list[Support] = []
    for number, (kind, name) in enumerate(wanted, 1):
        rows.append(measured(name, kind))
        marks = " ".join(MARKS[outcome.status] for outcome in rows[-1].outcomes.values())
        print(f"[{number}/{len(wanted)}] {kind} {name}: {marks or rows[-1].detail}", file=sys.stderr, flush=True)
    page = markdown(rows)
    if arguments.output:
        arguments.output.write_text(page, encoding="utf-8")
    else:
        print(page)
    if arguments.json:
        arguments.json.write_text(as_json(rows), encoding="utf-8")
    wrong = [
        f"{row.model_type}: {name}: {outcome.status} {outcome.detail}"
        for row in rows
        for name, outcome in row.outcomes.items()
        if outcome.status in WRONG
    ]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""Which models with position tables take which methods, measured on tiny random models of the real classes.

    python scripts/table_support.py        # prints Markdown; some ten minutes on one core

"yes": patched and verified, run at four times the trained length, undone to the last bit. "refused": a clear error, and
the model as before; the reasons stand below the table. Anything else is a bug, and is named.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ropepatch
from ropepatch.errors import RopepatchError
from ropepatch.testing import forward_logits, model_types, tiny_inputs, tiny_model

METHODS = ("linear", "hierarchical", "sinusoidal", "nope", "alibi", "rope")
FACTOR = 4
GROUPS = {"encoder": "encoders", "causal-lm": "decoders", "encoder-decoder": "encoder-decoders", "text": "text parts"}


@dataclass(frozen=True)
class Row:
    """What one model type does: `cells` has a word for each of METHODS, `reasons` pairs what is refused with why."""

    model_type: str
    group: str
    mechanism: str
    cells: tuple[str, ...]
    reasons: tuple[tuple[str, str], ...]


def main() -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = list(measured())
    print("| models | positions | " + " | ".join(f"`{name}`" for name in METHODS) + " |")
    print("|---" * (len(METHODS) + 2) + "|")
    merged: dict[tuple[Any, ...], list[str]] = {}
    for row in rows:
        merged.setdefault((row.group, row.mechanism, row.cells), []).append(row.model_type)
    for (group, mechanism, cells), names in sorted(merged.items()):
        print(f"| {group}: {', '.join(sorted(names))} | {mechanism} | " + " | ".join(cells) + " |")
    reasons: dict[str, tuple[set[str], set[str]]] = {}
    for row in rows:
        for method, reason in row.reasons:
            names, methods = reasons.setdefault(reason, (set(), set()))
            names.add(row.model_type)
            methods.add(f"`{method}`")
    print()
    for reason, (names, methods) in sorted(reasons.items()):
        which = "all" if len(methods) == len(METHODS) else ", ".join(sorted(methods))
        print(f"- {', '.join(sorted(names))} ({which}): {reason}.")


def measured() -> Iterator[Row]:
    for kind, group in GROUPS.items():
        for model_type in model_types(kind):
            try:
                model = tiny_model(model_type, kind)
            except RopepatchError:
                continue
            sites = [site for site in ropepatch.inspect(model).sites if site["part"] == "text"]
            found = {site["mechanism"] for site in sites}
            if not found & {"learned", "sinusoidal"} or "rotary" in found:
                continue
            outcomes = [outcome(model, method) for method in METHODS]
            reasons = tuple((method, why) for method, (_, why) in zip(METHODS, outcomes, strict=True) if why)
            mechanism = ropepatch.inspect(model).mechanism
            yield Row(model_type, group, mechanism, tuple(word for word, _ in outcomes), reasons)


def outcome(model: Any, method: str) -> tuple[str, str]:
    """A word for the table and, for a refusal, its reason without the model's own names."""
    before = forward_logits(model, **tiny_inputs(model, length=40))
    try:
        ropepatch.patch(model, method, factor=FACTOR)
        reach = ropepatch.inspect(model).target_length or 0
        # ProphetNet reads one position ahead.
        forward_logits(model, **tiny_inputs(model, length=reach - (model.config.model_type == "prophetnet")))
        ropepatch.unpatch(model)
    except RopepatchError as error:
        word, why = "refused", error.message
    else:
        word, why = "yes", ""
    if not forward_logits(model, **tiny_inputs(model, length=40)).equal(before):
        return "bug: not undone", ""
    for site in ropepatch.inspect(model).sites:
        why = re.sub(re.escape(site["path"]) + r"[\w.]*", "its table", why) if site["path"] else why
    why = re.sub(r"(of )?this \S+ model", r"\1the model", why).replace("the position table its table", "its table")
    return word, why


if __name__ == "__main__":
    main()

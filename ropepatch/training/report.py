"""The evaluations of a recipe, before and after training, and the page that sets them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropepatch.evaluation import _html as html
from ropepatch.evaluation.folder import SUMMARY
from ropepatch.evaluation.tables import lines, pipe_table
from ropepatch.files import write_atomic
from ropepatch.training.folder import EVAL, LOSS, RECIPE, REPORT, flat
from ropepatch.training.log import LOG, Line, read_log
from ropepatch.training.recipe import EvalRun, Recipe

if TYPE_CHECKING:
    from ropepatch.evaluation.compare import Comparison

STAGES = ("unpatched", "before", "after")
HTML = "report.html"


def wanted(recipe: Recipe, stage: str) -> bool:
    """Whether a recipe measures the model "unpatched", "before" or "after" training."""
    section = recipe.eval
    # Without a patch the model as it was loaded is the model before training.
    asked = {"unpatched": section.unpatched and recipe.patch is not None, "before": section.before}
    return bool(section.runs) and asked.get(stage, section.after)


def folders(recipe: Recipe, output: Path, stage: str) -> list[Path]:
    """Where the evaluations of a stage are, in the order of `eval.runs`; a suite that is run twice gets a number."""
    names: list[str] = []
    for run in recipe.eval.runs:
        name = Path(run.suite).stem
        names.append(name if name not in names else f"{name}-{len(names) + 1}")
    return [output / EVAL / stage / name for name in names]


def is_measured(recipe: Recipe, output: Path, stage: str) -> bool:
    """Whether every evaluation of a stage is finished, or none is wanted."""
    return not wanted(recipe, stage) or all((path / SUMMARY).is_file() for path in folders(recipe, output, stage))


def measure(model: Any, tokenizer: Any, recipe: Recipe, output: Path, stage: str, *, progress: bool = True) -> None:
    """Run what is left of a stage's evaluations; launched as several processes, all share the work.

    Raises:
        UsageError: an evaluation cannot be run as asked.
        OutputError: its folder cannot be written.
    """
    from ropepatch.evaluation.runner import evaluate

    for run, path in zip(recipe.eval.runs, folders(recipe, output, stage), strict=True):
        if not (path / SUMMARY).is_file():
            evaluate(
                model,
                tokenizer,
                run.suite,
                **run.settings,
                output=path,
                model_name=recipe.model.name,
                progress=progress,
            )


def comparisons(recipe: Recipe, output: Path) -> list[tuple[EvalRun, Comparison]]:
    """For each evaluation of the recipe, its stages side by side; the first that was measured is the base."""
    from ropepatch.evaluation.compare import compare

    found = []
    for number, run in enumerate(recipe.eval.runs):
        paths = [folders(recipe, output, stage)[number] for stage in STAGES if wanted(recipe, stage)]
        there = [path for path in paths if (path / SUMMARY).is_file()]
        if there:
            found.append((run, compare(there, least=1)))
    return found


def write_report(recipe: Recipe, output: Path, record: dict[str, Any]) -> Path:
    """Write `loss.png`, `report.md` and `report.html`, from what the folder holds.

    Args:
        record: the content of `run.json`.

    Returns:
        The path of `report.md`.

    Raises:
        OutputError: a file cannot be written.
        DependencyError: matplotlib is missing.
    """
    from ropepatch.plotting import figure_bytes, training_curve

    log = read_log(output / LOG)
    curve = figure_bytes(training_curve([log]))
    write_atomic(output / LOSS, curve)
    compared = comparisons(recipe, output)
    title = f"Training: {recipe.model.name}" + (f", {recipe.patch.method}" if recipe.patch else "")
    lead = recipe.description or "No description."
    facts = _facts(log, record)
    write_atomic(output / REPORT, _markdown(title, lead, facts, compared))
    write_atomic(output / HTML, _page(title, lead, facts, compared, curve, recipe, record))
    return output / REPORT


def _facts(log: Sequence[Line], record: dict[str, Any]) -> dict[str, str]:
    facts = {"steps": str((record.get("trained") or {}).get("steps", 0))}
    if log:
        first, last = log[0], log[-1]
        facts |= {
            "loss": f"{first['loss']:.4f} at step {first['step']}, {last['loss']:.4f} at step {last['step']}",
            "tokens": f"{last['tokens']:,}",
            "time": f"{last['seconds']:,.0f} s, {last['tokens'] / max(last['seconds'], 1e-9):,.0f} tokens a second",
            "peak memory": f"{max(line['peak_memory_mib'] for line in log):,} MiB in the first process",
        }
    if (record.get("trained") or {}).get("stopped_early"):
        facts["stopped early"] = "the loss no longer fell"
    return facts


def _markdown(title: str, lead: str, facts: dict[str, str], compared: Sequence[tuple[EvalRun, Comparison]]) -> str:
    parts = [f"# {title}", lead, "\n".join(f"- {name}: {text}" for name, text in facts.items())]
    parts.append(f"![Loss by step]({LOSS})\n\nAll settings: [{RECIPE}]({RECIPE}).")
    for run, comparison in compared:
        parts += [f"## {run.suite}", *map(pipe_table, lines(comparison)), comparison.explanation()]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _page(
    title: str,
    lead: str,
    facts: dict[str, str],
    compared: Sequence[tuple[EvalRun, Comparison]],
    curve: bytes,
    recipe: Recipe,
    record: dict[str, Any],
) -> str:
    sections = [html.section("Training", html.definitions(facts), html.image(curve, "loss by step"))]
    for run, comparison in compared:
        tables = [html.table(table.headings, table.body) for table in lines(comparison)]
        images = [html.image(png, caption) for caption, png in _figures(comparison).items()]
        sections.append(html.section(run.suite, *tables, html.note(comparison.explanation()), *images))
    sections += [
        html.section("Recipe", html.definitions(flat(recipe.model_dump(mode="json", exclude={"description"})))),
        html.section("Versions", html.definitions({**record["versions"], **record["launch"]})),
    ]
    return html.page(title, lead, sections)


def _figures(comparison: Comparison) -> dict[str, bytes]:
    from ropepatch.plotting import accuracy_curve, figure_bytes, loss_by_position

    summaries, titles = [run.summary for run in comparison.runs], [run.name for run in comparison.runs]
    if comparison.measure == "loss":
        return {"loss by position": figure_bytes(loss_by_position(summaries, titles=titles))}
    return {"accuracy by prompt length": figure_bytes(accuracy_curve(summaries, titles=titles))}

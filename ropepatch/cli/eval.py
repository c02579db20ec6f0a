"""`ropepatch eval`: run a suite on a model, patched or not, into an output folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropepatch._data import data_names
from ropepatch.cli._matrix import is_first, run_matrix
from ropepatch.cli._served import (
    ApiKeyEnvOption,
    ApiOption,
    ConcurrencyOption,
    EndpointOption,
    OriginalLengthOption,
    RetriesOption,
    ServedOptions,
    TimeoutOption,
    TokenizerOption,
)
from ropepatch.cli._shared import (
    MODEL_HELP,
    JsonOption,
    PatchOption,
    SetOption,
    apply_patch,
    check_patch_options,
    parse_floats,
    parse_ints,
    parse_settings,
    print_json,
    say,
)
from ropepatch.errors import OptionError, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from ropepatch.evaluation.variants import Variant


def main(
    suite: Annotated[
        str,
        typer.Argument(
            metavar="SUITE", help=f"{', '.join(data_names('eval'))}, or the path of a YAML file.", show_default=False
        ),
    ],
    model: Annotated[
        list[str],
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help=f"{MODEL_HELP} May be repeated: a folder for each.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the results.", show_default=False)
    ],
    patch: PatchOption = None,
    settings: SetOption = None,
    matrix: Annotated[
        str | None,
        typer.Option("--matrix", metavar="FILE", help="Run under several patches: a YAML list, or a shipped name."),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Prompt lengths in tokens. [default: the suite's]")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(metavar="X,X,...", help="Places of what is hidden, 0 to 1. [default: the suite's]")
    ] = None,
    trials: Annotated[int | None, typer.Option(metavar="N", help="Prompts of each cell.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of everything that is drawn.")] = None,
    digits: Annotated[int | None, typer.Option(metavar="N", help="passkey: digits of each key.")] = None,
    window: Annotated[int | None, typer.Option(metavar="N", help="perplexity: tokens of a window.")] = None,
    stride: Annotated[int | None, typer.Option(metavar="N", help="perplexity: tokens between windows.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="K=V", help="Another setting of the suite; may be repeated.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="float32, bfloat16, float16, or auto: bfloat16 where it is fast.")
    ] = "auto",
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH ...", help="Text to hide things in or to predict: files, folders, datasets:NAME."),
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option("--chat-template/--no-chat-template", help="Put prompts into the tokenizer's chat template."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES", help="Stop after this time; trials go where intervals are widest, --trials at most."
        ),
    ] = None,
    endpoint: EndpointOption = None,
    tokenizer: TokenizerOption = None,
    api: ApiOption = None,
    api_key_env: ApiKeyEnvOption = None,
    timeout: TimeoutOption = None,
    retries: RetriesOption = None,
    concurrency: ConcurrencyOption = None,
    original_length: OriginalLengthOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run an evaluation and write its results to a folder.

    Each trial is on disk as soon as it is measured. The same command again goes on where it stopped; a folder of
    another configuration is refused. Under torchrun or accelerate launch the processes share the work.

    With --matrix, or with several models, each run has a folder of its own in DIR, and DIR a comparison of them; what a
    model cannot be patched with is told and passed over, and the exit status is 1.

    \b
    Examples:
      ropepatch eval passkey --model demo:smollm2 --lengths 1024,2048 --trials 2 --output runs/base
      ropepatch eval passkey -m demo:smollm2 --patch yarn --set factor=2 --lengths 12288 -o runs/yarn
      ropepatch eval passkey -m path/to/model --text book.txt --depths 0,0.5,1 -o runs/book
      ropepatch eval passkey -m demo:smollm2 --matrix untuned --lengths 4096,12288 --budget 60 -o runs/untuned
      ropepatch eval passkey --endpoint http://127.0.0.1:8080/v1 -m NAME --tokenizer path/to/model -o runs/served
    """
    served = ServedOptions(endpoint, tokenizer, api, api_key_env, timeout, retries, concurrency, original_length)
    loaded = {"--patch": patch, "--set": settings, "--matrix": matrix, "--dtype": None if dtype == "auto" else dtype}
    served.check(model, loaded)
    if api == "chat" and chat_template is None:
        chat_template = True
    check_patch_options(patch, settings)
    options = parse_settings(settings)
    grid: dict[str, Any] = {
        "lengths": None if lengths is None else parse_ints(lengths, name="--lengths"),
        "depths": None if depths is None else parse_floats(depths, name="--depths"),
        "trials": trials,
        "seed": seed,
        "digits": digits,
        "window": window,
        "stride": stride,
        "chat_template": chat_template,
        # Most suites take one text.
        "text": text[0] if text and len(text) == 1 else text,
    }
    for name, value in parse_settings(option, "--option").items():
        if grid.get(name) is not None:
            raise OptionError(f"{name} is given twice", given=f"--option {name}={value}")
        grid[name] = value
    if matrix is not None and patch is not None:
        raise UsageError("choose one of --matrix and --patch", hint="a patch can be a variant of the matrix")
    from ropepatch.evaluation.budget import Budget
    from ropepatch.evaluation.suites import load_suite
    from ropepatch.evaluation.variants import load_matrix, parse_variants
    from ropepatch.plotting import require_matplotlib

    # What can be refused without the model is refused before it is loaded.
    load_suite(suite, grid)
    if budget is not None:
        Budget(budget)
    require_matplotlib()
    if matrix is not None or len(model) > 1:
        variants = (
            parse_variants([{"method": patch or "unpatched", "options": options}])
            if matrix is None
            else load_matrix(matrix)
        )
        _many(suite, model, variants, grid=grid, dtype=dtype, output=output, budget=budget, as_json=as_json)
        return
    from ropepatch.evaluation.runner import evaluate
    from ropepatch.loading import load_model

    subject: Any
    if endpoint is None:
        subject, its_tokenizer = load_model(model[0], dtype=dtype)
        apply_patch(subject, patch, options)
    else:
        subject, its_tokenizer = served.load(model[0])
    result = evaluate(subject, its_tokenizer, suite, **grid, output=output, model_name=model[0], budget=budget)
    if not is_first():
        return
    if as_json:
        print_json({"output": str(output), **result.summary})
    else:
        _show(result.summary)
        say(f"wrote {output}")


def _many(
    suite: str,
    models: list[str],
    variants: list[Variant],
    *,
    output: Path,
    as_json: bool,
    **settings: Any,
) -> None:
    runs, comparison = run_matrix(suite, models, variants, output=output, **settings)
    if not is_first():
        return
    if as_json:
        print_json({"output": str(output), "runs": runs})
    elif comparison is not None:
        from rich.console import Console

        Console().print(comparison.table())
        typer.echo(comparison.explanation())
    else:
        for run in runs:
            if "refused" not in run:
                _show(run)
    if output.exists():
        say(f"wrote {output}")
    refused = [f"{run['model']} {run['name']}: {run['refused']}" for run in runs if "refused" in run]
    for line in refused:
        say(f"ropepatch: refused: {line}")
    if refused:
        raise typer.Exit(1)


def _show(summary: dict[str, Any]) -> None:
    from rich.console import Console

    from ropepatch.evaluation.suite import SUITES

    table = SUITES.get(summary["task"]).table(summary)
    Console().print(table or _table(summary))
    if table is None:
        typer.echo(f"effective length: {_tokens(summary['effective_length'])}")


def _table(summary: dict[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{summary['task']}: {summary['title']}"))
    for heading in ("length", "n", "accuracy", "95 % interval", "forced", "mean log-probability"):
        table.add_column(heading, justify="right")
    for row in summary["by_length"]:
        table.add_row(
            f"{row['length']:,}",
            str(row["n"]),
            f"{row['accuracy']:.3f}",
            f"{row['ci_low']:.3f} - {row['ci_high']:.3f}",
            # A served model gives neither.
            f"{row['forced_accuracy']:.3f}" if "forced_accuracy" in row else "",
            f"{row['mean_logprob']:.2f}" if "mean_logprob" in row else "",
        )
    return table


def _tokens(length: int | None) -> str:
    return "none of those measured" if length is None else f"{length:,} tokens"

"""`ropepatch eval`: run a suite on a model, patched or not, into an output folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from ropepatch.errors import OptionError

if TYPE_CHECKING:
    from rich.table import Table


def main(
    suite: Annotated[
        str, typer.Argument(metavar="SUITE", help="A suite's name, or the path of a YAML file.", show_default=False)
    ],
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP, show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the results.", show_default=False)
    ],
    patch: PatchOption = None,
    settings: SetOption = None,
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
        str, typer.Option(metavar="DTYPE", help="float32, bfloat16, or auto: bfloat16 where it is fast.")
    ] = "auto",
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH ...", help="Text to hide things in, or to predict: files or folders of .txt."),
    ] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option("--chat-template/--no-chat-template", help="Put prompts into the tokenizer's chat template."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run an evaluation and write its results to a folder.

    Each trial is on disk as soon as it is measured. The same command again goes on where it stopped; a folder of
    another configuration is refused. Under torchrun or accelerate launch the processes share the work.

    \b
    Examples:
      ropepatch eval passkey --model demo:smollm2 --lengths 1024,2048 --trials 2 --output runs/base
      ropepatch eval passkey -m demo:smollm2 --patch yarn --set factor=2 --lengths 12288 -o runs/yarn
      ropepatch eval passkey -m path/to/model --text book.txt --depths 0,0.5,1 -o runs/book
    """
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
    from ropepatch.evaluation.suites import load_suite
    from ropepatch.plotting import require_matplotlib

    # What can be refused without the model is refused before it is loaded.
    load_suite(suite, grid)
    require_matplotlib()
    from ropepatch.evaluation.runner import evaluate
    from ropepatch.loading import load_model

    subject, tokenizer = load_model(model, dtype=dtype)
    apply_patch(subject, patch, options)
    result = evaluate(subject, tokenizer, suite, **grid, output=output, model_name=model)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    if as_json:
        print_json({"output": str(output), **result.summary})
    else:
        from rich.console import Console

        Console().print(_table(result.summary))
        typer.echo(f"effective length: {_tokens(result.summary['effective_length'])}")
        say(f"wrote {output}")


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
            f"{row['forced_accuracy']:.3f}",
            f"{row['mean_logprob']:.2f}",
        )
    return table


def _tokens(length: int | None) -> str:
    return "none of those measured" if length is None else f"{length:,} tokens"

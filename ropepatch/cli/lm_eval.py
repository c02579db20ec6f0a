"""`ropepatch lm-eval`: tasks of lm-evaluation-harness on a model, patched or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ropepatch.cli._shared import (
    MODEL_HELP,
    JsonOption,
    PatchOption,
    SetOption,
    check_patch_options,
    parse_settings,
    print_json,
    say,
)
from ropepatch.errors import OutputConflictError, OutputError, UsageError

RESULTS, SAMPLES = "results.json", "samples.jsonl"


def main(
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP, show_default=False)],
    tasks: Annotated[
        str, typer.Option(metavar="NAME,NAME,...", help="Tasks, groups or YAML files of lm-eval.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the results.", show_default=False)
    ],
    patch: PatchOption = None,
    settings: SetOption = None,
    limit: Annotated[
        float | None, typer.Option(metavar="N", help="Examples of each task; below 1, a share of them.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Solved examples in front. [default: the task's]")
    ] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Requests computed together.")] = 1,
    max_length: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Most tokens of a request. [default: the patch's target length]"),
    ] = None,
    metadata: Annotated[
        str | None, typer.Option(metavar="JSON", help='Settings of tasks: {"max_seq_lengths": [4096]} for RULER.')
    ] = None,
    include_path: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder with further tasks.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put prompts into the tokenizer's chat template.")
    ] = False,
    log_samples: Annotated[
        bool, typer.Option("--log-samples", help=f"Write every example with its outputs to {SAMPLES} too.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="float32, bfloat16, float16, or auto: bfloat16 where it is fast.")
    ] = "auto",
    seed: Annotated[int | None, typer.Option(metavar="N", help="Seed of everything. [default: lm-eval's]")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run tasks of lm-evaluation-harness on a model, patched or not, and write its results to a folder.

    Needs the extra: pip install 'ropepatch[harness]'. Prompts are never cut: one that is longer than the target length
    of the patch (or --max-length) is an error. A run does not resume.

    \b
    Examples:
      ropepatch lm-eval --model path/to/model --tasks arc_easy,hellaswag --limit 100 -o runs/base
      ropepatch lm-eval -m demo:smollm2 --patch yarn --set factor=2 --tasks niah_single_1 --limit 8
        --metadata '{"max_seq_lengths": [4096]}' -o runs/niah
    """
    check_patch_options(patch, settings)
    options = parse_settings(settings)
    names = [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise UsageError("--tasks takes names separated by commas", given=tasks)
    extra = _parse_metadata(metadata)
    for name in (RESULTS, SAMPLES):
        if (output / name).exists():
            raise OutputConflictError(f"the folder {output} holds {name} already", hint="choose another output folder")
    from ropepatch.evaluation.harness import PatchedLM, find_tasks, run_harness, table
    from ropepatch.files import to_json, write_atomic, write_json
    from ropepatch.loading import model_source

    # RULER's tasks load a tokenizer of their own to measure prompts with.
    manager = find_tasks(names, metadata={"pretrained": model_source(model), **extra}, include_path=include_path)
    lm = PatchedLM(model, patch, options=options, dtype=dtype, max_length=max_length, batch_size=batch_size)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write to {output}: {error.strerror or error}") from error
    results = run_harness(
        lm,
        names,
        manager=manager,
        limit=limit,
        num_fewshot=num_fewshot,
        chat_template=apply_chat_template,
        seed=seed,
    )
    samples = results.pop("samples")
    if log_samples:
        lines = (to_json({"task": task, **row}) + "\n" for task, rows in samples.items() for row in rows)
        write_atomic(output / SAMPLES, "".join(lines))
    write_json(output / RESULTS, results)
    if as_json:
        print_json({"output": str(output), **results})
    else:
        typer.echo(table(results))
        say(f"wrote {output / RESULTS}")


def _parse_metadata(text: str | None) -> dict[str, Any]:
    try:
        found = {} if text is None else json.loads(text)
    except ValueError as error:
        raise UsageError(f"--metadata is not valid JSON: {error}", given=text) from error
    if not isinstance(found, dict):
        raise UsageError("--metadata must be a JSON object", given=text, hint='such as {"max_seq_lengths": [4096]}')
    return found

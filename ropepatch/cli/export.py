"""`ropepatch export`: a patched model for those who do not have ropepatch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ropepatch.cli._shared import (
    MODEL_HELP,
    JsonOption,
    PatchOption,
    SetOption,
    apply_patch,
    check_patch_options,
    parse_settings,
    print_json,
    say,
)
from ropepatch.errors import UsageError


def main(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="Folder, or a .gguf file.", show_default=False)
    ],
    patch: PatchOption = None,
    settings: SetOption = None,
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help="transformers, or gguf.")] = "transformers",
    dtype: Annotated[str, typer.Option(metavar="DTYPE", help="float32, bfloat16, float16, or auto.")] = "auto",
    tokenizer_pre: Annotated[
        str | None,
        typer.Option(
            "--tokenizer-pre",
            metavar="NAME",
            help="gguf: llama.cpp's name for how the tokenizer cuts text, where it is not known.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a patched model as a plain checkpoint: transformers, vLLM and SGLang load it without ropepatch.

    The folder is loaded again with plain transformers and its logits compared before it is left behind. A patch that no
    config can say is refused, with the nearest one that can. With --format gguf it is one file for llama.cpp.

    \b
    Examples:
      ropepatch export demo:smollm2 --patch yarn --set factor=2 --output smollm2-16k
      ropepatch export demo:smollm2 --patch yarn --set factor=2 --format gguf --output smollm2-16k.gguf
      ropepatch export runs/saved-with-ropepatch --output plain
    """
    check_patch_options(patch, settings)
    options = parse_settings(settings)
    from ropepatch.exporting import check_format, export
    from ropepatch.loading import load_model

    check_format(form)
    if tokenizer_pre is not None and form != "gguf":
        raise UsageError("--tokenizer-pre is for --format gguf", given=f"--format {form}")
    subject, tokenizer = load_model(model, dtype=dtype)
    apply_patch(subject, patch, options)
    words: dict[str, Any] = {} if tokenizer_pre is None else {"tokenizer_pre": tokenizer_pre}
    done = export(subject, output, form, tokenizer=tokenizer, **words)
    if as_json:
        print_json(
            {
                "output": str(done.path),
                "format": form,
                "target_length": done.target_length,
                "rope_parameters": done.rope_parameters,
                "hf_overrides": done.hf_overrides,
            }
        )
        return
    if form == "gguf":
        typer.echo(f"llama.cpp: llama-cli -m {done.path} -c {done.target_length}")
        say(f"wrote {done.path}")
        return
    typer.echo(f"transformers: AutoModelForCausalLM.from_pretrained({str(output)!r})")
    typer.echo(f"vLLM:         vllm serve {output}")
    typer.echo(f"or, on the original checkpoint: vllm serve MODEL --hf-overrides '{done.hf_overrides}'")
    say(f"wrote {output}")

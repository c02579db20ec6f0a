"""The options of `ropepatch eval` for a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ropepatch.errors import ModelLoadError, RopepatchError, UsageError

if TYPE_CHECKING:
    from ropepatch.evaluation.served import ServedModel

EndpointOption = Annotated[
    str | None,
    typer.Option(
        "--endpoint", metavar="URL", help="Ask an OpenAI-compatible server; --model is the model's name there."
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", metavar="MODEL", help="--endpoint: folder or hub id of the served model's own tokenizer."
    ),
]
ApiOption = Annotated[
    str | None,
    typer.Option(
        "--api", metavar="API", help="--endpoint: completions, or chat (the server's template). [default: completions]"
    ),
]
ApiKeyEnvOption = Annotated[
    str | None,
    typer.Option(
        "--api-key-env", metavar="VAR", help="--endpoint: variable that holds the key. [default: OPENAI_API_KEY]"
    ),
]
TimeoutOption = Annotated[
    float | None,
    typer.Option("--timeout", metavar="SECONDS", help="--endpoint: longest silence of the server. [default: 600]"),
]
RetriesOption = Annotated[
    int | None,
    typer.Option("--retries", metavar="N", help="--endpoint: further attempts at a request. [default: 5]"),
]
ConcurrencyOption = Annotated[
    int | None,
    typer.Option("--concurrency", metavar="N", help="--endpoint: requests at the same time. [default: 1]"),
]
OriginalLengthOption = Annotated[
    int | None,
    typer.Option(
        "--original-length", metavar="N", help="--endpoint: trained length, where the server does not say it."
    ),
]


@dataclass(frozen=True)
class ServedOptions:
    """What was given of these options; None where nothing was."""

    endpoint: str | None = None
    tokenizer: str | None = None
    api: str | None = None
    api_key_env: str | None = None
    timeout: float | None = None
    retries: int | None = None
    concurrency: int | None = None
    original_length: int | None = None

    def check(self, models: Sequence[str], others: Mapping[str, Any]) -> None:
        """Refuse what does not go together.

        Args:
            models: what --model gave.
            others: options that concern a loaded model, by flag, None where not given.

        Raises:
            UsageError: one of these options without --endpoint; --endpoint without --tokenizer, with several models,
                or with an option that concerns a loaded model.
        """
        if self.endpoint is None:
            for field in fields(self):
                if getattr(self, field.name) is not None:
                    flag = "--" + field.name.replace("_", "-")
                    raise UsageError(f"{flag} needs --endpoint", given=getattr(self, field.name))
            return
        if self.tokenizer is None:
            raise UsageError(
                "--endpoint needs --tokenizer", hint="name a folder or hub id: it counts the tokens of every prompt"
            )
        if len(models) != 1:
            raise UsageError("--endpoint takes one --model", given=" ".join(models))
        for flag, value in others.items():
            if value is not None:
                raise UsageError(
                    f"{flag} concerns a model that is loaded here, not one that is served",
                    hint=f"leave out {flag}, or load the model itself without --endpoint",
                )

    def load(self, model: str) -> tuple[ServedModel, Any]:
        """The served model, and its tokenizer.

        Raises:
            OptionError: an option is out of range.
            ModelLoadError: no such tokenizer.
        """
        from ropepatch.evaluation.served import ServedModel

        given = {field.name: getattr(self, field.name) for field in fields(self)}
        options = {name: value for name, value in given.items() if value is not None and name != "tokenizer"}
        return ServedModel(model=model, **options), load_tokenizer(str(self.tokenizer))


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder (weights are not needed), a hub id or `demo:smollm2`.

    Raises:
        ModelLoadError: missing or corrupt.
        UnknownNameError, DependencyError: as for a model of that name.
    """
    from ropepatch.loading import model_source

    folder = Path(os.path.expanduser(name))
    source = str(folder) if folder.is_dir() else model_source(name)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except RopepatchError:
        raise
    except Exception as error:  # transformers, tokenizers and huggingface_hub raise a dozen types
        words = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".: ")
        raise ModelLoadError(f"cannot load the tokenizer of {name}: {words}") from error

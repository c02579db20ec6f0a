"""The patch that belongs to a saved model: `ropepatch.json` beside the weights, and the same inside `config.json`.

It holds what `patch` has to be told again, never code. Whatever is read is held against a strict schema first: another
version, a wrong type, a huge number, deep nesting or an unknown field is an error, and nothing has been loaded then.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ropepatch.errors import RecordError

FILE = "ropepatch.json"
CONFIG_KEY = "ropepatch"
SCHEMA_VERSION = 1

_MOST_BYTES = 1 << 22
_MOST_TOKENS = 1 << 40
_MOST_ITEMS = 1 << 16
_DEEPEST = 8
# What makes two checkpoints the same architecture; the rest of a config may differ without harm.
_IDENTITY = (
    *("model_type", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head"),
    *("num_key_value_heads", "head_dim", "intermediate_size", "vocab_size"),
)

Word = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[\w.:+-]+$")]
Tokens = Annotated[int, Field(gt=0, le=_MOST_TOKENS)]


class Patch(BaseModel):
    """The arguments that make the same patch again.

    Attributes:
        schema_version: of this form.
        method, options, original_length, on_scaled, layer_types, layers, base: as for `ropepatch.patch`.
        target_length: length in tokens that the patch aims at.
        config_before: entries of the config that the patch changed, as they were: by the name of the part of the config
            ("" for the config itself), then by entry.
        versions: of ropepatch, transformers and torch when the model was patched.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    schema_version: Literal[1] = 1
    method: Word
    options: dict[str, Any]
    original_length: Tokens | None = None
    target_length: Tokens | None = None
    on_scaled: Literal["replace", "multiply"] | None = None
    layer_types: list[Word] | None = None
    layers: list[Annotated[int, Field(ge=0, lt=1 << 20)]] | None = None
    base: dict[str, Any] | None = None
    config_before: dict[str, dict[str, Any]] = {}
    versions: dict[Word, Word] = {}

    @field_validator("options", "base", "config_before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        _check_plain(value, depth=0)
        return value

    def arguments(self) -> dict[str, Any]:
        """Keywords of `ropepatch.patch`, the method included."""
        options = {name: value for name, value in self.options.items() if value is not None}
        names = ("original_length", "on_scaled", "layer_types", "layers", "base")
        named = {name: value for name in names if (value := getattr(self, name)) is not None}
        return {"method": self.method, **options, **named}


class Sidecar(BaseModel):
    """The content of `ropepatch.json`.

    Attributes:
        schema_version: of this form.
        kind: "model": the folder holds a whole model; "adapter": weights of a PEFT adapter for a base model.
        patch: what was in force when it was saved.
        model_class: the transformers class of the (base) model.
        base_model: of an adapter, the name or folder of its base.
        base_revision: its revision, where one was asked for.
        identity: what the base's config says of its architecture.
        config_hash: hex digest of `identity`.
        learned: file of the parameters that the patch learns and of the tables that it replaced, in the same folder;
            None when it has none.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    schema_version: Literal[1] = 1
    kind: Literal["model", "adapter"]
    patch: Patch
    model_class: Annotated[str, Field(pattern=r"^[A-Za-z]\w{0,127}$")]
    base_model: Annotated[str, Field(max_length=4096)] | None = None
    base_revision: Annotated[str, Field(max_length=256)] | None = None
    identity: dict[str, str | int | None] = {}
    config_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    learned: Literal["ropepatch.safetensors"] | None = None


def read(path: Path) -> Sidecar:
    """The sidecar in `path`.

    Raises:
        RecordError: missing, too large, not JSON, of a newer version, or not as the schema says.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise RecordError(f"the file {path} is too large for a patch record", allowed=f"{_MOST_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise RecordError(f"the file {path} cannot be read: {error.strerror or error}") from error
    try:
        content = json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"the file {path} is not valid JSON: {_brief(error)}") from error
    return parse(content, Sidecar, f"the file {path}")


def parse(content: Any, kind: type[Any], where: str) -> Any:
    """`content` as a `Sidecar` or `Patch`.

    Raises:
        RecordError: a newer version, or not as the schema says; names every wrong field.
    """
    if isinstance(content, Mapping):
        version = content.get("schema_version")
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise RecordError(
                f"{where} was written by a newer ropepatch",
                given=f"schema version {version}",
                allowed=f"up to {SCHEMA_VERSION}",
                hint="run: pip install --upgrade ropepatch",
            )
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors()[:5]]
        raise RecordError(f"{where} is no patch record: " + "; ".join(problems)) from error
    except RecursionError as error:
        raise RecordError(f"{where} is no patch record: nested too deeply") from error


def identity(config: Any) -> dict[str, Any]:
    """What a config says of its architecture: the entries that must agree between an adapter's base and a model."""
    text = config.get_text_config(decoder=True)
    found = {name: getattr(text, name, None) for name in _IDENTITY}
    return {name: value for name, value in found.items() if isinstance(value, (str, int))}


def config_hash(identity: Mapping[str, Any]) -> str:
    """Hex SHA-256 of an identity."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()


def _check_plain(value: Any, depth: int) -> None:
    """Refuse what a hostile file could hide in a free field."""
    if depth > _DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(value, Mapping):
        if len(value) > _MOST_ITEMS or any(not isinstance(key, str) or len(key) > 128 for key in value):
            raise ValueError("too many entries, or a name that is no short text")
        for item in value.values():
            _check_plain(item, depth + 1)
    elif isinstance(value, (list, tuple)):
        if len(value) > _MOST_ITEMS:
            raise ValueError("a list that is too long")
        for item in value:
            _check_plain(item, depth + 1)
    elif isinstance(value, str):
        if len(value) > 4096:
            raise ValueError("a text that is too long")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("a number that is not finite")
    elif isinstance(value, int):
        if abs(value) > _MOST_TOKENS:
            raise ValueError("a number that is too large")
    elif value is not None:
        raise ValueError(f"a {type(value).__name__}")


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is not JSON")


def _brief(error: BaseException) -> str:
    return str(error)[:200]

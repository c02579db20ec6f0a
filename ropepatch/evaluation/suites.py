"""Evaluation suites: small YAML files that name a task and its settings."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ropepatch.errors import OptionError, RecordError, UsageError, unknown_name

Depth = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class PasskeySuite(BaseModel):
    """Settings of a passkey grid. Every trial is one (length, depth, trial).

    Attributes:
        lengths: exact prompt lengths in tokens.
        depths: places of the key in the filler, 0 (first) to 1 (last).
        trials: prompts of each length and depth, with keys of their own.
        seed: of the keys.
        digits: of each key.
        chat_template: put prompts into the tokenizer's chat template.
        text: file or folder of real text to hide the key in; None for the benchmark's repeated sentences.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: Literal["passkey"]
    description: str = ""
    lengths: Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]
    depths: Annotated[tuple[Depth, ...], Field(min_length=1)]
    trials: Annotated[int, Field(ge=1)]
    seed: int = 0
    digits: Annotated[int, Field(ge=1, le=18)] = 5
    chat_template: bool = False
    text: str | None = None

    @field_validator("lengths", "depths")
    @classmethod
    def _sorted_set(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(values)))


def load_suite(name: str | Path, overrides: Mapping[str, Any] | None = None) -> PasskeySuite:
    """A suite with the caller's settings in place of its own.

    Args:
        name: a shipped suite's name, or the path of a YAML file.
        overrides: settings by name; None leaves the suite's own.

    Raises:
        UnknownNameError: no such suite.
        OptionError: the settings are wrong; names every one.
        RecordError: the file cannot be read or is no YAML mapping.
    """
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    content = _read(name)
    try:
        return PasskeySuite.model_validate({**content, **given})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc']))}: {e['msg']} (given {e['input']!r})" for e in error.errors()]
        raise OptionError(f"the suite {name} cannot be run as asked: " + "; ".join(problems)) from error


def suite_names() -> list[str]:
    """The names of the shipped suites, sorted."""
    return sorted(_shipped())


def _shipped() -> dict[str, Any]:
    """Shipped suites by name: from the installed package, else from the checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (resources.files("ropepatch") / "_data" / "eval", package.parent / "eval" / "suites"):
        if folder.is_dir():
            return {f.name.removesuffix(".yaml"): f for f in folder.iterdir() if f.name.endswith(".yaml")}
    return {}


def _read(name: str | Path) -> dict[str, Any]:
    import yaml

    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise UsageError(f"no such suite file: {path}")
        file: Any = path
    else:
        shipped = _shipped()
        if str(name) not in shipped:
            raise unknown_name("suite", str(name), shipped)
        file = shipped[str(name)]
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecordError(f"the suite file {file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RecordError(f"the suite file {file} is not a mapping of settings")
    return content

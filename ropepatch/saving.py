"""Keep a patched model: save it with its patch, and load both again, whole model or PEFT adapter."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropepatch import sidecar
from ropepatch._card import with_section
from ropepatch.errors import (
    DependencyError,
    ModelLoadError,
    OutputError,
    RecordError,
    RopepatchError,
    UsageError,
    first_line,
)
from ropepatch.files import read_object, umask
from ropepatch.sources import model_source
from ropepatch.surgery._carry import REFUSAL
from ropepatch.surgery._changes import KEPT
from ropepatch.surgery._lengths import TABLE_LENGTH_NAMES
from ropepatch.surgery._sidecar import ADAPTER_FILE, IN_NAME, LEARNED_FILE, sidecar_of, write_sidecar

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

# What makes a folder loadable is moved last: until then nothing loads from it.
_CARD = "README.md"
_LAST = ("config.json", ADAPTER_FILE, sidecar.FILE)
# The entries of a config that a patch may change.
_RESTORED = frozenset(
    (
        *("rope_parameters", "image_size", "window_size", "max_relative_positions"),
        *("context_length", "use_positional_embedding"),
        *TABLE_LENGTH_NAMES,
    )
)
_HUB_WORDS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def save_pretrained(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    card: str | None = None,
    push_to_hub: str | None = None,
    **kwargs: Any,
) -> Path:
    """Save a model with its patch: weights, config, and `ropepatch.json`, from which `from_pretrained` patches again.

    The folder is there whole or not at all: everything is written beside it first. A model that is not patched is
    saved as transformers saves it. Plain transformers loads a folder whose patch its config can express with the same
    logits, and refuses one whose patch it cannot (methods of the attention seam).

    Args:
        model: a PreTrainedModel, a PeftModel (its adapters are saved, the base is named), or what wraps one.
        path: the folder; made if missing. Files in it that the model does not bring are left alone.
        tokenizer: saved too, when given.
        card: Markdown for the model card (`README.md`), below what is said there of the patch, for one
            `ropepatch.evaluation.model_card.card(ropepatch.compare([...]))`.
        push_to_hub: a hub repository ("owner/name") to upload the folder to afterwards.
        kwargs: for the model's own `save_pretrained` (`max_shard_size`, ...).

    Returns:
        The folder.

    Raises:
        OutputError: the folder cannot be written; nothing in it has changed.
        UsageError: a part of the model was patched by itself.
    """
    path = Path(path)
    with staged(path) as stage:
        _write(model, stage, tokenizer, path / _CARD, card, kwargs)
    if push_to_hub is not None:
        from huggingface_hub import HfApi

        api = HfApi()
        repo = api.create_repo(push_to_hub, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo, folder_path=path)
    return path


def from_pretrained(path_or_id: str | os.PathLike[str], *, base_model: str | None = None, **hf_kwargs: Any) -> Any:
    """Load what `save_pretrained` saved, and patch it again: the same logits, bit for bit.

    A folder without a patch is loaded as transformers loads it. Weights are read from safetensors only; nothing in the
    folder is ever run.

    Args:
        path_or_id: a folder or a hub id.
        base_model: of an adapter, where its base is now; by default where it was.
        hf_kwargs: for transformers' `from_pretrained` (`dtype`, `device_map`, `revision`, `attn_implementation`, ...),
            and `is_trainable` for an adapter.

    Returns:
        The model in eval mode, patched; a PeftModel for an adapter.

    Raises:
        RecordError: the patch record is missing where one is needed, corrupt, hostile, or of a newer version.
        UnknownNameError: it names a method that this version does not have.
        ModelLoadError: weights are missing or corrupt, or an adapter's base is another model.
    """
    source = _Source(path_or_id, {name: hf_kwargs[name] for name in _HUB_WORDS if name in hf_kwargs})
    try:
        if source.find(ADAPTER_FILE) is not None:
            return _load_adapter(source, base_model, hf_kwargs)
        if base_model is not None:
            raise UsageError("base_model is for adapters, and this is a whole model", given=base_model)
        return _load_model(source, hf_kwargs)
    except RopepatchError:
        raise
    except Exception as error:  # transformers, peft, safetensors and huggingface_hub raise a dozen types
        raise ModelLoadError(f"cannot load {path_or_id}: {first_line(error)}") from error


def is_saved_patched(path_or_id: str | os.PathLike[str]) -> bool:
    """Whether a folder or repository brings a patch with it. A config that cannot be read brings none."""
    source = _Source(path_or_id, {})
    if source.find(sidecar.FILE) is not None:
        return True
    config = source.find("config.json")
    try:
        return config is not None and sidecar.CONFIG_KEY in read_object(config)
    except RecordError:
        return False


def tokenizer_source(path_or_id: str | os.PathLike[str]) -> str:
    """Where the tokenizer of a saved patched model is: an adapter's folder often leaves it to its base."""
    source = _Source(path_or_id, {})
    side = source.sidecar()
    if side is None or side.base_model is None or source.find("tokenizer_config.json") is not None:
        return source.name
    return model_source(side.base_model)


# -- saving


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A folder beside `path` whose content takes its place when the block ends well.

    Raises:
        OutputError: the disk refuses, or `path` is a file.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"cannot save to {path}: it is a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise OutputError(f"cannot save to {path}: {error.strerror or error}") from error
    try:
        yield stage
        if not path.exists():
            stage.chmod(0o777 & ~umask())
            os.rename(stage, path)
            return
        _move_over(stage, path)
    except OSError as error:
        raise OutputError(f"cannot save to {path}: {error.strerror or error}") from error
    except Exception as error:
        # safetensors reports a full disk in an error type of its own.
        if type(error).__module__.startswith("safetensors"):
            raise OutputError(f"cannot save to {path}: {error}") from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _move_over(stage: Path, path: Path) -> None:
    files = sorted((file for file in stage.rglob("*") if file.is_file()), key=lambda file: file.name in _LAST)
    for name in _LAST:
        (path / name).unlink(missing_ok=True)
    # Shards of a model that was here before would be found next to the new ones.
    for old in (*path.glob("model*.safetensors*"), *path.glob("adapter_model*.safetensors"), path / LEARNED_FILE):
        old.unlink(missing_ok=True)
    for file in files:
        target = path / file.relative_to(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)


def _write(model: Any, stage: Path, tokenizer: Any, card: Path, more: str | None, kwargs: dict[str, Any]) -> None:
    from ropepatch.families import host_of

    host = host_of(model)
    saver = model if hasattr(model, "save_pretrained") else host
    adapter = _adapter_config(saver)
    side = sidecar_of(host, adapter)
    if side is not None and side.learned is not None and adapter is None:
        # In a file of their own: transformers would list them as unexpected.
        state = kwargs.pop("state_dict", None) or saver.state_dict()
        kwargs["state_dict"] = {name: value for name, value in state.items() if IN_NAME not in name}
    saver.save_pretrained(stage, **kwargs)
    if tokenizer is not None:
        tokenizer.save_pretrained(stage)
    if side is not None:
        write_sidecar(host, stage, side)
        _write_card(host, side, stage / _CARD, card, more)


def _write_card(host: Any, side: sidecar.Sidecar, card: Path, before: Path, more: str | None) -> None:
    """Put the section of the patch into the model card that is being saved, else into a copy of the one before."""
    import ropepatch

    found = next((file for file in (card, before) if file.is_file()), None)
    text = found.read_text(encoding="utf-8") if found else ""
    trained = ropepatch.inspect(host).trained_length
    card.write_text(with_section(text, side, trained, more), encoding="utf-8")


def _adapter_config(model: nn.Module) -> Any:
    """The config of the adapter that a PeftModel has in use, or None for any other model."""
    configs, active = getattr(model, "peft_config", None), getattr(model, "active_adapter", None)
    return configs[active] if isinstance(configs, Mapping) and isinstance(active, str) and active in configs else None


# -- loading


class _Source:
    """A folder, or a repository of the hub."""

    def __init__(self, path_or_id: str | os.PathLike[str], hub: dict[str, Any]) -> None:
        self.name = model_source(path_or_id)
        self.hub = hub

    def find(self, file: str) -> Path | None:
        """Where a file of it is on this machine, or None."""
        if os.path.isdir(self.name):
            path = Path(self.name, self.hub.get("subfolder", ""), file)
            return path if path.is_file() else None
        from transformers.utils.hub import cached_file

        found = cached_file(self.name, file, _raise_exceptions_for_missing_entries=False, **self.hub)
        return Path(found) if found else None

    def sidecar(self) -> sidecar.Sidecar | None:
        path = self.find(sidecar.FILE)
        return sidecar.read(path) if path else None


def _load_model(source: _Source, hf_kwargs: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    side = source.sidecar()
    config: Any = AutoConfig.from_pretrained(source.name, **source.hub)
    carried = getattr(config, sidecar.CONFIG_KEY, None)
    patch = side.patch if side else None
    if patch is None and carried is not None:
        patch = sidecar.parse(
            carried, sidecar.Patch, f"the entry {sidecar.CONFIG_KEY!r} of the config of {source.name}"
        )
    if patch is None:
        return _load_weights(source, config, hf_kwargs)[0]
    _check_method(patch)
    stated = copy.deepcopy(config)
    _restore_config(config, patch)
    beside = _beside(source, side)
    tables = {name: beside.pop(name) for name in list(beside) if KEPT in name}
    with _without_report(bool(tables)):
        model, extra, resized = _load_weights(source, config, hf_kwargs, resized=True)
    if resized and not tables and stated._attn_implementation != REFUSAL:
        # Saved without us: its longer table is all there is, and its config says so. Nothing is left to undo.
        delattr(stated, sidecar.CONFIG_KEY)
        return _load_weights(source, stated, hf_kwargs)[0]
    names = {_plain_name(name): name for name in tables}
    # Indices of rows are made anew with the tables that they point into.
    resized = [name for name in resized if not _is_index(model, name)]
    if not set(resized) <= set(names):
        raise ModelLoadError(
            f"cannot load {source.name}: tensors of its weights have another shape: {', '.join(resized[:3])}",
            hint="where these are position tables that a patch replaced, save with ropepatch.save_pretrained",
        )
    _fill(model, {plain: tables[name] for plain, name in names.items()})
    _patch_again(model, patch, beside or _learned_of(source, extra))
    # As they were saved: they may have been trained since.
    _fill(model, _tensors(source, [name for name in names if name in _weight_files(source, names)]))
    return model


def _load_adapter(source: _Source, base_model: str | None, hf_kwargs: dict[str, Any]) -> Any:
    side = source.sidecar()
    if side is None:
        raise RecordError(
            f"the adapter {source.name} has no {sidecar.FILE}: it was not saved by ropepatch, or its patch is lost",
            hint="patch the base yourself, then load the adapter with peft",
        )
    try:
        from peft import PeftModel
    except ImportError as error:
        raise DependencyError("an adapter needs peft", hint="run: pip install 'ropepatch[train]'") from error
    from transformers import AutoConfig

    _check_method(side.patch)
    trainable = hf_kwargs.pop("is_trainable", False)
    name = base_model or side.base_model
    if name is None:
        raise RecordError("the adapter does not say which model it is for", hint="pass base_model=...")
    # The hub words of the adapter are not those of its base.
    for word in ("subfolder", "revision"):
        hf_kwargs.pop(word, None)
    base = _Source(name, {"revision": side.base_revision} if side.base_revision and base_model is None else {})
    config = AutoConfig.from_pretrained(base.name, **base.hub)
    _check_base(side, config, name)
    model = _load_weights(base, config, hf_kwargs)[0]
    learned = _beside(source, side)
    patched = _patch_again(model, side.patch, learned)
    return PeftModel.from_pretrained(patched, source.name, is_trainable=trainable, **source.hub)


def _check_method(patch: sidecar.Patch) -> None:
    """Refuse before gigabytes are read."""
    from ropepatch.methods._base import METHODS

    METHODS.get(patch.method)


def _check_base(side: sidecar.Sidecar, config: PreTrainedConfig, name: str) -> None:
    found = sidecar.identity(config)
    if side.config_hash is None or sidecar.config_hash(found) == side.config_hash:
        return
    differing = sorted(key for key in {*found, *side.identity} if found.get(key) != side.identity.get(key))
    raise ModelLoadError(
        f"the adapter belongs to another base than {name}",
        given=", ".join(f"{key} {found.get(key)}" for key in differing),
        allowed=", ".join(f"{key} {side.identity.get(key)}" for key in differing),
        hint="pass base_model=... with the model that it was trained on",
    )


def _restore_config(config: Any, patch: sidecar.Patch) -> None:
    """Put back what the patch changed in the config, so that the model is built as it was before."""
    for part, entries in patch.config_before.items():
        owner = getattr(config, part, None) if part else config
        if owner is None or not hasattr(owner, "to_dict"):
            raise RecordError(f"the patch record speaks of a part {part!r} that the config does not have")
        for name, value in entries.items():
            if name not in _RESTORED:
                raise RecordError(f"a patch does not change the entry {name!r} of a config", allowed=sorted(_RESTORED))
            setattr(owner, name, value)
    delattr(config, sidecar.CONFIG_KEY)
    # The word that keeps plain transformers from loading it without its patch.
    config._attn_implementation = None


def _load_weights(
    source: _Source, config: Any, hf_kwargs: dict[str, Any], *, resized: bool = False
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """The model, the keys that its class does not know, and those of another shape, which `resized` allows."""
    import transformers

    name = (getattr(config, "architectures", None) or ["AutoModelForCausalLM"])[0]
    kind: Any = getattr(transformers, name, None) if name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        kind = transformers.AutoModelForCausalLM
    given = {"use_safetensors": True, **hf_kwargs, "config": config}
    if resized:
        given["ignore_mismatched_sizes"] = True
    model, report = kind.from_pretrained(source.name, output_loading_info=True, **given)
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        raise ModelLoadError(
            f"cannot load {source.name}: tensors are missing from its weights: {', '.join(missing[:3])}"
        )
    shaped = sorted(str(key[0]) for key in report["mismatched_keys"])
    return model.eval(), sorted(map(str, report["unexpected_keys"])), shaped


def _beside(source: _Source, side: sidecar.Sidecar | None) -> dict[str, torch.Tensor]:
    """What stands in a file of its own: parameters that the patch learned, tables that it replaced."""
    from safetensors.torch import load_file

    if side is None or side.learned is None:
        return {}
    path = source.find(side.learned)
    if path is None:
        raise RecordError(f"the file {side.learned} with the parameters of the patch is missing")
    return load_file(path)


def _learned_of(source: _Source, extra: list[str]) -> dict[str, torch.Tensor]:
    """The parameters that the patch learned, from among the weights of a plain save."""
    return _tensors(source, [name for name in extra if IN_NAME in name])


@contextmanager
def _without_report(known: bool) -> Iterator[None]:
    """transformers' report of tensors of another shape would alarm where `known` says that they are the patch's."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    if known:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _tensors(source: _Source, names: list[str]) -> dict[str, torch.Tensor]:
    """Tensors of the weights, by name."""
    from safetensors import safe_open

    tensors = {}
    for name, shard in _weight_files(source, names).items():
        path = source.find(shard) if os.path.basename(shard) == shard else None
        if path is None:
            raise RecordError(f"the weights file {shard} is missing")
        with safe_open(path, framework="pt") as file:
            tensors[name] = file.get_tensor(name)
    return tensors


def _weight_files(source: _Source, names: Iterable[str]) -> dict[str, str]:
    """The file of the weights that holds each of `names`; those that none holds are left out."""
    from safetensors import safe_open

    index = source.find("model.safetensors.index.json")
    if index is not None:
        where = read_object(index)["weight_map"]
        return {name: str(where[name]) for name in names if name in where}
    path = source.find("model.safetensors")
    if path is None:
        return {}
    with safe_open(path, framework="pt") as file:
        held = set(file.keys())
    return {name: path.name for name in names if name in held}


def _is_index(model: Any, name: str) -> bool:
    buffers: dict[str, torch.Tensor] = dict(model.named_buffers())
    return name in buffers and not buffers[name].is_floating_point()


def _plain_name(kept: str) -> str:
    return kept.replace(KEPT, "")


def _fill(model: Any, tables: Mapping[str, torch.Tensor]) -> None:
    import torch

    for name, value in tables.items():
        place = model.get_parameter(name)
        if place.shape != value.shape:
            raise RecordError(f"{name} has another shape", given=list(value.shape), allowed=list(place.shape))
        with torch.no_grad():
            place.copy_(value)


def _patch_again(model: Any, patch: sidecar.Patch, learned: dict[str, torch.Tensor]) -> Any:
    import torch

    import ropepatch

    ropepatch.patch(model, **patch.arguments())
    places = {name: value for name, value in model.named_parameters() if IN_NAME in name}
    if places.keys() != learned.keys():
        raise RecordError(
            "the parameters that the patch learned do not fit it",
            given=sorted(learned.keys() - places.keys())[:3],
            allowed=sorted(places.keys() - learned.keys())[:3],
        )
    with torch.no_grad():
        for name, value in places.items():
            if value.shape != learned[name].shape:
                raise RecordError(
                    f"{name} has another shape", given=list(learned[name].shape), allowed=list(value.shape)
                )
            value.copy_(learned[name])
    return model

"""What belongs beside the weights of a patched model: built from the live model, written into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ropepatch import sidecar
from ropepatch.attention.interface import LEARNED
from ropepatch.errors import UsageError
from ropepatch.files import read_object, write_atomic, write_json
from ropepatch.record import RECORD_ATTRIBUTE
from ropepatch.surgery._changes import KEPT, TableChange

LEARNED_FILE: Literal["ropepatch.safetensors"] = "ropepatch.safetensors"
ADAPTER_FILE = "adapter_config.json"
IN_NAME = f".{LEARNED}."


def write_sidecar(host: Any, folder: Path, side: sidecar.Sidecar) -> None:
    """Write what the model's own `save_pretrained` leaves out into a folder that it has written: `ropepatch.json`, the
    parameters that the patch learns, and the position tables as they were before it.

    Args:
        host: the transformers model.
        side: what `sidecar_of` says of it.

    Raises:
        OutputError: the folder cannot be written.
    """
    if side.learned is not None:
        from safetensors.torch import save

        beside = learned_of(host) | (tables_of(host) if side.kind == "model" else {})
        write_atomic(folder / LEARNED_FILE, save({k: v.cpu().contiguous() for k, v in beside.items()}))
    if (folder / ADAPTER_FILE).exists():
        # PEFT names entries that it does not know when it loads: whoever loads the adapter without its patch is told.
        entries = read_object(folder / ADAPTER_FILE)
        write_json(
            folder / ADAPTER_FILE, {**entries, sidecar.CONFIG_KEY: "patched: load with ropepatch.from_pretrained"}
        )
    write_json(folder / sidecar.FILE, side.model_dump(mode="json"))


def sidecar_of(host: Any, adapter: Any = None) -> sidecar.Sidecar | None:
    """The content of `ropepatch.json` for a live model; None for one that is not patched.

    Args:
        host: the transformers model.
        adapter: the PEFT config of the adapter that is saved; None for a whole model.

    Raises:
        UsageError: a part of the model was patched by itself.
    """
    record = next((vars(m)[RECORD_ATTRIBUTE] for m in host.modules() if RECORD_ATTRIBUTE in vars(m)), None)
    if record is None:
        return None
    content = getattr(host.config, sidecar.CONFIG_KEY, None)
    if content is None:
        raise UsageError(
            "a part of the model was patched by itself, so the model's config does not know of the patch",
            given=record.method,
            hint="unpatch the part and patch the whole model",
        )
    identity = sidecar.identity(host.config)
    beside = learned_of(host) or (adapter is None and tables_of(host))
    return sidecar.Sidecar(
        kind="model" if adapter is None else "adapter",
        patch=sidecar.parse(content, sidecar.Patch, "the patch of the model"),
        model_class=type(host).__name__,
        base_model=getattr(adapter, "base_model_name_or_path", None),
        base_revision=getattr(adapter, "revision", None),
        identity=identity,
        config_hash=sidecar.config_hash(identity),
        learned=LEARNED_FILE if beside else None,
    )


def learned_of(host: nn.Module) -> dict[str, Tensor]:
    """The parameters that the patch learns, by name."""
    return {name: value.detach() for name, value in host.named_parameters() if IN_NAME in name}


def tables_of(host: nn.Module) -> dict[str, Tensor]:
    """The position tables that the patch replaced, as they were, by the names under which they are kept."""
    record = vars(host).get(RECORD_ATTRIBUTE)
    changes = [change for change in record.undo if isinstance(change, TableChange)] if record else []
    kept = [".".join(part for part in (change.path, KEPT + change.name) if part) for change in changes]
    return {name: host.get_buffer(name).detach() for name in kept}

"""What ropepatch does to models that read images, sound, video or time series, measured on tiny random models."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from ropepatch.errors import RopepatchError, UnsupportedModelError
from ropepatch.testing._before import one_line, state_of
from ropepatch.testing._modality_overrides import CONVOLUTIONAL, MODALITY_OVERRIDES
from ropepatch.testing._shrink import shrink
from ropepatch.testing._sizes import LENGTH
from ropepatch.testing.tiny import KINDS, _stir, model_types

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

FACTOR = 2.0
METHODS = ("linear", "nope", "yarn")
_SEEN = re.compile(
    r"IMAGE|VISION|VISUAL|VIDEO|DEPTH|OBJECT|SEGMENTATION|KEYPOINT|MASK_GENERATION|BACKBONE|POINTMAP|POSE|NORMAL|"
    r"AUDIO|SPEECH|CTC|RNNT|TDT|WAVEFORM|SPECTROGRAM|TIME_SERIES|MULTIMODAL|RECOGNITION"
)
_INPUTS = (
    ("time series", r"past_values|past_time_features|states"),
    ("video", r"pixel_values_videos"),
    ("images", r"pixel_values|grid_thw|pixel_position_ids|image_.*"),
    ("sound", r"input_values|input_features|audio.*|spectrogram"),
)
_PARTS = {"vision": "images", "image": "images", "audio": "sound", "video": "video", "text": "text", "other": "other"}
_HINT = re.compile(r"(^|_)(pos|position|positions|positional|rope|rotary|relative|rel)(_|$)|pos_conv|position_encod")
POSITIONS, ATTENTION, PLAIN = "called positions: ", "attention", "no attention"
"""What a model without sites has instead; after the first comes a name."""

_ATTENTION = re.compile(r"attn|attention")
# A random model of more parameters than this is not tiny: building it would take more memory than it tells.
_LARGEST = 150_000_000


@dataclass(frozen=True)
class PartSupport:
    """What was measured of one part of one model type.

    Attributes:
        model_type: transformers' name.
        part: what it reads: "text", "images", "video", "sound", "time series" or "other".
        mechanism: those of its sites, joined by "+"; "none" when `inspect` sees none.
        outcomes: a method to "yes", "refused" or "unverified" (refused because `verify` cannot run the model, patched
            and undone without), and the reason of a refusal; anything else is a bug, and says which.
        detail: why nothing was measured; where nothing was found, what the model has instead.
    """

    model_type: str
    part: str = ""
    mechanism: str = ""
    outcomes: dict[str, tuple[str, str]] = field(default_factory=dict)
    detail: str = ""


@cache
def modality_types() -> tuple[str, ...]:
    """Every model type of the installed transformers that reads more than text, or something else, sorted: those of its
    auto mappings for images, video, sound and time series, and those of `AutoModel` that are no text models."""
    return tuple(sorted(_mapped()))


def _mapped() -> dict[str, Any]:
    """Model type to the mapping of classes that builds it, `AutoModel`'s where it has it."""
    import transformers
    from transformers.models.auto import modeling_auto

    text = set().union(*(model_types(kind) for kind in KINDS))
    found = {name: transformers.MODEL_MAPPING for name in modeling_auto.MODEL_MAPPING_NAMES if name not in text}
    for mapping in dir(modeling_auto):
        if mapping.endswith("_MAPPING_NAMES") and _SEEN.search(mapping):
            classes = getattr(modeling_auto, mapping.removesuffix("_NAMES"))
            for name in getattr(modeling_auto, mapping):
                whole = name in modeling_auto.MODEL_MAPPING_NAMES
                found.setdefault(name, transformers.MODEL_MAPPING if whole else classes)
    return found


def tiny_modality_model(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of a type of `modality_types`, in evaluation mode.

    Raises:
        UnsupportedModelError: it cannot be built; the message has the cause.
    """
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        config = shrink(CONFIG_MAPPING[model_type], {}, **MODALITY_OVERRIDES.get(model_type, {}))
        if model_type in CONVOLUTIONAL:
            stages = CONVOLUTIONAL[model_type]
            config.backbone_config = shrink(CONFIG_MAPPING["resnet"], {}, out_features=stages)
            config.use_timm_backbone = False
        kind: Any = _mapped()[model_type][type(config)]
        kind = kind[0] if isinstance(kind, tuple) else kind
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in kind(config).parameters())
        if parameters > _LARGEST:
            raise UnsupportedModelError(f"its smallest model has {parameters / 1e6:.0f} million parameters")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = kind._from_config(config, dtype=torch.float32)
            _stir(model)
    except RopepatchError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"no tiny model can be built ({one_line(error)})") from error
    return model.eval()


def measure_parts(model_type: str) -> list[PartSupport]:
    """Build a tiny model, patch each of its parts with every method, and undo it.

    A part that reads something else than the model as a whole is patched by itself. `verify` stays on, so a patch that
    succeeds was also run, on an image of the new size where there is one.
    """
    from ropepatch.families import discover

    try:
        model = tiny_modality_model(model_type)
    except UnsupportedModelError as error:
        return [PartSupport(model_type, detail=error.message)]
    sites = discover(model)
    if all(site.mechanism == "none" for site in sites):
        part = _reads(model)
        return [PartSupport(model_type, part, "none", detail=_what_else(model))]
    groups: dict[tuple[str, str | None], list[str]] = {}
    for site in sites:
        place = "" if site.part == "text" else _tower(model, site.path)
        part = _PARTS.get(site.part, site.part)
        if site.part == "text":
            # An encoder of sound and a decoder of text may share a model; series are read as a whole.
            whole = _reads(model)
            part = whole if whole in ("text", "time series") else _read_around(model, site.path)
        groups.setdefault((part, place), []).append(site.mechanism)
    rows = []
    for (part, place), mechanisms in groups.items():
        outcomes = dict.fromkeys(METHODS, ("refused", "that part is no model of its own"))
        if place is not None:
            outcomes = {name: _outcome(model.get_submodule(place), name) for name in METHODS}
        rows.append(PartSupport(model_type, part, "+".join(dict.fromkeys(mechanisms)), outcomes))
    return rows


def _tower(model: nn.Module, path: str) -> str | None:
    """Path of the largest part of a model that is a model of its own and reads what the module at `path` serves; None
    where there is none."""
    from ropepatch.families._rotary import owners_of, part_of

    for place in reversed(owners_of(model, path)[:-1]):
        tower = model.get_submodule(place)
        if part_of(tower, path.removeprefix(place).removeprefix(".")) == "text" and _reads(tower) != "text":
            return place
    return None


def _read_around(model: nn.Module, path: str) -> str:
    """What the smallest part of a model around a module reads, where that can be told."""
    from ropepatch.families._rotary import owners_of

    found = [_reads(model.get_submodule(place)) for place in owners_of(model, path)]
    return next((part for part in found if part != "other"), "other")


def _reads(model: Any) -> str:
    """What a model reads."""
    names = inspect.signature(type(model).forward).parameters
    if "input_ids" in names:
        return "text"
    found = next((part for part, words in _INPUTS if any(re.fullmatch(words, name) for name in names)), "other")
    return "text" if found == "other" and "inputs_embeds" in names else found


def _what_else(model: nn.Module) -> str:
    """What a model without sites has instead: things that are called positions, or attention, or neither."""
    hints = list(dict.fromkeys(_pattern(path) for path in _called_positions(model)))
    if hints:
        return f"{POSITIONS}{hints[0]}"
    return ATTENTION if any(_ATTENTION.search(path.rpartition(".")[2]) for path, _ in model.named_modules()) else PLAIN


def _called_positions(model: nn.Module) -> Iterator[str]:
    """Paths of modules, tensors and functions that are called positions."""
    from transformers import PreTrainedModel

    for path, module in model.named_modules():
        if _HINT.search(path.rpartition(".")[2]):
            yield path
        held = [name for name, value in vars(module).items() if hasattr(value, "shape")]
        tensors = [*held, *(name for name, _ in module.named_parameters(recurse=False))]
        functions = (
            [] if isinstance(module, PreTrainedModel) else [n for n in vars(type(module)) if "position_ids" in n]
        )
        for name in (*tensors, *functions):
            if _HINT.search(name):
                yield f"{path}.{name}"


def _pattern(path: str) -> str:
    return ".".join("*" if step.isdigit() else step for step in path.split("."))


def _outcome(tower: Any, method: str) -> tuple[str, str]:
    import ropepatch

    before = state_of(tower)
    options: dict[str, Any] = {} if method == "nope" else {"factor": FACTOR}
    seen = ropepatch.inspect(tower)
    if seen.mechanism.startswith("rotary") and seen.trained_length is None and method == "yarn":
        options["original_length"] = LENGTH
    if seen.native_scaling and seen.mechanism.startswith("rotary"):
        options["on_scaled"] = "replace"
    try:
        ropepatch.patch(tower, method, **options)
    except RopepatchError as error:
        word, why = "refused", _without_names(error.message, seen)
        if "could not be run" in why and _patches_unseen(tower, method, options):
            word = "unverified"
    except Exception as error:  # noqa: BLE001 (a list reports bugs, it does not stop at the first)
        word, why = "bug", one_line(error)
    else:
        word, why = "yes", ""
        ropepatch.unpatch(tower)
    left = next(_differing(before, state_of(tower)), "")
    return (f"bug: {left} after {word}", why) if left else (word, why)


def _patches_unseen(tower: Any, method: str, options: dict[str, Any]) -> bool:
    """Whether the patch can be put on and taken off where `verify` cannot run the model."""
    import ropepatch

    try:
        ropepatch.patch(tower, method, **options, verify=False)
    except RopepatchError:
        return False
    ropepatch.unpatch(tower)
    return True


def _without_names(why: str, seen: Any) -> str:
    """The reason of a refusal without what is the model's own, so that models can share it."""
    for site in sorted(seen.sites, key=lambda site: -len(site["path"])):
        held = site["path"] or site["name"]
        if held:
            why = re.sub(rf"(?<![\w.]){re.escape(held)}[\w.\[\]]*", "its table", why)
    why = re.sub(r"(the position )?table its table|the table at its table|the position table (?= is)", "its table", why)
    why = re.sub(r"its attention \([\w.]+\)", "its attention", why)
    # What a model says of inputs that it was not given is no reason of ours.
    why = re.sub(r" \([^()]*(\([^()]*\)[^()]*)*\)$", "", why)
    why = why.replace(f"of this {seen.model_type} model", "of the model").replace(f"this {seen.model_type}", "the")
    return why.replace(f"positions of {seen.model_type} ", "positions ")


def _differing(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    for what in ("config", "keys", "attention"):
        if old[what] != new[what]:
            yield f"another {what}"
    for name, tensor in old["tensors"].items():
        now = new["tensors"].get(name)
        if now is None or now.shape != tensor.shape or not bool(((now == tensor) | (now != now)).all()):
            yield f"another {name}"

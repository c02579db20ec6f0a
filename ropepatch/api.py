"""The public verbs on a live model: patch, patched, unpatch, inspect, methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from ropepatch import compat
from ropepatch.errors import AlreadyPatchedError, NotPatchedError, OptionError
from ropepatch.families import discover, host_of
from ropepatch.families._native import native_scaling
from ropepatch.families._rotary import config_of
from ropepatch.families._site import Site
from ropepatch.inspection import Inspection
from ropepatch.methods._attention import AttentionMethod
from ropepatch.methods._base import METHODS, FrequencyMethod, MethodOptions
from ropepatch.methods._info import option_table
from ropepatch.methods._options import parse_options
from ropepatch.record import RECORD_ATTRIBUTE, PatchRecord
from ropepatch.surgery import _relative_grid, alibi, attention, embeddings, frequencies, relative
from ropepatch.surgery._carry import REFUSAL, SavedEntryChange, carry
from ropepatch.surgery._changes import revert_all
from ropepatch.surgery._embeddings_base import Patched
from ropepatch.surgery._lengths import trained_length
from ropepatch.surgery._own_config import own_config
from ropepatch.surgery._select import select_sites
from ropepatch.surgery._start import starts
from ropepatch.surgery._verify import verify as verify_effect
from ropepatch.surgery._warnings import warnings_of
from ropepatch.surgery.own_length import own_length

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class MethodInfo:
    """A method as a user sees it.

    Attributes:
        name: the word that `patch` takes.
        aliases: other words for the same.
        seam: "frequencies", "attention" or "embeddings".
        mechanisms: what it can change.
        options: dicts of name, type, default and help; a required option has the default None and `required` True.
        paper: where the formula comes from.
        rope_type: transformers' own name for it, or None.
        summary: one line.
    """

    name: str
    aliases: tuple[str, ...]
    seam: str
    mechanisms: tuple[str, ...]
    options: tuple[dict[str, Any], ...]
    paper: str
    rope_type: str | None
    summary: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def methods() -> tuple[MethodInfo, ...]:
    """Every method, sorted by name."""
    return tuple(_info(method) for method in METHODS)


def _info(method: FrequencyMethod | AttentionMethod) -> MethodInfo:
    return MethodInfo(
        name=method.name,
        aliases=method.aliases,
        seam=method.seam,
        mechanisms=method.mechanisms,
        options=option_table(method.options),
        paper=method.paper,
        rope_type=method.rope_type,
        summary=method.summary,
    )


def patch(
    model: Model,
    method: str,
    *,
    original_length: int | None = None,
    verify: bool = True,
    on_scaled: Literal["replace", "multiply"] | None = None,
    layer_types: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    base: Mapping[str, Any] | str | None = None,
    **options: Any,
) -> Model:
    """Change how far a live model reaches, in place.

    Args:
        model: a transformers PreTrainedModel, a PeftModel, or any module that wraps one.
        method: name or alias of a method; `ropepatch.methods()` lists them.
        original_length: trained length in tokens; read from the config by default.
        verify: run two tokens through the model up to its rotary modules and hold what they emit against the
            closed form; where a position table got longer, run one token more than it had and see that the model reads
            the new row.
        on_scaled: what to do when the checkpoint carries a native scaling (llama3, yarn, ...): "replace" starts
            from its pretrained frequencies and length, "multiply" scales further what is there. By default that
            is refused.
        layer_types: of a model that keeps frequencies per layer type, the types to change. By default all but
            sliding-window and chunked ones, which never look far.
        layers: numbers of the attention layers to change, for methods of the attention seam. By default all rotary
            ones but sliding-window and chunked ones.
        base: frequencies under a method of the attention seam, as {"method": "yarn", "factor": 2}; the length that
            they reach is then the trained length that the method starts from.
        options: of the method.

    Returns:
        The same model.

    Raises:
        UnknownNameError: no such method.
        OptionError: an unknown, missing or out-of-range option.
        UnsupportedModelError: the model has no mechanism that the method can change.
        AlreadyPatchedError: the model is patched.
        AlreadyScaledError: the checkpoint carries a native scaling and `on_scaled` is not given.
        VerificationError: the effect did not happen. In every case the model is then exactly as before.
    """
    entry = METHODS.get(method)
    parsed = parse_options(entry, options)
    _check_arguments(original_length, on_scaled)
    host = host_of(model)
    path, record = _find_record(host)
    if record is not None:
        raise AlreadyPatchedError(
            f"the model is already patched with {record.method!r}" + (f" (its part {path!r})" if path else ""),
            given=method,
            hint="call ropepatch.unpatch(model) first",
        )
    own_config(host)
    sites = discover(host)
    if embeddings.takes(sites, entry):
        _refuse_words(layer_types=layer_types, base=base, on_scaled=on_scaled)
        record = _patch_tables(host, sites, entry, parsed, original_length, verify, layers)
        return _finish(model, host, record, original_length, layer_types, layers)
    if _relative_grid.takes(host, sites, entry):
        _refuse_words(layer_types=layer_types, layers=layers, base=base, on_scaled=on_scaled)
        record = _patch_windows(host, entry, parsed, original_length, verify)
        return _finish(model, host, record, original_length, layer_types, layers)
    embeddings.refuse_table_options(entry, parsed)
    if alibi.takes(sites, entry):
        record = _patch_alibi(host, entry, parsed, original_length, verify, layer_types, layers, base)
        return _finish(model, host, record, original_length, layer_types, layers)
    if relative.takes(sites, entry):
        _refuse_words(layer_types=layer_types, layers=layers, base=base, on_scaled=on_scaled)
        record = _patch_relative(host, entry, parsed, original_length, verify)
        return _finish(model, host, record, original_length, layer_types, layers)
    if isinstance(entry, AttentionMethod):
        record = _patch_attention(
            host,
            sites,
            entry,
            parsed,
            original_length=original_length,
            verify=verify,
            on_scaled=on_scaled,
            layer_types=layer_types,
            layers=layers,
            base=base,
        )
        return _finish(model, host, record, original_length, layer_types, layers)
    _refuse_attention_words(entry, layers, base)
    selected = select_sites(sites, entry, layer_types, host.config.model_type)
    plans = frequencies.plan(host, selected, entry, parsed, original_length=original_length, on_scaled=on_scaled)
    changes = frequencies.apply(host, plans)
    try:
        if verify:
            verify_effect(host, plans)
        record = PatchRecord(
            method=entry.name,
            options=_stated(entry, parsed),
            seam=entry.seam,
            mechanism="rotary",
            original_length=plans[0].geometry.original_length,
            target_length=max(item.result.target_length for item in plans),
            on_scaled=on_scaled if any(item.scaling for item in plans) else None,
            sites=[item.site.to_dict() for item in plans],
            versions=compat.versions(),
            undo=changes,
        )
    except BaseException:
        revert_all(host, changes)
        raise
    return _finish(model, host, record, original_length, layer_types, layers=None)


def _finish(
    model: Model,
    host: Any,
    record: PatchRecord,
    given_length: int | None,
    layer_types: Sequence[str] | None,
    layers: Sequence[int] | None,
) -> Model:
    """Put the record of a patch that is in force on the model, and into what it saves."""
    record.given_length = given_length
    record.layer_types = None if layer_types is None else list(layer_types)
    record.layers = None if layers is None else list(layers)
    try:
        record.undo = [*record.undo, *carry(host, record)]
    except BaseException:
        revert_all(host, record.undo)
        raise
    setattr(host, RECORD_ATTRIBUTE, record)
    return model


def _patch_attention(
    host: Any,
    sites: Sequence[Site],
    entry: AttentionMethod,
    options: MethodOptions,
    *,
    original_length: int | None,
    verify: bool,
    on_scaled: str | None,
    layer_types: Sequence[str] | None,
    layers: Sequence[int] | None,
    base: Mapping[str, Any] | str | None,
) -> PatchRecord:
    # All sites: which layers a site turns, and which of them look far, the surgery sees by itself.
    usable = select_sites(sites, entry, None, host.config.model_type, local_too=True)
    started = starts(host, usable, entry, base, original_length=original_length, on_scaled=on_scaled)
    done = attention.apply(host, started, entry, options, layers=layers, layer_types=layer_types, verify=verify)
    return PatchRecord(
        method=entry.name,
        options=_stated(entry, options),
        seam=entry.seam,
        mechanism="rotary",
        original_length=done.original_length,
        target_length=done.target_length,
        on_scaled=next((start.on_scaled for start in started if start.on_scaled), None),
        sites=done.layers,
        versions=compat.versions(),
        warnings=[entry.finetune] if entry.finetune else [],
        undo=done.changes,
        base={"method": base} if isinstance(base, str) else dict(base) if base is not None else None,
        becomes=entry.becomes,
    )


def _patch_alibi(
    host: Any,
    entry: FrequencyMethod | AttentionMethod,
    options: MethodOptions,
    original_length: int | None,
    verify: bool,
    layer_types: Sequence[str] | None,
    layers: Sequence[int] | None,
    base: Mapping[str, Any] | str | None,
) -> PatchRecord:
    for name, value in (("layer_types", layer_types), ("base", base)):
        if value is not None:
            raise OptionError(f"{name} speaks of rotary frequencies, and this model has ALiBi slopes", given=value)
    done = alibi.apply(host, entry, options, original_length=original_length, layers=layers, verify=verify)
    return PatchRecord(
        method=entry.name,
        options=_stated(entry, options),
        seam="attention",
        mechanism="alibi",
        original_length=done.original_length,
        target_length=done.target_length,
        on_scaled=None,
        sites=done.layers,
        versions=compat.versions(),
        warnings=done.warnings,
        becomes=entry.becomes if isinstance(entry, AttentionMethod) and entry.becomes != "alibi" else None,
        undo=done.changes,
    )


def _patch_relative(
    host: Any, entry: Any, options: MethodOptions, original_length: int | None, verify: bool
) -> PatchRecord:
    done = relative.apply(host, entry, options, original_length=original_length, verify=verify)
    return PatchRecord(
        method=entry.name,
        options=_stated(entry, options),
        seam="attention",
        mechanism="relative_bias",
        original_length=done.original_length,
        target_length=done.target_length,
        on_scaled=None,
        sites=done.sites,
        versions=compat.versions(),
        undo=done.changes,
    )


def _patch_windows(
    host: Any, entry: Any, options: MethodOptions, original_length: int | None, verify: bool
) -> PatchRecord:
    done = _relative_grid.apply(host, entry, options, original_length=original_length, verify=verify)
    return _table_record(host, entry, done, seam="embeddings")


def _patch_tables(
    host: Any,
    sites: Sequence[Site],
    entry: Any,
    options: MethodOptions,
    original_length: int | None,
    verify: bool,
    layers: Sequence[int] | None,
) -> PatchRecord:
    done = embeddings.apply(host, sites, entry, options, original_length=original_length, layers=layers, verify=verify)
    return _table_record(host, entry, done, seam="attention" if entry.table.attends else "embeddings")


def _table_record(host: Any, entry: Any, done: Patched, *, seam: str) -> PatchRecord:
    if not done.plain and seam == "embeddings":
        # Plain transformers would build another table from the config.
        done.changes.append(SavedEntryChange.apply(host, "_attn_implementation", REFUSAL))
    return PatchRecord(
        method=entry.name,
        options=done.options.model_dump(),
        seam=seam,
        mechanism=done.mechanism,
        original_length=done.original_length,
        target_length=done.target_length,
        on_scaled=None,
        sites=done.sites,
        versions=compat.versions(),
        warnings=done.warnings,
        becomes=done.becomes,
        undo=done.changes,
    )


def _stated(entry: Any, options: MethodOptions) -> dict[str, Any]:
    """The options as a record states them where there is no position table: without those that speak of one."""
    rule = getattr(entry, "table", None)
    return options.model_dump(exclude=set(rule.only) if rule is not None else None)


def _refuse_words(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise OptionError(f"{name} speaks of rotary positions, and this model has none", given=value)


def _refuse_attention_words(entry: FrequencyMethod, layers: Any, base: Any) -> None:
    for name, value in (("layers", layers), ("base", base)):
        if value is not None:
            raise OptionError(
                f"{name} belongs to methods of the attention seam, and {entry.name!r} is one of the {entry.seam} seam",
                given=value,
                hint="layer_types=[...] selects frequencies" if name == "layers" else None,
            )


def unpatch(model: Model) -> Model:
    """Undo `patch`, bit for bit, whatever else has been done to the model since.

    Returns:
        The same model.

    Raises:
        NotPatchedError: the model is not patched.
    """
    host = host_of(model)
    path, record = _find_record(host)
    if record is None or path is None:
        raise NotPatchedError("the model is not patched, so there is nothing to undo", given=type(model).__name__)
    owner = host.get_submodule(path)
    attention.retire(owner)
    revert_all(owner, record.undo)
    delattr(owner, RECORD_ATTRIBUTE)
    return model


@contextmanager
def patched(model: Model, method: str, **keywords: Any) -> Iterator[Model]:
    """`patch` for the length of a with block; arguments as there."""
    patch(model, method, **keywords)
    try:
        yield model
    finally:
        unpatch(model)


def record_of(model: nn.Module) -> dict[str, Any] | None:
    """The patch in force as plain data, or None."""
    record = _find_record(host_of(model))[1]
    return record.to_dict() if record else None


def inspect(model: nn.Module) -> Inspection:
    """How a model knows order, and what a patch has changed. Changes nothing.

    Raises:
        UnsupportedModelError: `model` is not and does not wrap one PreTrainedModel.
    """
    host = host_of(model)
    record = _find_record(host)[1]
    sites = discover(host)
    text = [site for site in sites if site.part == "text"]
    mechanism = "+".join(dict.fromkeys(site.mechanism for site in text or sites))
    if not text and host.main_input_name == "input_ids":
        mechanism = "none"
    if record and record.becomes:
        mechanism = record.becomes
    scaling = next(
        (found for site in text if site.kind == "frequencies" and (found := native_scaling(host, site))), None
    )
    config = config_of(host, host.get_submodule((text or sites)[0].path))
    trained: int | None
    target: int | None
    length, unit = own_length(host, sites)
    if record:
        trained, target = record.original_length, record.target_length
        scaling = None if record.on_scaled != "multiply" else scaling
    else:
        trained, target = _stated_lengths(config, scaling)
        if length is not None:
            trained = target = length
    return Inspection(
        model_type=host.config.model_type,
        mechanism=mechanism,
        method=record.method if record else None,
        options=dict(record.options) if record else {},
        seam=record.seam if record else None,
        trained_length=trained,
        target_length=target,
        unit=unit,
        native_scaling=str(scaling["rope_type"]) if scaling else None,
        sites=tuple(site.to_dict() for site in (*sites, *attention.learned_sites(host))),
        warnings=tuple(warnings_of(sites, record)),
    )


def _stated_lengths(config: Any, scaling: dict[str, Any] | None) -> tuple[int | None, int | None]:
    try:
        trained = trained_length(config, scaling, "replace" if scaling else None)
        reached = trained_length(config, scaling, "multiply" if scaling else None)
    except OptionError:
        return None, None
    return trained, reached


def _check_arguments(original_length: int | None, on_scaled: str | None) -> None:
    if original_length is not None and (not isinstance(original_length, int) or original_length < 1):
        raise OptionError("original_length is a number of tokens", given=original_length, allowed="an integer from 1")
    if on_scaled not in (None, *frequencies.ON_SCALED):
        raise OptionError("unknown value of on_scaled", given=on_scaled, allowed=frequencies.ON_SCALED)


def _find_record(host: nn.Module) -> tuple[str | None, PatchRecord | None]:
    """The record on the model or on a part of it that was patched by itself, with the path of that part."""
    for path, module in host.named_modules():
        record = module.__dict__.get(RECORD_ATTRIBUTE)
        if record is not None:
            return path, record
    return None, None

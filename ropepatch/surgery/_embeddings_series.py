"""Time-series models with rows of positions (TimeSeriesTransformer, Informer, Autoformer, PatchTST, TimesFM): a longer
context.

The length of such a model is its `context_length`, in time steps, and its inputs are as long as that and not shorter.
All that follows from it changes with it; the forecast stays as long as it was. Its positions come after those of the
context, on the same scale: the models read their rows from `config.context_length` on.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ropepatch.errors import OptionError, UnsupportedModelError, VerificationError
from ropepatch.families._site import Site
from ropepatch.methods._base import MethodOptions
from ropepatch.methods._sinusoid import law_of, scaled_law_of
from ropepatch.methods._tables import PositionTable, TableRule
from ropepatch.surgery._changes import Change, ConfigChange, FreezeChange, HookChange, TableChange, revert_all
from ropepatch.surgery._embeddings_base import Patched, follows_law, key_of, refuse_shared, usable_table
from ropepatch.surgery._series_check import PAST, PastLength, check_reads, check_runs, past_length, reader_of
from ropepatch.surgery._series_lengths import CONTEXT, Dependents, dependents, lengthen

_SWITCH = "use_positional_embedding"


@dataclass(frozen=True)
class Found:
    """A table as it stands, and as long as it would be.

    Attributes:
        path, name: where it is.
        mechanism: "learned" or "sinusoidal".
        table: its positions.
        before: rows before the first position.
        positions: that it will have.
    """

    path: str
    name: str
    mechanism: str
    table: PositionTable
    before: Tensor
    positions: int


def takes(host: Any, text: Sequence[Site]) -> bool:
    """Whether the model reads a time series, and knows order by rows that are added to it."""
    return bool(text) and getattr(host, "main_input_name", "") == PAST and context_length(host) is not None


def context_length(host: Any) -> int | None:
    """Time steps that the model looks back, or None: its config does not say."""
    length = getattr(host.config, CONTEXT, None)
    return length if type(length) is int else None


def apply(
    host: Any,
    text: Sequence[Site],
    method: Any,
    options: MethodOptions,
    *,
    original_length: int | None,
    verify: bool,
) -> Patched:
    """As `embeddings.apply`, for a context of `options.factor` times as many time steps.

    Raises:
        UnsupportedModelError: weights that are as large as the context, a part of a model, or a method that these
            positions do not have.
        OptionError: an option that they have no use for, or a context that splits a patch.
        VerificationError: the model does not read the new rows, or does not run.
    """
    _refuse(host, text, method, original_length)
    rule: TableRule = method.table
    old = int(host.config.context_length)
    wanted = dependents(host, round(old * options.factor))  # type: ignore[attr-defined]
    found = [_found(host, site, wanted) for site in text if site.name]
    _refuse_sizes(host, wanted, found)
    made = [rule.compute(item.table, item.positions, options) for item in found]
    computed = [site for site in text if not site.name]
    if computed:
        _refuse_computed(host, wanted, method, options)
    changes: list[Change] = []
    plain = True
    try:
        for item, rows in zip(found, made, strict=True):
            held = getattr(host.get_submodule(item.path), item.name).detach()
            changes.append(TableChange.apply(host, item.path, item.name, torch.cat((item.before, rows.to(held)))))
            if rule.silent:
                changes.append(FreezeChange.apply(host, item.path, item.name))
        lengthen(host, wanted, changes)
        for site in computed:
            plain = _change_computed(host, site, rule, options, changes)
        for place in dict.fromkeys(reader_of(host, item.path) for item in found):
            _limit(host, str(place), changes)
        if verify:
            _verify(host, found, computed, rule, options)
    except BaseException:
        revert_all(host, changes)
        raise
    follows = plain and all(follows_law(item.table, rows) for item, rows in zip(found, made, strict=True))
    described = [
        {"path": i.path, "name": i.name, "mechanism": i.mechanism, "first_row": i.table.start, "length": i.positions}
        for i in found
    ]
    described += [
        {"path": site.path, "name": "", "mechanism": site.mechanism, "first_row": 0, "length": None}
        for site in computed
    ]
    warnings = [f"the model now wants {past_length(host.config)} past values"] if found and wanted.new > old else []
    if getattr(method, "finetune", "") and not (follows and not rule.silent):
        warnings.append(method.finetune)
    mechanism = text[0].mechanism
    return Patched(
        changes=changes,
        sites=described,
        mechanism=mechanism,
        original_length=old,
        target_length=wanted.new,
        plain=plain,
        warnings=warnings,
        becomes=rule.becomes if rule.becomes != mechanism else None,
        options=options,
    )


# -- what is refused


def _refuse(host: Any, text: Sequence[Site], method: Any, original_length: int | None) -> None:
    kind = host.config.model_type
    if original_length is not None:
        raise OptionError("the trained length of a time-series model is its context_length", given=original_length)
    other = next((site for site in text if site.mechanism not in method.mechanisms), None)
    if other is not None:
        raise UnsupportedModelError(
            f"{method.name!r} changes {' or '.join(method.mechanisms)} positions, and {other.where} of this {kind} "
            f"model is {other.mechanism}",
            hint="'sinusoidal' makes such a table longer",
        )
    alone = next((site for site in text if reader_of(host, site.path) is None), None)
    if alone is not None:
        raise UnsupportedModelError(
            f"a part of a time-series model, with the table {alone.where}, has no context of its own",
            given=type(host).__name__,
            hint="pass the whole model: its encoder and its decoder count from one context_length",
        )


def _refuse_sizes(host: Any, wanted: Dependents, found: Sequence[Found]) -> None:
    tables = {key_of(item.path, item.name) for item in found}
    for name, (old, new) in wanted.shapes.items():
        if name not in tables:
            raise UnsupportedModelError(
                f"the weight {name} of this {host.config.model_type} model is as large as its context: it cannot take "
                "a longer one",
                given=f"{list(old)} for {wanted.old} time steps, {list(new)} for {wanted.new}",
                hint="a PatchTST head that pools (pooling_type, use_cls_token) bears any length"
                if hasattr(host.config, "pooling_type")
                else None,
            )
    refuse_shared(host, [(item.path, item.name) for item in found])


def _refuse_computed(host: Any, wanted: Dependents, method: Any, options: MethodOptions) -> None:
    for name in sorted(options.model_fields_set - {"factor"}):
        given = getattr(options, name)
        if given != type(options).model_fields[name].get_default(call_default_factory=True):
            raise OptionError(
                f"the option {name!r} of {method.name!r} speaks of rows in a table, and this model computes its own",
                given=given,
            )
    patch = getattr(host.config, "patch_length", 1)
    if wanted.new % patch:
        raise OptionError(
            "the factor splits a patch",
            given=f"{wanted.new} time steps",
            allowed=f"a multiple of the {patch} time steps of a patch",
        )


# -- what is there


def _found(host: Any, site: Site, wanted: Dependents) -> Found:
    held = usable_table(host, site, host.get_submodule(site.path)._parameters.get(site.name))
    shape = tuple(held.shape)
    old, new = wanted.shapes.get(key_of(site.path, site.name), (shape, shape))
    if shape != old:
        raise UnsupportedModelError(
            f"the table at {site.where} is not as long as the config says", given=shape[0], allowed=f"{old[0]} rows"
        )
    start = int(bool(getattr(host.config, "use_cls_token", False)))
    table = held.detach()
    law = None
    if site.mechanism == "sinusoidal":
        law = law_of(table) or scaled_law_of(table)
    rows = PositionTable(table[start:].float().cpu(), law, start)
    return Found(site.path, site.name, site.mechanism, rows, table[:start], new[0] - start)


# -- what is changed


@dataclass(frozen=True)
class Stretch:
    """A hook before a module that computes its rows: position p is computed as p / factor."""

    factor: float

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        given = dict(zip(("seq_length", "position"), args, strict=False)) | kwargs
        at = given.get("position")
        if at is None:
            device = next(module.buffers()).device
            at = torch.arange(given["seq_length"], dtype=torch.float32, device=device)[None]
        return (), {"position": at / self.factor}


def _change_computed(host: Any, site: Site, rule: TableRule, options: MethodOptions, changes: list[Change]) -> bool:
    """Change positions that are computed in every forward; whether the config says all of it."""
    if rule.silent:
        changes.append(ConfigChange.apply(host, reader_of(host, site.path) or "", _SWITCH, False))
        return True
    factor = options.factor  # type: ignore[attr-defined]
    if rule.becomes == "sinusoidal" or factor == 1:
        return True
    changes.append(HookChange.apply(host, site.path, Stretch(factor), before=True))
    return False


def _limit(host: Any, place: str, changes: list[Change]) -> None:
    reader = host.get_submodule(place)
    hook = PastLength(past_length(host.config), host.config.context_length, _place_of_past(reader))
    changes.append(HookChange.apply(host, place, hook, before=True))


def _place_of_past(reader: nn.Module) -> int:
    return list(inspect.signature(type(reader).forward).parameters)[1:].index(PAST)


def _verify(
    host: Any, found: Sequence[Found], computed: Sequence[Site], rule: TableRule, options: MethodOptions
) -> None:
    for item in found:
        last = item.table.start + item.positions - 1
        spans = [(item.table.start, last)]
        if getattr(host.config, "lags_sequence", None) is not None:
            context = host.config.context_length
            # An encoder reads the one, a decoder the other.
            spans = [(0, context - 1), (context, last)]
        check_reads(host, item.path, item.name, spans)
    for site in computed:
        if not rule.silent:
            _check_computed(host.get_submodule(site.path), 1.0 if rule.becomes else options.factor)  # type: ignore[attr-defined]
    if computed:
        check_runs(host)


def _check_computed(module: nn.Module, factor: float) -> None:
    """Hold what the module emits against sines and cosines of p / factor."""
    scales = next(module.buffers()).double()
    count = 9
    with torch.no_grad():
        emitted = module(count)[0].double()
    angle = torch.arange(count, device=scales.device)[:, None] / factor * scales
    wanted = torch.cat((angle.sin(), angle.cos()), dim=-1)
    if not torch.allclose(emitted[:, : wanted.shape[-1]], wanted, rtol=0, atol=2e-2):
        raise VerificationError("the model's positions are not the sines and cosines of p / factor")

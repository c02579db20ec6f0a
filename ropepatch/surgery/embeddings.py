"""Models with a position table: the table is replaced by a longer one, in place, and all that is as long with it.

The table stays the parameter (or buffer) that it was, under its key of the state dict, so that optimizers, adapters
and modules that share it follow. Rows before the first position (padding, offsets) are kept. Nothing runs differently:
the model reads another row, and a hook turns inputs beyond the new limit into a clear error.

Methods that put relative positions in the place of a table silence it, all rows of it, and go on in the attention seam.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ropepatch.errors import OptionError, UnsupportedModelError, UsageError
from ropepatch.families._rotary import owner_of
from ropepatch.families._site import Site
from ropepatch.families._tables import adds_offset, first_row
from ropepatch.methods._base import MethodOptions
from ropepatch.methods._sinusoid import law_of
from ropepatch.methods._tables import PositionTable, TableRule
from ropepatch.surgery import _embeddings_grid as grids
from ropepatch.surgery import _embeddings_series as series
from ropepatch.surgery import _embeddings_swap as swaps
from ropepatch.surgery import relative
from ropepatch.surgery._changes import AttributeChange, BufferChange, Change, HookChange, TableChange, revert_all
from ropepatch.surgery._embeddings_base import Patched, follows_law, key_of, refuse_shared, usable_table
from ropepatch.surgery._embeddings_check import check_read
from ropepatch.surgery._embeddings_lengths import config_entry, lengthen
from ropepatch.surgery._embeddings_limit import LengthLimit

_TABLES = ("learned", "sinusoidal")
# Methods by which these models compute a longer table themselves.
_GROWS = ("make_weights", "make_weight")


@dataclass(frozen=True)
class Found:
    """A table as it stands.

    Attributes:
        path, name: where it is.
        mechanism: "learned" or "sinusoidal".
        start: the row of position 0.
        length: positions that it has.
        entry: name and value of the config entry that states it.
        persistent: it is saved with the weights.
    """

    path: str
    name: str
    mechanism: str
    start: int
    length: int
    entry: tuple[str, int]
    persistent: bool


def takes(sites: Sequence[Site], method: Any) -> bool:
    """Whether position tables are what the model's text part knows order by, and `method` is one that changes them."""
    text = [site for site in sites if site.part == "text"]
    tables = [site for site in text if site.mechanism in _TABLES]
    # Beside a table a model may have relative biases, which bear any length; rotary ones come with tables of another
    # part of the model.
    alone = all(site.mechanism in (*_TABLES, "relative_bias", "none") for site in text)
    return bool(tables) and alone and method.table is not None


def refuse_table_options(method: Any, options: MethodOptions) -> None:
    """Refuse options that speak of position tables, for a model that has none.

    Raises:
        OptionError: names the first of them.
    """
    if method.table is not None:
        _refuse_options(method, options, method.table.only, "speaks of position tables, and this model has none")


def apply(
    host: nn.Module,
    sites: Sequence[Site],
    method: Any,
    options: MethodOptions,
    *,
    original_length: int | None,
    layers: Sequence[int] | None = None,
    verify: bool,
) -> Patched:
    """Put a method in force on every table of the text part. On any failure the model is as before.

    Args:
        layers: numbers of the attention modules to change, for methods that put relative positions there.
        verify: run the part of the model that reads each table, one token past its old limit too.

    Raises:
        UnsupportedModelError: a table that is held, shared or stated in a way that is not known.
        OptionError: an option that tables have no use for, or a length that they cannot have.
        VerificationError: the model does not read the new rows.
    """
    rule: TableRule = method.table
    _refuse_options(method, options, rule.without, "does not apply to position tables")
    unset = {name: value for name, value in rule.defaults if getattr(options, name) is None}
    options = options.model_copy(update=unset)
    if layers is not None and not rule.attends:
        raise OptionError(
            f"layers selects attention layers, and {method.name!r} changes the position table only", given=layers
        )
    text = [site for site in sites if site.part == "text" and site.mechanism in _TABLES]
    if rule.attends:
        _refuse_beside(host, sites, method)
    if series.takes(host, text):
        return series.apply(host, text, method, options, original_length=original_length, verify=verify)
    _refuse_mechanism(host, method, text)
    if grids.takes(host, text):
        return grids.apply(host, text, method, options, original_length=original_length, verify=verify)
    found = [_found(host, site) for site in text]
    refuse_shared(host, [(item.path, item.name) for item in found])
    lengths = [_lengths(item, options.factor, original_length) for item in found]  # type: ignore[attr-defined]
    tables = [_table(host, item, old) for item, (old, _) in zip(found, lengths, strict=True)]
    made = [rule.compute(table, new, options) for table, (_, new) in zip(tables, lengths, strict=True)]
    changes: list[Change] = []
    try:
        for item, rows, (_, new) in zip(found, made, lengths, strict=True):
            _write(host, item, rows, changes, whole=rule.attends)
            lengthen(host, item.path, item.entry, _rows(host, item), new - item.length, changes)
        for item in found if rule.silent else ():
            _hold(host, item, changes)
        attending: list[dict[str, Any]] = []
        if rule.attends:
            # Its hook before the call must come before the one of the limit, which may refuse the call.
            place = owner_of(host, found[0].path)
            attending = swaps.swap(
                host, place, method, options, changes, length=lengths[0][0], layers=layers, verify=verify
            )
        for item, (_, new) in zip(found, lengths, strict=True):
            _limit(host, item, new, changes)
        biased = _apply_relative(host, sites, method, options, original_length, verify, changes)
        if verify:
            for item, (_, new) in zip(found, lengths, strict=True):
                check_read(host, item.path, item.name, item.start, item.length, new)
    except BaseException:
        revert_all(host, changes)
        raise
    own_law = all(follows_law(table, rows) for table, rows in zip(tables, made, strict=True))
    plain = not biased and not attending and (own_law or all(item.persistent for item in found))
    described = [
        {"path": item.path, "name": item.name, "mechanism": item.mechanism, "first_row": item.start, "length": new}
        for item, (_, new) in zip(found, lengths, strict=True)
    ]
    warnings = [_reminder(lengths[0])] if lengths[0][1] > found[0].length else []
    finetune = getattr(method, "finetune", "")
    learned = any(item.mechanism == "learned" for item in found)
    if rule.attends:
        warnings.append(swaps.SWAPPED)
    elif finetune and (learned or not own_law):
        warnings.append(finetune)
    became = method.becomes if rule.attends else rule.becomes
    return Patched(
        changes,
        [*described, *attending],
        found[0].mechanism,
        *lengths[0],
        plain,
        warnings,
        became if became != found[0].mechanism else None,
        options,
    )


def table_length(host: nn.Module, sites: Sequence[Site]) -> int | None:
    """Positions of the first table of the text part, or None: configs also count rows that no position reads."""
    for site in sites:
        if site.part == "text" and site.mechanism in _TABLES and site.name and not site.note:
            try:
                return _found(host, site).length
            except UnsupportedModelError:
                return None
    return None


def _reminder(lengths: tuple[int, int]) -> str:
    return (
        f"the tokenizer may still cut at {lengths[0]} tokens: set tokenizer.model_max_length = {lengths[1]}, or pass "
        f"max_length={lengths[1]}"
    )


# -- what is there


def _refuse_options(method: Any, options: MethodOptions, names: Sequence[str], why: str) -> None:
    for name in names:
        default = type(options).model_fields[name].get_default(call_default_factory=True)
        if getattr(options, name) != default:
            raise OptionError(f"the option {name!r} of {method.name!r} {why}", given=getattr(options, name))


def _refuse_mechanism(host: Any, method: Any, text: Sequence[Site]) -> None:
    others = [site for site in text if site.mechanism not in method.mechanisms]
    if others:
        raise UnsupportedModelError(
            f"{method.name!r} changes {' or '.join(method.mechanisms)} positions, and {others[0].where} of this "
            f"{host.config.model_type} model is {others[0].mechanism}",
            hint="'sinusoidal' makes such a table longer",
        )
    computed = [site for site in text if not site.name or site.note]
    if computed:
        raise UnsupportedModelError(
            f"the positions at {computed[0].where} of this {host.config.model_type} model are no table with a row for "
            f"each: {computed[0].note}"
        )


def _refuse_beside(host: Any, sites: Sequence[Site], method: Any) -> None:
    """Refuse what relative positions in the place of one table would not replace."""
    if (kind := getattr(host, "main_input_name", "input_ids")) != "input_ids":
        raise UnsupportedModelError(
            f"{method.name!r} takes the place of a position table in models of text, and this {host.config.model_type} "
            f"model reads {kind}"
        )
    biased = next((site for site in sites if site.part == "text" and site.mechanism == "relative_bias"), None)
    if biased is not None:
        raise UnsupportedModelError(
            f"beside its table this {host.config.model_type} model has biases by distance at {biased.where}, which "
            "would stay"
        )


def _found(host: nn.Module, site: Site) -> Found:
    module = host.get_submodule(site.path)
    held: Tensor | None = module._parameters.get(site.name)
    if held is None:
        held = module._buffers.get(site.name)
    held = usable_table(host, site, held)
    start, rows = first_row(host, site.path), held.shape[0]
    entry = config_entry(host, site.path, rows, start)
    saved = site.name in module._parameters or site.name not in module._non_persistent_buffers_set
    ignored: Any = getattr(host, "_keys_to_ignore_on_save", None) or ()
    persistent = saved and key_of(site.path, site.name) not in ignored
    return Found(site.path, site.name, site.mechanism, start, min(entry[1], rows - start), entry, persistent)


def _lengths(item: Found, factor: float, original_length: int | None) -> tuple[int, int]:
    """Trained and target length of a table.

    Raises:
        OptionError: the table is shorter than the trained length, or would shrink.
    """
    old = original_length or item.length
    if old > item.length:
        raise OptionError(
            "original_length is longer than the position table", given=old, allowed=f"up to {item.length} tokens"
        )
    new = round(old * factor)
    if new < item.length:
        raise OptionError(
            f"the table at {item.path} would shrink: {old} tokens times {factor:g} are {new}",
            allowed=f"at least its {item.length} positions",
            hint=f"factor={item.length / old:g} or more",
        )
    return old, new


def _rows(host: nn.Module, item: Found) -> int:
    """Rows of the table before the change that was just made."""
    module = host.get_submodule(item.path)
    return int(module.get_buffer(f"ropepatch_original_{item.name}").shape[0])


def _table(host: nn.Module, item: Found, length: int) -> PositionTable:
    table: Tensor = getattr(host.get_submodule(item.path), item.name).detach()
    law = law_of(table) if item.mechanism == "sinusoidal" else None
    rows = table[item.start : item.start + length].float().cpu()
    return PositionTable(rows, law, item.start)


# -- what is changed


def _write(host: nn.Module, item: Found, rows: Tensor, changes: list[Change], *, whole: bool) -> None:
    """Put `rows` in the place of those that positions read; with `whole` zeros in the place of all others too."""
    module = host.get_submodule(item.path)
    table: Tensor = getattr(module, item.name).detach()
    before, after = table[: item.start], table[item.start + item.length :]
    longer = torch.cat((before, rows.to(table), after))
    if whole:
        longer = torch.zeros_like(longer)
    kind: Any = TableChange if item.name in module._parameters else BufferChange
    changes.append(kind.apply(host, item.path, item.name, longer))
    for method in _GROWS:
        if callable(getattr(module, method, None)):
            # Past its end the model would write its own rows over the table.
            changes.append(AttributeChange.apply(host, item.path, method, functools.partial(_refuse_growth, len(rows))))


def _hold(host: nn.Module, item: Found, changes: list[Change]) -> None:
    """Keep training from filling the rows of a silent table again, wherever a module of its own looks them up."""
    if item.name in host.get_submodule(item.path)._parameters and owner_of(host, item.path) != item.path:
        changes.append(HookChange.apply(host, item.path, swaps.silent, before=False))


def _refuse_growth(limit: int, *_: Any, **__: Any) -> None:
    raise UsageError(
        "the input reaches beyond the model's position table",
        allowed=f"up to {limit} tokens",
        hint="unpatch and patch again with a larger factor",
    )


def _limit(host: nn.Module, item: Found, length: int, changes: list[Change]) -> None:
    owner = owner_of(host, item.path)
    names = tuple(inspect.signature(type(host.get_submodule(owner)).forward).parameters)[1:]
    last_id = length if adds_offset(host, item.path) else length + item.start
    changes.append(HookChange.apply(host, owner, LengthLimit(length, last_id, names), before=True))


def _apply_relative(
    host: nn.Module,
    sites: Sequence[Site],
    method: Any,
    options: MethodOptions,
    original_length: int | None,
    verify: bool,
    changes: list[Change],
) -> bool:
    """Scale the relative biases beside a table (MPNet, DeBERTa-v2), where the method speaks of them too."""
    biased = any(site.part == "text" and site.mechanism == "relative_bias" for site in sites)
    if not biased or "relative_bias" not in method.mechanisms:
        return False
    done = relative.apply(host, method, options, original_length=original_length, verify=verify)
    changes.extend(done.changes)
    return options.factor != 1  # type: ignore[attr-defined]

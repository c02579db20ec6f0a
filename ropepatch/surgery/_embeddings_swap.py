"""A position table gives way to relative positions: a rotation, or a bias by distance, in the attention seam.

The table is silent by then. First the seam attends as the model itself does, and must give the model's own outputs
with the silent table; then the method's scheme is put in force. Once it is, no position reaches the model but through
the scheme: the rows of zeros only let the model go on looking them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ropepatch.attention import interface
from ropepatch.attention.interface import WatchedCall, watching
from ropepatch.errors import UnsupportedModelError, VerificationError, first_line
from ropepatch.methods._attention import AttentionMethod, LayerGeometry
from ropepatch.methods._base import MethodOptions
from ropepatch.surgery._changes import AttributeChange, Change, revert_all
from ropepatch.surgery._choose import numbered
from ropepatch.surgery._neutral import Outputs, check_finite, check_neutral, outputs
from ropepatch.surgery._probe import run, tokens
from ropepatch.surgery._seam import Seam, own_layout
from ropepatch.surgery._takeover import learn, refuse, take_over, watch

SWAPPED = "Replaces the position table that the weights were trained with: finetune the model after this swap."

_TOKENS = 6


def silent(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """A hook after the look-up of a silenced table: nothing is read, and nothing learned, from whatever it holds."""
    del module, args, kwargs
    if isinstance(output, tuple):
        # Position ids or a scale come after the rows.
        return output[0] * 0, *output[1:]
    return None if output is None else output * 0


def swap(
    host: nn.Module,
    place: str,
    method: AttentionMethod,
    options: MethodOptions,
    changes: list[Change],
    *,
    length: int,
    layers: Sequence[int] | None,
    verify: bool,
) -> list[dict[str, Any]]:
    """Put a method of the attention seam in force where the table is silent already.

    Args:
        place: path of the model that reads the table and runs the layers.
        changes: grows by what is done.
        length: trained length in tokens.
        layers: numbers of the attention modules to change; the others attend without positions. None is all.
        verify: hold the seam without a scheme against the model's own outputs on a few tokens first, and see that the
            scheme then changes them.

    Returns:
        The attention modules as plain dicts.

    Raises:
        UnsupportedModelError: the model's attention cannot be taken over; the message says why.
        OptionError: options that do not fit a layer, or layers that do not exist.
        VerificationError: through the seam the model does not give its own outputs, or the scheme changes nothing.
    """
    owner = host.get_submodule(place)
    _refuse_kind(host, owner)
    calls = _look(host, place)
    paths = {id(module): path for path, module in host.named_modules()}
    chosen = numbered(layers if layers is not None else range(len(calls)), len(calls))
    first = calls[0].module
    wanted = outputs(owner, first, _TOKENS) if verify else None
    take_over(host, place, changes)
    watch(host, place, interface.before_call, changes)
    for number, call in enumerate(calls):
        heads, head_dim = call.query.shape[1], call.query.shape[3]
        geometry = LayerGeometry(length, heads, head_dim, both_ways=not call.seen.causal)
        changes.append(
            AttributeChange.apply(host, paths[id(call.module)], interface.SEAM, Seam(number, geometry, None))
        )
    if wanted is not None:
        check_neutral(owner, outputs(owner, first, _TOKENS), wanted, "attention and no positions")
    described = []
    for number, call in enumerate(calls):
        path, module = paths[id(call.module)], call.module
        seam: Seam = getattr(module, interface.SEAM)
        if number in chosen:
            seam = replace(seam, method=method.name, options=options.model_dump())
            # Options that do not fit are refused here.
            seam = replace(seam, layout=own_layout(seam.scheme, length))
            if method.learned is not None:
                learn(host, path, method.learned(seam.geometry, options), changes)
            setattr(module, interface.SEAM, seam)
        described.append(_describe(path, seam))
    if wanted is not None:
        got = outputs(owner, first, _TOKENS)
        check_finite(got)
        _check_changed(got, wanted, method)
    return described


def _refuse_kind(host: Any, owner: Any) -> None:
    if any(getattr(model.config, "is_encoder_decoder", False) for model in (host, owner)):
        raise UnsupportedModelError(
            f"this {host.config.model_type} model is an encoder with a decoder, and relative positions take the place "
            "of a table in a decoder alone",
            hint="load its decoder by itself, AutoModelForCausalLM, or lengthen its tables: 'linear', 'sinusoidal'",
        )
    refuse(owner)


def _look(host: Any, place: str) -> list[WatchedCall]:
    """One call of each attention module, in order, on a few tokens.

    Raises:
        UnsupportedModelError: some attention is not to be seen, or not all of it looks in the same directions.
    """
    owner = host.get_submodule(place)
    calls: list[WatchedCall] = []
    borrowed: list[Change] = []
    try:
        run(owner, tokens(owner, _TOKENS))
    except Exception as error:
        raise UnsupportedModelError(
            f"its text part does not run on a few tokens ({type(error).__name__}: {first_line(error)})"
        ) from error
    try:
        take_over(host, place, borrowed)
        with watching(calls.append):
            run(owner, tokens(owner, _TOKENS))
    except Exception as error:
        # Attention of its own computes with our mask, which has no numbers.
        raise _bypassing(host) from error
    finally:
        revert_all(host, borrowed)
    if not calls:
        raise _bypassing(host)
    if len({call.seen.causal for call in calls}) > 1:
        raise UnsupportedModelError(
            f"some attention of this {host.config.model_type} model looks both ways, and some looks back only"
        )
    return list({id(call.module): call for call in calls}.values())


def _bypassing(host: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the attention of this {host.config.model_type} model does not go through transformers' attention interface, "
        "so nothing can be put in the place of its position table",
        hint="'linear' and 'sinusoidal' make the table longer",
    )


def _describe(path: str, seam: Seam) -> dict[str, Any]:
    return {
        "path": path,
        "changed": seam.method is not None,
        "heads": seam.geometry.heads,
        "head_dim": seam.geometry.head_dim,
        "rotary_dim": seam.layout.dims if seam.layout else 0,
    }


def _check_changed(got: Outputs, wanted: Outputs, method: AttentionMethod) -> None:
    if torch.equal(got.hidden, wanted.hidden):
        raise VerificationError(f"{method.name!r} changes nothing in what the model computes")

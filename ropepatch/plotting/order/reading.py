"""What a live model's order is made of at this moment, patched or not. Reads, and changes nothing."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ropepatch.attention.interface import LEARNED, SEAM
from ropepatch.attention.scheme import Rotary, Scheme, rotated, unrotated
from ropepatch.errors import UnsupportedModelError, UsageError
from ropepatch.families import discover, host_of
from ropepatch.families._alibi_core import CORES
from ropepatch.families._native import current_frequencies
from ropepatch.families._rotary import gain_name
from ropepatch.methods.alibi import AlibiBias

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Table:
    """A position table: `rows` is float32 [P, d], CPU."""

    where: str
    mechanism: str
    rows: Tensor


@dataclass(frozen=True)
class Attention:
    """How the attention layers of one kind see order.

    Attributes:
        where: the rotary site, or the first layer, in words.
        layers: how many layers are alike, 0 where the site does not say.
        scheme: what is computed.
        rotary: the layers' own frequencies, None where nothing is rotated.
        learned: the learned part of the bias of the first of them.
    """

    where: str
    layers: int
    scheme: Scheme
    rotary: Rotary | None
    learned: Any = None


@dataclass(frozen=True)
class NativeBias:
    """A bias by distance that a model brings itself (T5 and its kin).

    Attributes:
        where: the attention module.
        module: that module, whose `compute_bias` says it.
    """

    where: str
    module: Any

    def over(self, length: int) -> tuple[Tensor, Tensor]:
        """The bias of `length` queries on as many keys, by distance.

        Returns:
            Distances int64 [N], query minus key, and the bias, float32 [H, N]. A decoder has 0 .. length - 1, an
            encoder also keys ahead.

        Raises:
            UsageError: longer than `LONGEST_NATIVE`, for the model makes the whole matrix.
        """
        import torch

        if not 2 <= length <= LONGEST_NATIVE:
            raise UsageError("the model's own bias is a matrix", given=length, allowed=f"2 to {LONGEST_NATIVE} tokens")
        with torch.no_grad():
            bias_HTN = self.module.compute_bias(length, length)[0].float().cpu()
        past, ahead = bias_HTN[:, -1].flip(-1), bias_HTN[:, 0, 1:].flip(-1)
        distances = torch.arange(length)
        if self.module.is_decoder:
            return distances, past
        return torch.cat((-distances[1:].flip(0), distances)), torch.cat((ahead, past), dim=-1)


LONGEST_NATIVE = 4096


def native_biases(model: nn.Module) -> list[NativeBias]:
    """The attention modules that hold a table of biases by distance, in module order; empty where there are none.

    Raises:
        UnsupportedModelError: there are some, and they say their bias by blocks only (LongT5's local attention).
    """
    host = host_of(model)
    found = [
        (path, module)
        for path, module in host.named_modules()
        if callable(getattr(module, "compute_bias", None)) and hasattr(module, "relative_attention_bias")
    ]
    for path, module in found:
        if "key_length" not in inspect.signature(module.compute_bias).parameters:
            raise UnsupportedModelError(f"{path} gives its bias by blocks, not by distance, so it cannot be drawn")
    return [NativeBias(path, module) for path, module in found if hasattr(module, "is_decoder")]


def tables(model: nn.Module) -> list[Table]:
    """The position tables of a model, in module order.

    Raises:
        UnsupportedModelError: it has none; the message names the mechanism that it has.
    """
    host = host_of(model)
    sites = discover(host)
    found = []
    for site in sites:
        if site.kind == "table":
            rows = getattr(host.get_submodule(site.path), site.name).detach()
            found.append(Table(site.where, site.mechanism, rows.reshape(-1, rows.shape[-1]).float().cpu().contiguous()))
    if not found:
        raise _none_of("position table", host, sites)
    return found


def attentions(model: nn.Module) -> list[Attention]:
    """The kinds of attention of a model's text part whose order is a rotation, a scheme or a bias of ours.

    Raises:
        UnsupportedModelError: there is none; the message names the mechanism that the model has.
    """
    host = host_of(model)
    seams = _seams(host)
    if seams:
        return seams
    sites = discover(host)
    found = [
        Attention(
            site.where,
            0,
            rotated(),
            Rotary(
                current_frequencies(host, site),
                float(getattr(host.get_submodule(site.path), gain_name(site.name), 1.0)),
            ),
        )
        for site in sites
        if site.kind == "frequencies" and site.part == "text"
    ]
    if any(site.kind == "slopes" for site in sites) and host.config.model_type in CORES:
        slopes = CORES[host.config.model_type].slopes(host.base_model)
        found.append(Attention("slopes", 0, unrotated(AlibiBias(slopes)), None))
    if not found:
        raise _none_of("rotation or bias by distance", host, sites)
    return found


def _seams(host: nn.Module) -> list[Attention]:
    kinds: dict[Any, list[Any]] = {}
    for path, module in host.named_modules():
        seam = module.__dict__.get(SEAM)
        if seam is not None:
            # Schemes are shared among layers of one geometry.
            kinds.setdefault((id(seam.scheme), LEARNED in module._modules), []).append((path, module, seam))
    return [
        Attention(members[0][0], len(members), seam.scheme, seam.rotary, members[0][1]._modules.get(LEARNED))
        for members in kinds.values()
        for seam in [members[0][2]]
    ]


def _none_of(thing: str, host: Any, sites: Any) -> UnsupportedModelError:
    mechanisms = sorted({site.mechanism for site in sites})
    return UnsupportedModelError(
        f"a {host.config.model_type} model has no {thing} to draw", given=f"mechanism {'+'.join(mechanisms) or 'none'}"
    )

"""What a live model's order is made of at this moment, patched or not. Reads, and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ropepatch.attention.interface import LEARNED, SEAM
from ropepatch.attention.scheme import Rotary, Scheme, rotated, unrotated
from ropepatch.errors import UnsupportedModelError
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

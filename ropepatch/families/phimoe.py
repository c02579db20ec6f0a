"""Phi-MoE computes its frequencies anew from the config in every forward, whatever its buffer holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from ropepatch.families._registry import family
from ropepatch.families._rotary import rotary_sites
from ropepatch.families._site import Site


@family("phimoe")
def phimoe_sites(host: nn.Module) -> Iterable[Site]:
    """Rotary, but not to be changed through its buffer."""
    return [
        replace(site, kind="fixed", note="recomputed from the config in every forward") for site in rotary_sites(host)
    ]

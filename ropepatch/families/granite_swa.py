"""Granite with sliding windows: a rotary module for each distinct theta; the one at the usual place is never called."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ropepatch.families._registry import family
from ropepatch.families._rotary import rotary_sites
from ropepatch.families._site import Site


@family("granite_swa", "granitemoe_swa")
def granite_sites(host: nn.Module) -> Iterable[Site]:
    """The modules of the list `rotary_embs`."""
    return [site for site in rotary_sites(host) if "rotary_embs" in site.path.split(".")]

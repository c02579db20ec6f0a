"""Molmo2: a scaled and an unscaled rotary module side by side; transformers itself scales the first only."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ropepatch.families._registry import family
from ropepatch.families._rotary import rotary_sites
from ropepatch.families._site import Site
from ropepatch.families._tables import table_sites


@family("molmo2_text", "molmo2")
def molmo2_sites(host: nn.Module) -> Iterable[Site]:
    """Everything but the module that stays unscaled by design."""
    rotary = [site for site in rotary_sites(host) if not site.path.endswith("rotary_emb_unscaled")]
    return [*rotary, *table_sites(host)]

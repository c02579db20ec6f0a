"""All sites of a live model."""

from __future__ import annotations

from typing import Any

from torch import nn

from ropepatch.families._patch_biases import patch_bias_sites
from ropepatch.families._patch_rotary import with_patch_rotary
from ropepatch.families._registry import FINDERS
from ropepatch.families._rotary import rotary_sites, sub_configs
from ropepatch.families._site import Site
from ropepatch.families._tables import bias_sites, table_sites


def discover(host: nn.Module) -> tuple[Site, ...]:
    """Every place where the model carries positions; one site of mechanism "none" when there is no such place."""
    root: Any = host.config
    types = [root.model_type, *(getattr(sub, "model_type", "") for _, sub in sub_configs(root))]
    finder = next((FINDERS.get(name) for name in types if name in FINDERS), structural)
    sites = tuple(finder(host))
    return sites or (
        Site(path="", name="", mechanism="none", kind="none", note="nothing in the model carries positions"),
    )


def structural(host: nn.Module) -> list[Site]:
    """What can be seen without knowing the architecture."""
    rotary = with_patch_rotary(host, rotary_sites(host))
    return [*rotary, *table_sites(host), *bias_sites(host), *patch_bias_sites(host)]

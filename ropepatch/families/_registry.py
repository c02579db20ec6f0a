"""The exceptions to structural discovery, by model_type."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from ropepatch.families._site import Site
from ropepatch.registry import Registry

Finder = Callable[[nn.Module], Iterable[Site]]

FINDERS: Registry[Finder] = Registry("model type", package="ropepatch.families")


def family(*model_types: str) -> Callable[[Finder], Finder]:
    """Register a function that finds the sites of these model types."""
    return FINDERS.register(model_types[0], aliases=model_types[1:])

"""Where each architecture carries positions: structural discovery, then exceptions by model_type.

An exception is one file here: it registers a function from the live model to its sites under the model types
that it knows, and replaces the structural answer for them.
"""

from __future__ import annotations

from ropepatch.families._discover import discover
from ropepatch.families._site import Site
from ropepatch.families._unwrap import host_of

__all__ = ["Site", "discover", "host_of"]

"""What was asked, what was changed, how to undo it.

A `PatchRecord` rides on the patched model as one plain attribute, so it survives deepcopy and pickle, is not part
of the state dict, and is found again inside a PeftModel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RECORD_ATTRIBUTE = "_ropepatch_record"
SCHEMA_VERSION = 1


@dataclass
class PatchRecord:
    """One patch.

    Attributes:
        method: primary name of the method.
        options: every option with the value that was used, defaults included.
        seam: "frequencies", "attention" or "embeddings".
        mechanism: the mechanism that was changed.
        original_length: trained length in tokens; None where neither model nor caller says, and nothing needs it.
        target_length: length in tokens that the setting aims at.
        on_scaled: what was done with a scaling that the checkpoint carries: None, "replace" or "multiply".
        sites: the changed places, as plain dicts.
        versions: of ropepatch, transformers and torch at patch time.
        becomes: the mechanism that a swap put in its place, or None.
        base: the frequencies under a method of the attention seam, with their options; None is the model's own.
        layer_types, layers: the selection that the caller made, or None.
        given_length: `original_length` as the caller gave it; None where the config says it.
        warnings: what the user should know.
        undo: the changes in the order they were made; not part of the plain form.
    """

    method: str
    options: dict[str, Any]
    seam: str
    mechanism: str
    original_length: int | None
    target_length: int | None
    on_scaled: str | None
    sites: list[dict[str, Any]]
    versions: dict[str, str]
    warnings: list[str] = field(default_factory=list)
    base: dict[str, Any] | None = None
    becomes: str | None = None
    layer_types: list[str] | None = None
    layers: list[int] | None = None
    given_length: int | None = None
    undo: list[Any] = field(default_factory=list, repr=False)

    def arguments(self) -> dict[str, Any]:
        """What makes the same patch again, as plain data, in the words of `ropepatch.sidecar.Patch`."""
        return {
            "method": self.method,
            "options": dict(self.options),
            "original_length": self.given_length,
            "target_length": self.target_length,
            "on_scaled": self.on_scaled,
            "layer_types": self.layer_types,
            "layers": self.layers,
            "base": dict(self.base) if self.base is not None else None,
            "versions": dict(self.versions),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: everything but the undo steps."""
        return {
            "schema_version": SCHEMA_VERSION,
            "method": self.method,
            "options": dict(self.options),
            "seam": self.seam,
            "mechanism": self.mechanism,
            "original_length": self.original_length,
            "target_length": self.target_length,
            "on_scaled": self.on_scaled,
            "sites": [dict(site) for site in self.sites],
            "versions": dict(self.versions),
            "becomes": self.becomes,
            "base": dict(self.base) if self.base is not None else None,
            "layer_types": self.layer_types,
            "layers": self.layers,
            "warnings": list(self.warnings),
        }

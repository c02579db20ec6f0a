"""What a model carries, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Inspection:
    """How a model knows order, and what a patch has changed.

    Attributes:
        model_type: transformers' name of the architecture.
        mechanism: the mechanism of the text part: "rotary", "alibi", "relative_bias", "learned", "sinusoidal" or
            "none"; several are joined by "+", the one that methods act on first.
        method: name of the method in force, None when unpatched.
        options: its options, defaults included.
        seam: where the method acts, None when unpatched.
        trained_length: in `unit`, None where the config does not say.
        target_length: in `unit`; the trained length when unpatched.
        native_scaling: the scaling that the checkpoint itself carries, or None.
        sites: every place where the model carries positions, as plain dicts.
        warnings: what may be wrong.
        unit: what lengths count: "tokens", "time steps", or "patches" along the longer side of an image or a window.
    """

    model_type: str
    mechanism: str
    method: str | None
    options: dict[str, Any]
    seam: str | None
    trained_length: int | None
    target_length: int | None
    native_scaling: str | None
    sites: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...] = field(default=())
    unit: str = "tokens"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "model_type": self.model_type,
            "mechanism": self.mechanism,
            "method": self.method,
            "options": dict(self.options),
            "seam": self.seam,
            "trained_length": self.trained_length,
            "target_length": self.target_length,
            "unit": self.unit,
            "native_scaling": self.native_scaling,
            "sites": [dict(site) for site in self.sites],
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        options = ", ".join(f"{name}={_short(value)}" for name, value in self.options.items())
        facts = [
            ("model", self.model_type),
            ("mechanism", self.mechanism),
            ("method", f"{self.method} ({options})" if self.method else "none (unpatched)"),
            ("seam", self.seam or "-"),
            ("trained length", _length(self.trained_length, self.unit)),
            ("target length", _length(self.target_length, self.unit)),
            ("native scaling", self.native_scaling or "none"),
        ]
        lines = [f"{name:<15} {value}" for name, value in facts]
        lines += ["", *_site_table(self.sites)]
        lines += [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _length(length: int | None, unit: str) -> str:
    return f"{length:,} {unit}" if length else "not stated"


def _short(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) > 4:
        return f"[{value[0]:.4g}, ... {len(value)} numbers]"
    return f"{value:g}" if isinstance(value, float) else str(value)


_COLUMNS = ("path", "layer_type", "mechanism", "part", "head_dim", "rotary_dim", "rope_theta", "length", "dtype")


def _site_table(sites: tuple[dict[str, Any], ...]) -> list[str]:
    columns = [name for name in _COLUMNS if any(site.get(name) not in (None, "") for site in sites)]
    if "path" not in columns:
        columns.insert(0, "path")
    header = ["site" if name == "path" else name for name in columns]
    rows = [[_cell(site, name) for name in columns] for site in _grouped(sites)]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(columns))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]


def _cell(site: dict[str, Any], name: str) -> str:
    value = site.get(name)
    if name == "path":
        place = ".".join(part for part in (site["path"], site["name"]) if part)
        return place or site.get("note") or "(none)"
    return "-" if value is None else _short(value)


def _grouped(sites: tuple[dict[str, Any], ...]) -> list[dict[str, Any]]:
    """Sites that differ only in a layer number, folded into one row."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for site in sites:
        pattern = ".".join("*" if step.isdigit() else step for step in site["path"].split("."))
        rest = tuple((name, repr(value)) for name, value in site.items() if name != "path")
        groups.setdefault((pattern, rest), []).append(site)
    return [
        members[0] if len(members) == 1 else {**members[0], "path": f"{pattern} ({len(members)}x)"}
        for (pattern, _), members in groups.items()
    ]

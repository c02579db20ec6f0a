"""What an attention module carries while it is patched: enough to compute, to be copied, and to be pickled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ropepatch.attention.rotation import Layout
from ropepatch.attention.scheme import Rotary, Scheme, rotated, unrotated
from ropepatch.methods._attention import LayerGeometry
from ropepatch.methods._base import METHODS
from ropepatch.methods._options import parse_options


@dataclass
class Seam:
    """One attention module's part of a patch.

    A scheme is made of functions, which pickle refuses and deepcopy would multiply, so a seam keeps how its scheme is
    made; layers of one geometry share one scheme, and with it the work of planning a call.

    Attributes:
        number: of the module among the model's attention modules.
        geometry: what the scheme is built from.
        layout: where the rotated dimensions sit in a head; None where the seam rotates nothing.
        method, options: what to build; method None is the model's own attention.
    """

    number: int
    geometry: LayerGeometry
    layout: Layout | None
    method: str | None = None
    options: dict[str, Any] | None = None

    @property
    def scheme(self) -> Scheme:
        made: Scheme | None = self.__dict__.get("_scheme")
        if made is None:
            made = self.__dict__["_scheme"] = self._make()
        return made

    @property
    def rotary(self) -> Rotary | None:
        if self.layout is None or self.geometry.rotary is None:
            return None
        made: Rotary | None = self.__dict__.get("_rotary")
        if made is None:
            made = self.__dict__["_rotary"] = Rotary(self.geometry.rotary.inv_freq, self.geometry.gain)
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __deepcopy__(self, memo: dict[int, Any]) -> Seam:
        return Seam(self.number, self.geometry, self.layout, self.method, dict(self.options) if self.options else None)

    def _make(self) -> Scheme:
        if self.method is None:
            if self.geometry.both_ways:
                return _BOTH_WAYS
            return _ROTATED if self.layout is not None else _UNROTATED
        rotary = self.geometry.rotary
        key = (
            self.geometry.length,
            self.geometry.heads,
            self.geometry.head_dim,
            self.geometry.gain,
            self.geometry.both_ways,
            None if rotary is None else (rotary.rope_theta, rotary.original_length, tuple(rotary.inv_freq.tolist())),
        )
        return _shared(self.method, repr(self.options), key, _Recipe(self.method, self.options or {}, self.geometry))


_ROTATED, _UNROTATED, _BOTH_WAYS = rotated(), unrotated(), unrotated(both_ways=True)


def own_layout(scheme: Scheme, length: int) -> Layout | None:
    """The first dimensions of a head, as many as the scheme's own frequencies turn; None where it has none."""
    rotaries = [segment.rotary for segment in scheme.segments(0, length) if segment.rotary is not None]
    return Layout(0, 2 * rotaries[0].inv_freq.numel()) if rotaries else None


@dataclass(frozen=True, eq=False)
class _Recipe:
    method: str
    options: dict[str, Any]
    geometry: LayerGeometry

    # All recipes are alike to the cache: the other arguments tell them apart.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Recipe)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=256)
def _shared(method: str, options: str, key: Any, recipe: _Recipe) -> Scheme:
    del options, key
    entry: Any = METHODS.get(method)
    scheme: Scheme = entry.build(recipe.geometry, parse_options(entry, recipe.options))
    return scheme

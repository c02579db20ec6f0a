"""Random contents that are the same on every machine: numbers and UUIDs out of a hash of what they are for."""

from __future__ import annotations

import hashlib
from uuid import UUID


def draw_number(below: int, *what: object) -> int:
    """A number from 0 to below - 1."""
    return int.from_bytes(_digest(what), "big") % below


def draw_uuid(*what: object) -> str:
    """A UUID (its version says 4, random, as any reader expects)."""
    return str(UUID(bytes=_digest(what)[:16], version=4))


def draw_hex(digits: int, *what: object) -> str:
    """So many hexadecimal digits; fewer are the beginning of more."""
    blocks = range(-(-digits // 64))
    return "".join(_digest((*what, block)).hex() for block in blocks)[:digits]


def _digest(what: tuple[object, ...]) -> bytes:
    return hashlib.sha256("|".join(map(str, what)).encode()).digest()

"""Positions that skip ahead, so that a short window shows the distances of a long one."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ropepatch.errors import OptionError


def generator_of(seed: int, index: int) -> torch.Generator:
    """The random numbers of one training row: the same in every process, and after a resume."""
    digest = hashlib.sha256(f"positions|{seed}|{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def pose_positions(length: int, target_length: int, chunks: int, generator: torch.Generator) -> Tensor:
    """Positional skip-wise positions (PoSE, arXiv 2309.10400, eqs. 3 and 4).

    The window is cut into chunks whose positions run on by one. The first chunk begins at 0, and chunk i is shifted by
    u_i, uniform over u_(i-1) .. target_length - length, so positions grow and stay below the target. All chunks but the
    last have lengths uniform over 1 .. ceil(length / chunks), the rule of the published code for two chunks.

    Args:
        length: tokens of the window.
        target_length: positions stay below it.
        chunks: pieces of the window, 1 .. length.
        generator: of the draws.

    Returns:
        int64 [length], strictly increasing from 0.

    Raises:
        OptionError: a target below the window, or more chunks than tokens.
    """
    _check(length, target_length)
    if not 1 <= chunks <= length:
        raise OptionError("a window cannot be cut into so many chunks", given=chunks, allowed=f"1..{length}")
    positions = torch.arange(length)
    largest = -(-length // chunks)
    start, shift = 0, 0
    for left in range(chunks - 1, 0, -1):
        # Each chunk that is still to come keeps a token.
        start += _draw(1, min(largest, length - start - left), generator)
        shift = _draw(shift, target_length - length, generator)
        positions[start:] = torch.arange(start, length) + shift
    return positions


def random_positions(length: int, target_length: int, generator: torch.Generator) -> Tensor:
    """Randomised positions (arXiv 2305.16843): a sorted sample of 0 .. target_length - 1 without replacement.

    Returns:
        int64 [length], strictly increasing.

    Raises:
        OptionError: a target below the window.
    """
    _check(length, target_length)
    return torch.randperm(target_length, generator=generator)[:length].sort().values


def _check(length: int, target_length: int) -> None:
    if length < 1:
        raise OptionError("a window holds at least one token", given=length)
    if target_length < length:
        raise OptionError(
            "positions that skip ahead need a target of at least the window's length",
            given=target_length,
            allowed=f">= {length}",
            hint="raise train.positions.target_length or the patch's factor, or shorten data.length",
        )


def _draw(first: int, last: int, generator: torch.Generator) -> int:
    """A whole number, uniform over first .. last."""
    return int(torch.randint(first, last + 1, (), generator=generator))

"""Rows of a table between its rows: along a line, and along both axes of a grid.

Along a line new position p reads the old table at p / s, as position interpolation does (arXiv 2306.15595); past the
last row, the last row. On a grid of patches the centres of the patches are what is aligned, as every vision model of
transformers does when it meets another image size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def interpolated(rows: Tensor, at: Tensor, *, cubic: bool = False) -> Tensor:
    """The table read at fractional positions.

    Args:
        rows: [L, d], float32.
        at: [n], not negative; beyond L - 1 the last row is read.
        cubic: Keys' cubic convolution (a = -1/2, IEEE ASSP 29, 1981), which is exact for parabolas; else straight
            lines between rows.

    Returns:
        [n, d], float32; the rows themselves, to the last bit, where `at` is whole.
    """
    last = len(rows) - 1
    at = at.double().clamp(0, last)
    low = at.floor().long()
    share = (at - low)[:, None].float()
    if not cubic or last < 2:
        return torch.lerp(rows[low], rows[(low + 1).clamp(max=last)], share)
    # One row past either end, by which the parabola through the three rows there goes on.
    padded = torch.cat((_beyond(rows[:3]), rows, _beyond(rows.flip(0)[:3]), rows[-1:]))
    before, here, after, next_one = (padded[low + shift] for shift in range(4))
    linear = 0.5 * (after - before)
    square = before - 2.5 * here + 2 * after - 0.5 * next_one
    cube = 0.5 * (next_one - before) + 1.5 * (here - after)
    return here + share * (linear + share * (square + share * cube))


def _beyond(rows: Tensor) -> Tensor:
    return (3 * rows[0] - 3 * rows[1] + rows[2])[None]


def resized(rows: Tensor, size: tuple[int, int], *, cubic: bool = False) -> Tensor:
    """A grid of rows [height, width, d] at another size, with the centres of the patches aligned."""
    mode = "bicubic" if cubic else "bilinear"
    planes = rows.permute(2, 0, 1)[None]
    return nn.functional.interpolate(planes, size=size, mode=mode, align_corners=False)[0].permute(1, 2, 0)

"""The rotation itself, written three ways: by pairs, as one matrix, as complex numbers.

Reference maths: plain and obviously right, for tests, documentation and as the measure of every faster path.
Source: RoFormer, arXiv 2104.09864, section 3.2.

Shapes: D a head's dimensions, d the rotated ones (the first d of D), n tokens, * any leading dimensions.

Two layouts are in use for the d/2 planes: `interleaved` pairs neighbours, (0, 1), (2, 3), ...; `half` pairs
i with i + d/2. They are the same up to the order of the dimensions (`interleaved_order`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ropepatch.errors import OptionError

Layout = Literal["half", "interleaved"]


def angles(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Angle of every plane at every position, in radians.

    Args:
        positions: [*, n], whole or fractional tokens; whole ones are exact up to 2^24.
        inv_freq: [d / 2], radians per token.

    Returns:
        positions x inv_freq in float32, [*, n, d / 2].
    """
    return positions.float().unsqueeze(-1) * inv_freq.float()


def rotate(x: Tensor, angle: Tensor, *, layout: Layout = "half", rotary_dim: int | None = None) -> Tensor:
    """`x` with each plane turned by its angle: (a, b) -> (a cos - b sin, a sin + b cos).

    Args:
        x: [*, n, D], any floating dtype.
        angle: [*, n, d / 2]; it is computed with in its own precision, at least float32.
        layout: which dimensions form a plane.
        rotary_dim: d, the whole of D by default; dimensions from d on pass through.

    Returns:
        [*, n, D] in x's dtype.

    Raises:
        OptionError: d is odd, larger than D, or not twice the number of angles; an unknown layout.
    """
    d = _check(x.shape[-1] if rotary_dim is None else rotary_dim, x.shape[-1], angle)
    first, second = _planes(x[..., :d].to(angle.dtype), layout)
    cos, sin = angle.cos(), angle.sin()
    turned = _join(first * cos - second * sin, first * sin + second * cos, layout)
    return torch.cat((turned.to(x.dtype), x[..., d:]), dim=-1)


def rotate_complex(x: Tensor, angle: Tensor, *, layout: Layout = "half") -> Tensor:
    """The same as `rotate` over the whole head, by (a + ib) e^(i angle).

    Args:
        x: [*, n, d].
        angle: [*, n, d / 2].

    Raises:
        OptionError: as `rotate`.
    """
    _check(x.shape[-1], x.shape[-1], angle)
    first, second = _planes(x.to(angle.dtype), layout)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angle), angle)
    return _join(turned.real, turned.imag, layout).to(x.dtype)


def rotation_matrix(angle: Tensor, *, layout: Layout = "half") -> Tensor:
    """The d x d orthogonal matrix that `rotate` applies to a column vector.

    Block-diagonal with 2 x 2 blocks in the interleaved layout; the same with rows and columns reordered in
    the half layout.

    Args:
        angle: [*, d / 2].

    Returns:
        [*, d, d] in the angle's dtype.

    Raises:
        OptionError: an unknown layout.
    """
    d = 2 * angle.shape[-1]
    first, second = _planes(torch.arange(d), layout)
    cos, sin = angle.cos(), angle.sin()
    matrix = angle.new_zeros(*angle.shape[:-1], d, d)
    matrix[..., first, first] = cos
    matrix[..., first, second] = -sin
    matrix[..., second, first] = sin
    matrix[..., second, second] = cos
    return matrix


def interleaved_order(rotary_dim: int) -> Tensor:
    """The order that turns the half layout into the interleaved one: x_interleaved = x_half[..., order].

    Args:
        rotary_dim: d.

    Returns:
        int64, [d]: 0, d/2, 1, d/2 + 1, ...

    Raises:
        OptionError: d is odd.
    """
    first, second = _planes(torch.arange(rotary_dim), "half")
    return _join(first, second, "interleaved")


def _check(d: int, head_dim: int, angle: Tensor) -> int:
    if d % 2:
        raise OptionError("rotary dimensions are rotated in pairs", given=d, allowed="an even number")
    if not 0 < d <= head_dim:
        raise OptionError("rotary_dim does not fit the head", given=d, allowed=f"2..{head_dim}")
    if angle.shape[-1] != d // 2:
        raise OptionError("one angle a plane is needed", given=f"{angle.shape[-1]} angles", allowed=f"{d // 2}")
    return d


def _planes(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    d = x.shape[-1]
    if d % 2:
        raise OptionError("rotary dimensions are rotated in pairs", given=d, allowed="an even number")
    if layout == "half":
        return x[..., : d // 2], x[..., d // 2 :]
    if layout == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    raise OptionError("unknown layout of the rotated dimensions", given=layout, allowed=("half", "interleaved"))


def _join(first: Tensor, second: Tensor, layout: str) -> Tensor:
    if layout == "half":
        return torch.cat((first, second), dim=-1)
    return torch.stack((first, second), dim=-1).flatten(-2)

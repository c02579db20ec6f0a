"""The rotation itself: what the founding paper claims of it, held as properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ropepatch.errors import OptionError
from ropepatch.methods._rotation import angles, interleaved_order, rotate, rotate_complex, rotation_matrix

LAYOUTS = st.sampled_from(["half", "interleaved"])
DIMS = st.integers(1, 32).map(lambda planes: 2 * planes)
SEEDS = st.integers(0, 2**31)
POSITIONS = st.integers(0, 4096)


def vectors(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def frequencies(dim: int) -> Tensor:
    return 1e4 ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def close(left: Tensor, right: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


@given(SEEDS, DIMS, LAYOUTS, POSITIONS)
def test_the_norm_is_kept(seed: int, dim: int, layout: Any, position: int) -> None:
    x = vectors(seed, 3, dim)
    turned = rotate(x, position * frequencies(dim), layout=layout)
    close(turned.norm(dim=-1), x.norm(dim=-1))


@given(SEEDS, DIMS, LAYOUTS, POSITIONS, POSITIONS, POSITIONS)
def test_inner_products_depend_on_the_distance_alone(
    seed: int, dim: int, layout: Any, i: int, j: int, shift: int
) -> None:
    q, k = vectors(seed, 2, dim)
    f = frequencies(dim)

    def score(q_position: int, k_position: int) -> Tensor:
        return rotate(q, q_position * f, layout=layout) @ rotate(k, k_position * f, layout=layout)

    close(score(i + shift, j + shift), score(i, j), 1e-9)
    close(rotate(q, (i - j) * f, layout=layout) @ k, score(i, j), 1e-9)


@given(SEEDS, DIMS, LAYOUTS)
def test_rotations_add_up(seed: int, dim: int, layout: Any) -> None:
    x = vectors(seed, dim)
    a, b = vectors(seed + 1, 2, dim // 2)
    close(rotate(rotate(x, b, layout=layout), a, layout=layout), rotate(x, a + b, layout=layout))
    close(rotation_matrix(a, layout=layout) @ rotation_matrix(b, layout=layout), rotation_matrix(a + b, layout=layout))
    close(rotate(rotate(x, a, layout=layout), -a, layout=layout), x)


@given(SEEDS, DIMS, LAYOUTS)
def test_pairs_matrix_and_complex_numbers_agree(seed: int, dim: int, layout: Any) -> None:
    x, angle = vectors(seed, 5, dim), vectors(seed + 1, 5, dim // 2) * 3
    matrix = rotation_matrix(angle, layout=layout)
    turned = rotate(x, angle, layout=layout)
    close(turned, (matrix @ x.unsqueeze(-1)).squeeze(-1))
    close(turned, rotate_complex(x, angle, layout=layout))
    close(matrix @ matrix.mT, torch.eye(dim, dtype=torch.float64).expand_as(matrix))
    close(torch.linalg.det(matrix), torch.ones(5, dtype=torch.float64))


def test_the_interleaved_matrix_is_block_diagonal() -> None:
    angle = torch.tensor([0.3, 1.1], dtype=torch.float64)
    c, s = [math.cos(0.3), math.cos(1.1)], [math.sin(0.3), math.sin(1.1)]
    expected = [[c[0], -s[0], 0, 0], [s[0], c[0], 0, 0], [0, 0, c[1], -s[1]], [0, 0, s[1], c[1]]]
    close(rotation_matrix(angle, layout="interleaved"), torch.tensor(expected, dtype=torch.float64))


@given(SEEDS, DIMS)
def test_the_layouts_are_the_same_up_to_the_order(seed: int, dim: int) -> None:
    x, angle = vectors(seed, 4, dim), vectors(seed + 1, 4, dim // 2)
    order = interleaved_order(dim)
    close(
        rotate(x[..., order], angle, layout="interleaved"), rotate(x, angle, layout="half")[..., order], tolerance=0.0
    )


@given(SEEDS, DIMS, LAYOUTS, st.integers(0, 9))
def test_dimensions_past_rotary_dim_pass_through(seed: int, dim: int, layout: Any, rest: int) -> None:
    x, angle = vectors(seed, 2, dim + rest), vectors(seed + 1, 2, dim // 2)
    turned = rotate(x, angle, layout=layout, rotary_dim=dim)
    assert torch.equal(turned[..., dim:], x[..., dim:])
    close(turned[..., :dim], rotate(x[..., :dim], angle, layout=layout), tolerance=0.0)


def test_half_split_is_what_transformers_applies() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = torch.randn(1, 2, 7, 16, generator=torch.Generator().manual_seed(0))
    angle = angles(torch.arange(7), frequencies(16))
    both = torch.cat((angle, angle), dim=-1)[None]
    expected, _ = apply_rotary_pos_emb(x, x, both.cos(), both.sin())
    torch.testing.assert_close(rotate(x, angle), expected)


def test_interleaved_is_what_transformers_applies() -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    x = torch.randn(1, 7, 2, 16, generator=torch.Generator().manual_seed(0))
    angle = angles(torch.arange(7), frequencies(16))
    expected = apply_rotary_pos_emb(x, angle.sin()[None], angle.cos()[None])
    torch.testing.assert_close(rotate(x, angle[:, None], layout="interleaved"), expected)


def test_angles_are_float32_and_exact_for_whole_positions() -> None:
    positions = torch.tensor([[0, 1, 131071, 2**24 - 1]])
    got = angles(positions, torch.tensor([1.0, 0.5], dtype=torch.float64))
    assert got.dtype == torch.float32
    assert got.shape == (1, 4, 2)
    assert got[0, :, 0].tolist() == [0.0, 1.0, 131071.0, 2.0**24 - 1]


def test_low_precision_vectors_are_rotated_in_the_precision_of_the_angles() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).bfloat16()
    angle = angles(torch.tensor(1000), frequencies(64))
    turned = rotate(x, angle)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), angle).bfloat16())


@pytest.mark.parametrize("dim", [1, 3, 7])
def test_odd_dimensions_are_refused(dim: int) -> None:
    x, angle = torch.zeros(dim), torch.zeros(dim // 2)
    with pytest.raises(OptionError, match="in pairs"):
        rotate(x, angle)
    with pytest.raises(OptionError, match="in pairs"):
        rotate_complex(x, angle)
    with pytest.raises(OptionError, match="in pairs"):
        interleaved_order(dim)
    with pytest.raises(OptionError, match="in pairs"):
        rotate(torch.zeros(dim + 1), angle, rotary_dim=dim)


def test_angles_and_layouts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(OptionError, match="One angle a plane"):
        rotate(torch.zeros(8), torch.zeros(3))
    with pytest.raises(OptionError, match="does not fit the head"):
        rotate(torch.zeros(8), torch.zeros(5), rotary_dim=10)
    with pytest.raises(OptionError, match="layout"):
        rotate(torch.zeros(8), torch.zeros(4), layout="rows")  # type: ignore[arg-type]

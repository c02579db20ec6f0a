"""Rotary positions under linear attention: both forms against sums written out, and against each other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ropepatch.errors import OptionError
from ropepatch.methods._linear_attention import (
    positive_features,
    rotary_linear_attention,
    rotary_linear_attention_quadratic,
)

FORMS = (rotary_linear_attention, rotary_linear_attention_quadratic)


def drawn(seed: int, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("causal", [True, False])
def test_both_forms_are_the_definitions_sums(form: object, causal: bool) -> None:
    q, k, v = drawn(0, (7, 4), (7, 4), (7, 3))
    inv_freq = torch.tensor([0.7, 0.05])
    found = form(q, k, v, inv_freq, causal=causal, layout="interleaved")
    phi_q, phi_k = positive_features(q), positive_features(k)
    for m in range(7):
        top, bottom = torch.zeros(3, dtype=torch.float64), 0.0
        for n in range(m + 1 if causal else 7):
            # A plane is a complex number; a rotation by m - n is a product.
            weight = 0.0
            for i in range(2):
                a, b = (torch.complex(x[2 * i], x[2 * i + 1]) for x in (phi_q[m], phi_k[n]))
                angle = float(inv_freq[i]) * (m - n)
                weight += (a * b.conj() * complex(math.cos(angle), math.sin(angle))).real
            top += weight * v[n]
            bottom += float(phi_q[m] @ phi_k[n])
        torch.testing.assert_close(found[m], top / bottom, rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    length=st.integers(1, 40),
    planes=st.integers(1, 4),
    rest=st.integers(0, 3),
    causal=st.booleans(),
    layout=st.sampled_from(["half", "interleaved"]),
)
def test_the_forms_agree(seed: int, length: int, planes: int, rest: int, causal: bool, layout: str) -> None:
    d = 2 * planes + rest
    q, k, v = drawn(seed, (2, length, d), (2, length, d), (2, length, 3))
    inv_freq = 10.0 ** -torch.arange(planes).float()
    linear, quadratic = (form(q, k, v, inv_freq, causal=causal, layout=layout) for form in FORMS)
    torch.testing.assert_close(linear, quadratic, rtol=1e-9, atol=1e-9)


def test_without_rotation_it_is_an_average_of_the_values() -> None:
    q, k = drawn(1, (9, 4), (9, 4))
    ones = torch.ones(9, 1, dtype=torch.float64)
    torch.testing.assert_close(rotary_linear_attention(q, k, ones, torch.zeros(2)), ones)
    # The rotation is not in the normaliser: the weights no longer add up to 1.
    assert not torch.allclose(rotary_linear_attention(q, k, ones, torch.tensor([1.0, 0.3])), ones)


def test_low_precision_is_computed_in_float32() -> None:
    q, k, v = (x.bfloat16() for x in drawn(2, (300, 8), (300, 8), (300, 4)))
    found = rotary_linear_attention(q, k, v, torch.tensor([1.0, 0.1]))
    wanted = rotary_linear_attention_quadratic(q.double(), k.double(), v.double(), torch.tensor([1.0, 0.1]))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2)


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k, v = drawn(3, (5, 4), (6, 4), (6, 2))
    with pytest.raises(OptionError, match="as many queries as keys"):
        rotary_linear_attention(q, k, v, torch.tensor([1.0]))
    with pytest.raises(OptionError, match="do not fit"):
        rotary_linear_attention(q, k, v[:3], torch.tensor([1.0]), causal=False)
    assert rotary_linear_attention(q, k, v, torch.tensor([1.0]), causal=False).shape == (5, 2)

"""What holds for every method, at every site and every setting."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from geometries import FACTORS, ROUNDING, compute, factor_options, odd_sites, site, sites
from hypothesis import given, settings
from hypothesis import strategies as st

from ropepatch.methods._base import METHODS, Frequencies, RotaryGeometry

EVERY = tuple(method.name for method in METHODS if method.seam == "frequencies")
# f / s <= f' <= f in every plane: neither extrapolates further than linear, nor raises a frequency.
BETWEEN = ("linear", "llama3", "longrope", "mrrope", "ntk", "ntk_by_parts", "power", "proportional", "yarn")
FALLING = (*BETWEEN, "abf", "truncated")
# These round wherever transformers' float32 does, the others once, from float64.
MIXED = ("llama3", "ntk_by_parts", "yarn")
FLOAT32 = (*MIXED, "longrope")
few = settings(max_examples=40)


def roundings(name: str, geometry: RotaryGeometry, *results: Frequencies) -> float:
    """How far two float32 results of a method may be off each other or off the exact number, as a share of it.

    In a mixture no number passes through more than six roundings, and its shares add up to one within another; they
    are the same at every factor. longrope has four. ntk and abf are float32 powers of a base, old and new, which have
    one for each e-fold of it.
    """
    if name in ("ntk", "abf"):
        bases = [geometry.rope_theta, *((result.rope_parameters or {})["rope_theta"] for result in results)]
        return (8 + sum(map(math.log, bases))) * ROUNDING
    return (8 if name in FLOAT32 else 2) * ROUNDING


@pytest.mark.parametrize("name", EVERY)
@few
@given(st.one_of(sites(), odd_sites()))
def test_factor_one_is_the_identity_to_the_last_bit(name: str, geometry: RotaryGeometry) -> None:
    result = compute(name, geometry, **factor_options(name, geometry, 1.0))
    assert torch.equal(result.inv_freq, geometry.inv_freq)
    assert result.attention_scaling == 1.0
    assert result.softmax_gain == 1.0
    assert result.target_length == geometry.original_length


@pytest.mark.parametrize("name", EVERY)
@few
@given(st.one_of(sites(), odd_sites()), FACTORS)
def test_results_are_float32_of_the_sites_shape_and_the_site_is_untouched(
    name: str, geometry: RotaryGeometry, factor: float
) -> None:
    before = geometry.inv_freq.clone()
    result = compute(name, geometry, **factor_options(name, geometry, factor))
    assert result.inv_freq.dtype == torch.float32
    assert result.inv_freq.shape == before.shape
    assert bool(torch.isfinite(result.inv_freq).all())
    assert torch.equal(geometry.inv_freq, before)
    assert result.inv_freq.data_ptr() != geometry.inv_freq.data_ptr()


@pytest.mark.parametrize("name", EVERY)
@few
@given(sites(), FACTORS)
def test_the_target_is_factor_times_the_trained_length(name: str, geometry: RotaryGeometry, factor: float) -> None:
    result = compute(name, geometry, **factor_options(name, geometry, factor))
    assert result.target_length == round(factor * geometry.original_length)


@pytest.mark.parametrize("name", FALLING)
@few
@given(st.one_of(sites(), odd_sites()), FACTORS)
def test_frequencies_never_rise(name: str, geometry: RotaryGeometry, factor: float) -> None:
    result = compute(name, geometry, **factor_options(name, geometry, factor))
    allowed = 1 + roundings(name, geometry, result) if name in MIXED else 1
    assert bool((result.inv_freq.double() <= allowed * geometry.inv_freq.double()).all())


@pytest.mark.parametrize("name", BETWEEN)
@few
@given(st.one_of(sites(), odd_sites()), FACTORS)
def test_no_plane_is_slowed_beyond_the_factor(name: str, geometry: RotaryGeometry, factor: float) -> None:
    result = compute(name, geometry, **factor_options(name, geometry, factor))
    slowest = geometry.inv_freq.double() / factor
    # Below the smallest normal number float32 keeps a fixed step.
    step = 2.0**-149
    assert bool((result.inv_freq.double() >= (1 - roundings(name, geometry, result)) * slowest - step).all())


@pytest.mark.parametrize("name", EVERY)
@few
@given(sites(), FACTORS)
def test_frequencies_fall_from_plane_to_plane(name: str, geometry: RotaryGeometry, factor: float) -> None:
    result = compute(name, geometry, **factor_options(name, geometry, factor))
    assert bool((result.inv_freq.diff() <= 0).all())


@pytest.mark.parametrize("name", FALLING)
@few
@given(sites(), st.floats(1, 20), st.floats(1, 3))
def test_a_larger_factor_never_raises_a_frequency(
    name: str, geometry: RotaryGeometry, factor: float, more: float
) -> None:
    less = compute(name, geometry, **factor_options(name, geometry, factor))
    greater = compute(name, geometry, **factor_options(name, geometry, factor * more))
    allowed = 1 - roundings(name, geometry, less, greater)
    assert bool((allowed * greater.inv_freq.double() <= less.inv_freq.double()).all())


@pytest.mark.parametrize("name", EVERY)
@few
@given(sites(), FACTORS)
def test_partial_rotary_counts_the_rotated_dimensions_only(name: str, geometry: RotaryGeometry, factor: float) -> None:
    whole = dataclasses.replace(geometry, head_dim=geometry.rotary_dim)
    part = dataclasses.replace(geometry, head_dim=2 * geometry.rotary_dim)
    options = factor_options(name, geometry, factor)
    one, other = compute(name, whole, **options), compute(name, part, **options)
    assert torch.equal(one.inv_freq, other.inv_freq)
    assert one.attention_scaling == other.attention_scaling


@given(FACTORS)
def test_gains(factor: float) -> None:
    geometry = site(length=4096)
    by_yarn = 0.1 * math.log(factor) + 1
    by_length = math.sqrt(1 + math.log(factor) / math.log(4096))
    for name in EVERY:
        expected = {"yarn": by_yarn, "mrrope": by_yarn, "resonance": by_yarn, "longrope": by_length}.get(name, 1.0)
        result = compute(name, geometry, **factor_options(name, geometry, factor))
        assert result.attention_scaling == pytest.approx(expected, rel=1e-15)
        assert result.softmax_gain == 1.0


@pytest.mark.parametrize("name", ["yarn", "mrrope", "longrope", "resonance"])
def test_attention_factor_replaces_the_gain(name: str) -> None:
    geometry = site()
    result = compute(name, geometry, attention_factor=0.75, **factor_options(name, geometry, 4.0))
    assert result.attention_scaling == 0.75


@given(FACTORS, st.floats(0.1, 2), st.floats(0.1, 2))
def test_deepseeks_gains(factor: float, mscale: float, all_dim: float) -> None:
    result = compute("yarn", site(), factor=factor, mscale=mscale, mscale_all_dim=all_dim)
    log = math.log(factor)
    assert result.attention_scaling == pytest.approx((0.1 * mscale * log + 1) / (0.1 * all_dim * log + 1), rel=1e-15)
    assert result.softmax_gain == pytest.approx((0.1 * all_dim * log + 1) ** 2, rel=1e-15)
    alone = compute("yarn", site(), factor=factor, mscale_all_dim=all_dim)
    assert alone.attention_scaling == pytest.approx(0.1 * log + 1, rel=1e-15)
    assert alone.softmax_gain == result.softmax_gain


@pytest.mark.parametrize("name", ["ntk", "abf", "power"])
@given(sites(), FACTORS)
def test_the_highest_frequency_is_kept(name: str, geometry: RotaryGeometry, factor: float) -> None:
    result = compute(name, geometry, factor=factor)
    assert result.inv_freq[0] == geometry.inv_freq[0]


@pytest.mark.parametrize("name", ["ntk", "power"])
@given(sites(), FACTORS)
def test_the_lowest_frequency_is_divided_by_the_whole_factor(
    name: str, geometry: RotaryGeometry, factor: float
) -> None:
    result = compute(name, geometry, factor=factor)
    assert float(result.inv_freq[-1]) == pytest.approx(float(geometry.inv_freq[-1]) / factor, rel=1e-6)


@pytest.mark.parametrize("name", ["ntk_by_parts", "llama3", "yarn", "mrrope"])
@given(sites(), FACTORS)
def test_by_parts_ends_are_free_of_the_mixture(name: str, geometry: RotaryGeometry, factor: float) -> None:
    """Planes outside of the ramp are f to the last bit, or f / s, whose few roundings are all that is left."""
    turns = geometry.inv_freq.double() * geometry.original_length / (2 * math.pi)
    fast, slow = (4, 1) if name == "llama3" else (32, 1)
    # yarn and mrrope widen their range to whole indices: leave out the planes that this may touch.
    step = geometry.rope_theta ** (2 / geometry.rotary_dim) if name in ("yarn", "mrrope") else 1 + 1e-9
    result = compute(name, geometry, factor=factor).inv_freq
    kept, interpolated = turns > fast * step, turns < slow / step
    assert torch.equal(result[kept], geometry.inv_freq[kept])
    # yarn reciprocates factor * period: the factor, the product, the reciprocal and f itself are rounded.
    torch.testing.assert_close(
        result[interpolated].double(), geometry.inv_freq.double()[interpolated] / factor, rtol=4 * ROUNDING, atol=0
    )

"""Each method against its formula, written a second time plane by plane in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from geometries import FACTORS, ROUNDING, compute, odd_sites, site, sites
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ropepatch.methods._base import Frequencies, RotaryGeometry, periods

few = settings(max_examples=60)


def check(
    result: Frequencies,
    geometry: RotaryGeometry,
    formula: Callable[[int, float], float],
    roundings: float = 2,
    of_weight: float = 0,
    factor: float = 1,
) -> None:
    """Compare with `formula`, which takes the index of a plane and its frequency, up to float32 roundings.

    Each rounding is off by at most `ROUNDING` = 2^-24 of the number, half to one ulp.

    Args:
        result: what the method gave.
        geometry: the site.
        formula: of the frequency, in float64.
        roundings: how many each of its factors passes through. One for a method that computes in float64 (its
            float64 powers and logarithms have the other).
        of_weight: how many roundings the weight of a mixture of f and f / `factor` is off by, as a share of 1.
        factor: s of that mixture.
    """
    base = geometry.inv_freq.double().numpy()
    expected = np.array([formula(i, f) for i, f in enumerate(base.tolist())])
    allowed = ROUNDING * (roundings * expected + of_weight * (base - base / factor)) + 1e-30
    worse = np.abs(result.inv_freq.double().numpy() - expected) > allowed
    assert not worse.any(), (result.inv_freq.numpy()[worse], expected[worse])


def check_by_turns(
    result: Frequencies,
    geometry: RotaryGeometry,
    formula: Callable[[int, float], float],
    factor: float,
    slow: float,
    fast: float,
) -> None:
    """f is multiplied by its share, divided by a rounded factor and added: 5 roundings.

    The turns L / (2 pi / f) pass 6 (both reciprocals, 2 pi, L and two products) of at most `fast` turns, where
    they matter; `slow` is rounded, the difference over the width and its complement pass 4 of a weight up to 1.
    """
    check(result, geometry, formula, 5, (6 * fast + slow) / (fast - slow) + 4, factor)


def check_rebased(result: Frequencies, geometry: RotaryGeometry, formula: Callable[[int, float], float]) -> None:
    """Another base: on a plain series it is transformers' own series of the base that the config is to name, bit for
    bit; its float32 powers have one rounding for each e-fold of either base. Elsewhere it is rounded once.
    """
    assert result.rope_parameters is not None
    new, d = result.rope_parameters["rope_theta"], geometry.rotary_dim
    plain = periods(geometry).dtype == torch.float32
    if plain:
        theirs = 1.0 / (new ** (torch.arange(0, d, 2, dtype=torch.int64).to(dtype=torch.float) / d))
        assert torch.equal(result.inv_freq, theirs)
    check(result, geometry, formula, 8 + math.log(geometry.rope_theta) + math.log(new) if plain else 2)


@few
@given(sites(2), FACTORS)
def test_linear(geometry: RotaryGeometry, s: float) -> None:
    check(compute("linear", geometry, factor=s), geometry, lambda i, f: f / s)


@few
@given(sites(), FACTORS)
def test_ntk(geometry: RotaryGeometry, s: float) -> None:
    d = geometry.rotary_dim
    result = compute("ntk", geometry, factor=s)
    check_rebased(result, geometry, lambda i, f: f * s ** (-2 * i / (d - 2)))
    assert result.rope_parameters is not None
    assert result.rope_parameters["rope_theta"] == pytest.approx(geometry.rope_theta * s ** (d / (d - 2)), rel=1e-12)


@few
@given(sites(2), FACTORS, st.floats(0.1, 4), st.floats(0.5, 60))
def test_ntk_by_parts(geometry: RotaryGeometry, s: float, slow: float, width: float) -> None:
    fast = slow + width

    def formula(i: int, f: float) -> float:
        turns = geometry.original_length / (2 * math.pi / f)
        if turns < slow:
            return f / s
        if turns > fast:
            return f
        gamma = (turns - slow) / (fast - slow)
        return (1 - gamma) * f / s + gamma * f

    result = compute("ntk_by_parts", geometry, factor=s, beta_slow=slow, beta_fast=fast)
    check_by_turns(result, geometry, formula, s, slow, fast)


@few
@given(sites(2), FACTORS, st.floats(0.25, 2), st.floats(0.5, 8))
def test_llama3(geometry: RotaryGeometry, s: float, low: float, width: float) -> None:
    high = low + width

    def formula(i: int, f: float) -> float:
        wavelength, length = 2 * math.pi / f, geometry.original_length
        if wavelength > length / low:
            return f / s
        if wavelength < length / high:
            return f
        smooth = (length / wavelength - low) / (high - low)
        return (1 - smooth) * f / s + smooth * f

    result = compute("llama3", geometry, factor=s, low_freq_factor=low, high_freq_factor=high)
    check_by_turns(result, geometry, formula, s, low, high)


def correction(geometry: RotaryGeometry, turns: float) -> float:
    """Solve 2 pi theta^(2x/d) = L / turns for the index x."""
    wavelength = geometry.original_length / turns
    return geometry.rotary_dim / 2 * math.log(wavelength / (2 * math.pi), geometry.rope_theta)


@few
@given(st.one_of(sites(2), odd_sites()), FACTORS, st.floats(0.5, 4), st.floats(1, 60), st.booleans())
def test_yarn(geometry: RotaryGeometry, s: float, slow: float, width: float, truncate: bool) -> None:
    low, high = correction(geometry, slow + width), correction(geometry, slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, geometry.rotary_dim - 1)
    assume(low != high)  # No formula says what an empty range means: transformers does, and is the oracle elsewhere.

    def formula(i: int, f: float) -> float:
        ramp = min(max((i - low) / (high - low), 0), 1)
        return f / s * ramp + f * (1 - ramp)

    options = {"beta_slow": slow, "beta_fast": slow + width, "truncate": truncate}
    result = compute("yarn", geometry, factor=s, **options)
    if periods(geometry).dtype == torch.float64:
        check(result, geometry, formula)
    else:
        # f, the factor, its product with the period, the reciprocal, the product with the share and the sum: 6. The
        # ramp's ends are rounded and so are the difference, the width, the quotient and its complement.
        check(result, geometry, formula, 6, low / abs(high - low) + 5, s)


@few
@given(st.one_of(sites(2), odd_sites()), FACTORS, st.sampled_from(["long", "short"]), st.randoms(use_true_random=False))
def test_longrope(geometry: RotaryGeometry, s: float, use: str, random: np.random.Generator) -> None:
    lists = {kind: [random.uniform(0.5, 20) for _ in range(geometry.rotary_dim // 2)] for kind in ("long", "short")}
    result = compute("longrope", geometry, factor=s, short_factor=lists["short"], long_factor=lists["long"], use=use)
    # At the plain series f, the divisor, its product with the period and the reciprocal are rounded.
    roundings = 4 if periods(geometry).dtype == torch.float32 else 2
    check(result, geometry, lambda i, f: f / lists[use][i], roundings)


@few
@given(sites(2), FACTORS)
def test_abf_by_factor(geometry: RotaryGeometry, s: float) -> None:
    d, theta = geometry.rotary_dim, geometry.rope_theta
    length = geometry.original_length
    new = theta ** math.log(s * length / (2 * math.pi), length / (2 * math.pi))
    result = compute("abf", geometry, factor=s)
    check_rebased(result, geometry, lambda i, f: f * (new / theta) ** (-2 * i / d))
    assert result.rope_parameters == {"rope_type": "default", "rope_theta": pytest.approx(new, rel=1e-10)}
    # The plane that completed one turn over the trained length takes the whole target length for it now.
    critical = math.log(length / (2 * math.pi)) / math.log(theta)
    assert 2 * math.pi * result.rope_parameters["rope_theta"] ** critical == pytest.approx(s * length, rel=1e-9)


@few
@given(sites(2), st.floats(1, 100))
def test_abf_by_base(geometry: RotaryGeometry, times: float) -> None:
    new = geometry.rope_theta * times
    result = compute("abf", geometry, rope_theta=new)
    check_rebased(result, geometry, lambda i, f: f * times ** (-2 * i / geometry.rotary_dim))
    assert result.target_length >= geometry.original_length
    assert result.rope_parameters == {"rope_type": "default", "rope_theta": new}
    # There and back: the factor that the base implies calls for that base.
    again = compute("abf", geometry, factor=result.target_length / geometry.original_length)
    assert again.rope_parameters is not None
    assert math.log(again.rope_parameters["rope_theta"]) == pytest.approx(math.log(new), rel=5e-3)


def test_abf_with_both_takes_the_base_and_states_the_length() -> None:
    result = compute("abf", site(length=2048), rope_theta=1e6, factor=3.0)
    assert result.target_length == 6144
    assert result.rope_parameters == {"rope_type": "default", "rope_theta": 1e6}


@few
@given(sites(), FACTORS, st.floats(0.5, 1))
def test_proportional(geometry: RotaryGeometry, s: float, share: float) -> None:
    kept = math.floor(share * geometry.rotary_dim / 2)
    result = compute("proportional", geometry, factor=s, partial_rotary_factor=share)
    check(result, geometry, lambda i, f: f / s if i < kept else 0.0)


@few
@given(sites(), FACTORS)
def test_power(geometry: RotaryGeometry, s: float) -> None:
    d = geometry.rotary_dim
    check(compute("power", geometry, power=0.5), geometry, lambda i, f: f * math.sqrt(1 - 2 * i / d))
    k = math.log(s) / math.log(d / 2)
    check(compute("power", geometry, factor=s), geometry, lambda i, f: f * (1 - 2 * i / d) ** k)
    assert compute("power", geometry, power=k).target_length == pytest.approx(s * geometry.original_length, abs=1)
    assert compute("power", geometry, power=0.1, factor=4.0).target_length == 4 * geometry.original_length


@few
@given(sites(), FACTORS)
def test_truncated(geometry: RotaryGeometry, s: float) -> None:
    length = geometry.original_length

    def formula(i: int, f: float) -> float:
        if f >= 2 * math.pi / length:
            return f
        return 2 * math.pi / (16 * length) if f >= 2 * math.pi / (8 * length) else 0.0

    check(compute("truncated", geometry, factor=s), geometry, formula)


def test_truncated_has_three_kinds_of_planes() -> None:
    wavelengths = (2 * math.pi / compute("truncated", site(length=1024), factor=2.0).inv_freq.double()).numpy()
    assert {round(w / 1024) for w in wavelengths[np.isfinite(wavelengths)] if w > 1024} == {16}
    assert np.isinf(wavelengths[-1])
    assert wavelengths[0] == pytest.approx(2 * math.pi)


@few
@given(sites(2), FACTORS, st.sampled_from(["pro", "uni"]))
def test_mrrope(geometry: RotaryGeometry, s: float, variant: str) -> None:
    """The radix of digit j grows by s^epsilon_j; plane i is slowed by the product over the digits before it."""
    low = max(math.floor(correction(geometry, 32)), 0)
    high = min(math.ceil(correction(geometry, 1)), geometry.rotary_dim - 1)
    n = high - low

    def growth(digit: int) -> float:
        if not low <= digit < high:
            return 1.0
        return s ** (1 / n) if variant == "uni" else s ** (2 * (1 + digit - low) / ((1 + n) * n))

    check(
        compute("mrrope", geometry, factor=s, variant=variant),
        geometry,
        lambda i, f: f / math.prod(growth(digit) for digit in range(i)),
    )


@few
@given(sites(2), FACTORS)
def test_resonance(geometry: RotaryGeometry, s: float) -> None:
    by_yarn = compute("yarn", geometry, factor=s)
    result = compute("resonance", geometry, factor=s)
    wavelengths = [round(2 * math.pi / f) for f in by_yarn.inv_freq.double().tolist()]
    check(result, geometry, lambda i, f: 2 * math.pi / wavelengths[i])
    assert result.attention_scaling == by_yarn.attention_scaling
    assert result.rope_parameters is None

"""Skipped positions: what PoSE and randomised positions promise, and counts over many draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ropepatch.errors import OptionError
from ropepatch.training.positions import generator_of, pose_positions, random_positions

WINDOWS = st.integers(1, 40).flatmap(
    lambda length: st.tuples(st.just(length), st.integers(length, 400), st.integers(1, min(length, 6)))
)


@given(WINDOWS, st.integers(0, 2**31), st.integers(0, 2**31))
def test_pose_grows_from_zero_in_chunks_below_the_target(window: tuple[int, int, int], seed: int, index: int) -> None:
    length, target, chunks = window
    positions = pose_positions(length, target, chunks, generator_of(seed, index))
    assert positions.dtype == torch.int64 and positions.shape == (length,)
    assert positions[0] == 0 and positions[-1] < target
    steps = positions.diff()
    assert bool((steps >= 1).all())
    assert int((steps > 1).sum()) < chunks


@given(WINDOWS, st.integers(0, 2**31), st.integers(0, 2**31))
def test_random_positions_are_a_sorted_sample(window: tuple[int, int, int], seed: int, index: int) -> None:
    length, target, _ = window
    positions = random_positions(length, target, generator_of(seed, index))
    assert positions.dtype == torch.int64 and positions.shape == (length,)
    assert bool((positions.diff() >= 1).all())
    assert positions[0] >= 0 and positions[-1] < target


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_a_row_has_its_own_draws(seed: int, index: int) -> None:
    def draw(seed: int, index: int) -> list[int]:
        return torch.randint(0, 2**62, (4,), generator=generator_of(seed, index)).tolist()

    assert draw(seed, index) == draw(seed, index)
    assert draw(seed, index) != draw(seed, index + 1)
    assert draw(seed, index) != draw(seed + 1, index)
    # Not a function of the sum, or of the digits in a row.
    assert draw(seed, index + 1) != draw(seed + 1, index)


def test_drawing_leaves_the_global_random_state() -> None:
    before = torch.random.get_rng_state()
    pose_positions(8, 64, 3, generator_of(0, 0))
    random_positions(8, 64, generator_of(0, 0))
    assert torch.equal(before, torch.random.get_rng_state())


LENGTH, TARGET, DRAWS = 16, 48, 3000


@pytest.fixture(scope="module")
def draws() -> torch.Tensor:
    """[draws, LENGTH] with two chunks."""
    return torch.stack([pose_positions(LENGTH, TARGET, 2, generator_of(7, index)) for index in range(DRAWS)])


def chi_square(counts: torch.Tensor) -> float:
    expected = counts.sum() / counts.numel()
    return float(((counts - expected) ** 2 / expected).sum())


def test_skips_are_uniform(draws: torch.Tensor) -> None:
    """u_1 over 0 .. target - length, both ends included: 33 values; chi-square at its 1 - 1e-6 quantile, 32 degrees."""
    from scipy.stats import chi2

    counts = torch.bincount(draws[:, -1] - (LENGTH - 1), minlength=TARGET - LENGTH + 1).double()
    assert counts.numel() == TARGET - LENGTH + 1
    assert chi_square(counts) < chi2.ppf(1 - 1e-6, counts.numel() - 1)


def test_first_chunks_are_uniform_up_to_half(draws: torch.Tensor) -> None:
    from scipy.stats import chi2

    skipping = draws[draws[:, -1] >= LENGTH]
    first = (skipping.diff(dim=1) > 1).long().argmax(1) + 1
    counts = torch.bincount(first, minlength=LENGTH // 2 + 1)[1:].double()
    assert counts.numel() == LENGTH // 2
    assert chi_square(counts) < chi2.ppf(1 - 1e-6, counts.numel() - 1)


@pytest.mark.parametrize("chunks", [2, 3])
def test_every_distance_below_the_target_comes_up(chunks: int) -> None:
    met = torch.zeros(TARGET, dtype=torch.bool)
    for index in range(DRAWS):
        positions = pose_positions(LENGTH, TARGET, chunks, generator_of(1, index))
        met[(positions[:, None] - positions).clamp(min=0).flatten()] = True
    assert bool(met.all())


def test_later_chunks_skip_on_from_earlier_ones() -> None:
    """u_2 is uniform over u_1 .. target - length: its mean lies halfway between u_1 and the end."""
    last, halfway = [], []
    for index in range(DRAWS):
        positions = pose_positions(LENGTH, TARGET, 3, generator_of(2, index))
        shifts = (positions - torch.arange(LENGTH)).unique_consecutive().tolist()
        assert shifts == sorted(shifts) and shifts[0] == 0
        if len(shifts) == 3:
            last.append(shifts[2])
            halfway.append((shifts[1] + 1 + TARGET - LENGTH) / 2)
    spread = torch.tensor(last).double().std() / len(last) ** 0.5
    assert abs(sum(last) / len(last) - sum(halfway) / len(halfway)) < 5 * float(spread)


def test_without_room_to_skip_a_window_is_plain() -> None:
    for index in range(20):
        assert torch.equal(pose_positions(9, 9, 3, generator_of(0, index)), torch.arange(9))
        assert torch.equal(random_positions(9, 9, generator_of(0, index)), torch.arange(9))


@pytest.mark.parametrize(
    ("length", "target", "chunks", "named"),
    [(8, 7, 2, "target"), (8, 64, 9, "chunks"), (8, 64, 0, "chunks"), (0, 64, 1, "at least one token")],
)
def test_what_cannot_be_is_refused(length: int, target: int, chunks: int, named: str) -> None:
    with pytest.raises(OptionError, match=named):
        pose_positions(length, target, chunks, generator_of(0, 0))


def test_random_positions_refuse_a_target_below_the_window() -> None:
    with pytest.raises(OptionError, match=r"target_length or the patch's factor"):
        random_positions(8, 7, generator_of(0, 0))

"""The numbers behind the pictures of order, against definitions written out pair by pair."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from ropepatch.attention.scheme import Rotary, rotated, unrotated
from ropepatch.errors import UsageError
from ropepatch.methods._attention import LayerGeometry, logn_scale
from ropepatch.methods._base import METHODS, RotaryGeometry
from ropepatch.methods._options import parse_options
from ropepatch.methods._sinusoid import sinusoid_table
from ropepatch.plotting.order import numbers

FREQUENCIES = 100.0 ** (-torch.arange(0, 16, 2) / 16.0)


def scheme_of(name: str, length: int = 64, **options: object) -> object:
    rotary = RotaryGeometry(FREQUENCIES, 100.0, 16, 16, length)
    entry = METHODS.get(name)
    return entry.build(LayerGeometry(length, heads=6, head_dim=16, rotary=rotary), parse_options(entry, options))


def test_cosines_of_a_sinusoid_depend_on_the_distance_only() -> None:
    found = numbers.position_cosines(sinusoid_table(torch.arange(40), 32))
    for distance in (0, 1, 13, 39):
        wanted = sum(math.cos(distance / 10000 ** (2 * i / 32)) for i in range(16)) / 16
        torch.testing.assert_close(
            found.diagonal(distance), torch.full((40 - distance,), wanted).double(), atol=1e-6, rtol=0
        )
    torch.testing.assert_close(found, found.T)


def test_a_row_of_zeros_is_like_nothing() -> None:
    found = numbers.position_cosines(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
    assert found.tolist() == [[0, 0], [0, 1]]


def test_wavelengths() -> None:
    assert numbers.wavelengths(torch.tensor([1.0, 0.5, 0.0])).tolist() == pytest.approx(
        [2 * math.pi, 4 * math.pi, math.inf]
    )


def test_plain_distances() -> None:
    found = numbers.scaled_distances(rotated(), torch.tensor([0, 3]), torch.tensor([0, 2, 5]))
    assert torch.isnan(found.relative).tolist() == [[False, True, True], [False, False, True]]
    assert found.relative[1, :2].tolist() == [3, 1]
    assert found.segment.tolist() == [[0, -1, -1], [0, 0, -1]]


@pytest.mark.parametrize("n", [20, 100])
def test_self_extends_distances(n: int) -> None:
    w, g = 16, 4
    found = numbers.scaled_distances(scheme_of("self_extend", window=w, group=g), torch.arange(n), torch.arange(n))
    for i in range(n):
        for j in range(i + 1):
            wanted = i - j if i - j < w else i // g + w - w // g - j // g
            assert float(found.relative[i, j]) == wanted
    assert bool(torch.isnan(found.relative).triu(1).any())


def test_what_is_not_rotated_has_distance_zero_and_what_is_not_seen_none() -> None:
    found = numbers.scaled_distances(scheme_of("streaming", length=64), torch.tensor([200]), torch.arange(200))
    invisible = found.segment[0] == -1
    assert bool(invisible.any()) and bool(torch.isnan(found.relative[0][invisible]).all())
    assert numbers.scaled_distances(unrotated(), torch.tensor([5]), torch.arange(6)).relative.tolist() == [[0.0] * 6]


def test_match_and_bound_by_the_definition() -> None:
    f = FREQUENCIES.double().tolist()
    for n in (0, 1, 5, 77):
        rotary = Rotary(FREQUENCIES, gain=1.2)
        match = 1.44 * sum(math.cos(n * x) for x in f) / len(f)
        partial = [abs(sum(cmath.exp(1j * n * x) for x in f[: m + 1])) for m in range(len(f))]
        assert float(numbers.match(torch.tensor(float(n)), rotary)) == pytest.approx(match)
        assert float(numbers.bound(torch.tensor(float(n)), rotary)) == pytest.approx(1.44 * sum(partial) / len(f))


def test_over_distance_follows_the_scheme_and_its_scale() -> None:
    distances, rotary = torch.arange(100), Rotary(FREQUENCIES)
    scheme = scheme_of("rerope", window=10, logn=True)
    found = numbers.over_distance(numbers.match, scheme, rotary, 99, distances)
    wanted = numbers.match(distances.clamp(max=10), rotary) * float(logn_scale(64)(torch.tensor(99)))
    torch.testing.assert_close(found, wanted)
    assert numbers.over_distance(numbers.match, unrotated(), None, 3, torch.arange(4)).tolist() == [1, 1, 1, 1]


def test_frequencies_of_a_dynamic_method_are_those_of_the_query() -> None:
    scheme, rotary, distances = scheme_of("dynamic_ntk"), Rotary(FREQUENCIES), torch.arange(40)
    near = numbers.over_distance(numbers.match, scheme, rotary, 39, distances)
    far = numbers.over_distance(numbers.match, scheme, rotary, 255, distances)
    torch.testing.assert_close(near, numbers.match(distances, rotary))
    assert not torch.allclose(far, near)


def test_means_of_groups() -> None:
    middle, mean = numbers.averaged(torch.arange(5), torch.tensor([1.0, 3.0, math.nan, 5.0, 7.0]), most=3)
    assert middle.tolist() == [0.5, 2.5, 4]
    assert mean.tolist() == [2, 5, 7]


def test_bias_by_distance() -> None:
    found = numbers.bias_by_distance(scheme_of("alibi"), None, 50, torch.tensor([0, 3, 50]))
    assert found.shape == (6, 3)
    assert found[0].tolist() == pytest.approx([0, -3 * 2**-2, -50 * 2**-2])
    with pytest.raises(UsageError, match="no bias"):
        numbers.bias_by_distance(rotated(), None, 1, torch.tensor([0]))


def test_circles_and_spread() -> None:
    (plane,) = numbers.circles(torch.tensor([math.pi / 2]), torch.arange(4))
    torch.testing.assert_close(plane, torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]).double(), atol=1e-6, rtol=0)
    assert numbers.spread(5, 100).tolist() == [0, 1, 2, 3, 4]
    assert numbers.spread(101, 3).tolist() == [0, 50, 100]
    assert numbers.spread(1, 3).tolist() == [0]

"""Remapped rotations against distances written down pair by pair from the papers' definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from geometries import site
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ropepatch.attention.reference import attend
from ropepatch.attention.rotation import Layout
from ropepatch.attention.scheme import Scheme
from ropepatch.errors import OptionError
from ropepatch.methods._attention import AttentionMethod, LayerGeometry, own_rotary
from ropepatch.methods._base import METHODS
from ropepatch.methods._options import parse_options

few = settings(max_examples=25)
Distances = list[list[float | None]]


def layer(length: int = 32, dims: int = 8, gain: float = 1.0) -> LayerGeometry:
    return LayerGeometry(length, 2, dims, site(dims, length=length), gain)


def method(name: str) -> AttentionMethod:
    found = METHODS.get(name)
    assert isinstance(found, AttentionMethod)
    return found


def scheme(name: str, length: int, **options: Any) -> Scheme:
    chosen = method(name)
    return chosen.build(layer(length), parse_options(chosen, options))


def reach(name: str, length: int, **options: Any) -> int | None:
    chosen = method(name)
    return chosen.target(layer(length), parse_options(chosen, options))


def effective(made: Scheme, n: int) -> Tensor:
    """Distance that each pair of n tokens is rotated by, NaN where it is invisible; float64, [n, n]."""
    positions = torch.arange(n)
    distances = torch.full((n, n), torch.nan, dtype=torch.float64)
    for segment in made.segments(0, n):
        assert segment.query is not None
        queries = segment.query(positions).double()
        keys = segment.key(positions).double() if segment.key else torch.zeros(n, dtype=torch.float64)
        holds = (positions >= segment.first(positions)[:, None]) & (positions <= segment.last(positions)[:, None])
        holds &= positions <= positions[:, None]
        assert bool(distances[holds].isnan().all()), "segments overlap"
        distances[holds] = (queries[:, None] - keys)[holds]
    return distances


def agree(made: Scheme, wanted: Distances) -> None:
    n = len(wanted)
    table = torch.tensor(
        [[math.nan if value is None else value for value in row] for row in wanted], dtype=torch.float64
    )
    torch.testing.assert_close(effective(made, n), table, rtol=0, atol=2e-5, equal_nan=True)


def pairs(n: int, rule: Callable[[int, int], float | None]) -> Distances:
    return [[rule(i, j) if j <= i else None for j in range(n)] for i in range(n)]


# The definitions.


def rerope(n: int, window: int) -> Distances:
    return pairs(n, lambda i, j: min(i - j, window))


def leaky_rerope(n: int, window: int, k: float) -> Distances:
    return pairs(n, lambda i, j: i - j if i - j < window else window + (i - j - window) / k)


def self_extend(n: int, window: int, group: int) -> Distances:
    """Algorithm 1 of arXiv 2401.01325: two score matrices, one merged into the other."""
    grouped_keys = [position // group for position in range(n)]
    shift = window - window // group
    grouped_queries = [position + shift for position in grouped_keys]
    merged: Distances = []
    for i in range(n):
        row: list[float | None] = [None] * n
        for j in range(i + 1):
            row[j] = i - j if i - j < window else grouped_queries[i] - grouped_keys[j]
        merged.append(row)
    return merged


def dca(n: int, chunk: int, largest: int) -> Distances:
    """Section 2 of arXiv 2402.17463, chunk by chunk, with lists of positions."""
    table: Distances = [[None] * n for _ in range(n)]
    chunks = [range(start, min(start + chunk, n)) for start in range(0, n, chunk)]
    for here, queries in enumerate(chunks):
        for there, keys in enumerate(chunks[: here + 1]):
            for inside, i in enumerate(queries):
                for key, j in enumerate(keys):
                    if here == there:
                        query = inside
                    elif here == there + 1:
                        query = min(inside + chunk, largest)
                    else:
                        query = largest
                    if j <= i:
                        table[i][j] = query - key
    return table


def string(n: int, shift: int, window: int) -> Distances:
    return pairs(n, lambda i, j: i - j if i - j < shift else i - j - shift + window)


def lm_infinite(n: int, window: int, sinks: int) -> Distances:
    return pairs(n, lambda i, j: min(i - j, window) if i - j < window or j < sinks else None)


def streaming(n: int, window: int, sinks: int) -> Distances:
    """A cache that is really truncated: positions are places in it."""
    table: Distances = []
    cache: list[int] = []
    for i in range(n):
        cache.append(i)
        if len(cache) > sinks + window:
            del cache[sinks]
        row: list[float | None] = [None] * n
        for place, j in enumerate(cache):
            row[j] = len(cache) - 1 - place
        table.append(row)
    return table


ORACLES: dict[str, Callable[..., Distances]] = {
    "rerope": rerope,
    "leaky_rerope": leaky_rerope,
    "self_extend": self_extend,
    "dca": dca,
    "string": string,
    "lm_infinite": lm_infinite,
    "streaming": streaming,
}
# At the trained length 32: what the user writes, and all that the definition needs.
DEFAULTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("rerope", {}, {"window": 16}),
    ("leaky_rerope", {"k": 4.0}, {"window": 16, "k": 4.0}),
    ("leaky_rerope", {"factor": 2.0}, {"window": 16, "k": 3.0}),
    ("leaky_rerope", {"factor": 4, "window": 8}, {"window": 8, "k": 5.0}),
    ("leaky_rerope", {"factor": 1}, {"window": 16, "k": 1.0}),
    ("self_extend", {"group": 4}, {"window": 16, "group": 4}),
    ("self_extend", {"factor": 4}, {"window": 16, "group": 7}),
    ("self_extend", {}, {"window": 16, "group": 7}),
    ("leaky_rerope", {}, {"window": 16, "k": 7.0}),
    ("self_extend", {"factor": 4.1, "window": 20}, {"window": 20, "group": 10}),
    ("self_extend", {"factor": 1}, {"window": 16, "group": 1}),
    ("dca", {}, {"chunk": 20, "largest": 24}),
    ("dca", {"largest": 31}, {"chunk": 27, "largest": 31}),
    ("dca", {"chunk": 7}, {"chunk": 7, "largest": 24}),
    ("dca", {"chunk": 30}, {"chunk": 30, "largest": 30}),
    ("dca", {"chunk": 12, "largest": 15}, {"chunk": 12, "largest": 15}),
    ("string", {}, {"shift": 10, "window": 2}),
    ("string", {"window": 3}, {"shift": 10, "window": 3}),
    ("lm_infinite", {}, {"window": 32, "sinks": 10}),
    ("lm_infinite", {"window": 9, "sinks": 0}, {"window": 9, "sinks": 0}),
    ("streaming", {}, {"window": 28, "sinks": 4}),
    ("streaming", {"window": 9, "sinks": 0}, {"window": 9, "sinks": 0}),
]


@st.composite
def cases(draw: st.DrawFn, name: str) -> tuple[int, dict[str, Any]]:
    """A trained length and options that say everything."""
    length = draw(st.integers(3, 24))
    window = draw(st.integers(1, length - 1))
    if name == "rerope":
        return length, {"window": draw(st.integers(1, length))}
    if name == "leaky_rerope":
        # Nearer to 1, positions are those of no divisor in float32.
        return length, {"window": window, "k": draw(st.floats(1, 20).filter(lambda k: k == 1 or k > 1 + 1e-5))}
    if name == "self_extend":
        return length, {"window": window, "group": draw(st.integers(1, 2 * length))}
    if name == "dca":
        return length, {"chunk": window, "largest": draw(st.integers(window, length - 1))}
    if name == "string":
        shift = draw(st.integers(1, length))
        return length, {"shift": shift, "window": draw(st.integers(1, shift))}
    if name == "lm_infinite":
        return length, {"window": draw(st.integers(1, length)), "sinks": draw(st.integers(0, length + 3))}
    return length, {"window": window, "sinks": draw(st.integers(0, length - window))}


every = pytest.mark.parametrize("name", sorted(ORACLES))


@pytest.mark.parametrize(("name", "options", "whole"), DEFAULTS)
def test_distances_at_the_defaults(name: str, options: dict[str, Any], whole: dict[str, Any]) -> None:
    agree(scheme(name, 32, **options), ORACLES[name](100, **whole))


@every
@few
@given(st.data())
def test_distances_are_those_of_the_paper(name: str, data: st.DataObject) -> None:
    length, options = data.draw(cases(name))
    agree(scheme(name, length, **options), ORACLES[name](3 * length, **options))


@every
@few
@given(st.data())
def test_segments_keep_the_contract(name: str, data: st.DataObject) -> None:
    """Monotone within a period, shapes kept at any number of dimensions, one key map a form."""
    length, options = data.draw(cases(name))
    made = scheme(name, length, **options)
    n = 3 * length
    positions = torch.arange(n)
    blocks = positions.split(made.period or n)
    forms: dict[str, Tensor] = {}
    for segment in made.segments(0, n):
        for block in blocks:
            assert bool((segment.first(block).diff() >= 0).all())
            assert bool((segment.last(block).diff() >= 0).all())
        assert segment.query is not None
        keys = segment.key(positions) if segment.key else torch.zeros(n)
        assert torch.equal(forms.setdefault(segment.form, keys), keys)
        for function in (segment.first, segment.last, segment.query, *([segment.key] if segment.key else [])):
            flat = function(positions)
            assert flat.shape == positions.shape
            assert torch.equal(function(positions.view(3, -1)), flat.view(3, -1))
            assert torch.equal(function(positions[-1]), flat[-1])
    assert len({tuple(keys.tolist()) for keys in forms.values()}) == len(forms)


@every
@few
@given(st.data())
def test_nothing_changes_where_the_window_holds_the_whole_input(name: str, data: st.DataObject) -> None:
    length, options = data.draw(cases(name))
    n = options.get("shift") or options.get("chunk") or options["window"]
    agree(scheme(name, length, **options), pairs(n, lambda i, j: i - j))


@every
@few
@given(st.data())
def test_a_cache_of_the_kept_tokens_is_enough(name: str, data: st.DataObject) -> None:
    length, options = data.draw(cases(name))
    made = scheme(name, length, **options)
    seen = ~effective(made, 3 * length).isnan()
    if made.keep is None:
        assert bool(seen.tril().sum() == 3 * length * (3 * length + 1) // 2)
        return
    first, last = made.keep
    for i in range(3 * length):
        kept = {*range(min(first, i + 1)), *range(max(0, i + 1 - last), i + 1)}
        assert set(seen[i].nonzero().flatten().tolist()) == kept


@every
@few
@given(st.data())
def test_no_distance_exceeds_what_the_target_promises(name: str, data: st.DataObject) -> None:
    """Up to the target, or anywhere without one, distances stay within the trained ones."""
    length, options = data.draw(cases(name))
    target = reach(name, length, **options)
    distances = effective(scheme(name, length, **options), min(target or 3 * length, 200))
    most = float(distances.nan_to_num(0.0).max())
    # These cap at the window itself, or round up to whole groups; fractions lie below L.
    loose = name in ("rerope", "lm_infinite", "self_extend", "leaky_rerope")
    assert most <= (length if loose else length - 1) + 1e-4


@few
@given(st.integers(2, 24), st.data())
def test_string_reaches_exactly_its_target(length: int, data: st.DataObject) -> None:
    shift = data.draw(st.integers(1, length - 1))
    options: dict[str, Any] = {"shift": shift, "window": data.draw(st.integers(1, shift))}
    target = reach("string", length, **options)
    assert target is not None
    assert float(effective(scheme("string", length, **options), target).nan_to_num(0.0).max()) == length - 1
    assert float(effective(scheme("string", length, **options), target + 1).nan_to_num(0.0).max()) == length


@pytest.mark.parametrize(("window", "group"), [(16, 4), (24, 8), (30, 3), (12, 1)])
def test_self_extend_reaches_exactly_its_target(window: int, group: int) -> None:
    target = reach("self_extend", 32, window=window, group=group)
    assert target == (32 - window) * group + window
    made = scheme("self_extend", 32, window=window, group=group)
    assert float(effective(made, target).nan_to_num(0.0).max()) == 31
    assert float(effective(made, target + 1).nan_to_num(0.0).max()) == 32


@few
@given(st.integers(2, 24), st.floats(1, 12), st.data())
def test_factor_sets_the_smallest_group_and_divisor(length: int, factor: float, data: st.DataObject) -> None:
    window = data.draw(st.integers(1, length - 1))
    target = round(factor * length)
    group = next(size for size in range(1, 1000) if (length - window) * size + window >= target)
    wanted = scheme("self_extend", length, window=window, group=group)
    agree(scheme("self_extend", length, window=window, factor=factor), effective(wanted, 60).tolist())
    assert reach("self_extend", length, window=window, factor=factor) == target
    leaky = effective(scheme("leaky_rerope", length, window=window, factor=factor), target + 1)
    assert float(leaky[target, 0]) == pytest.approx(length, rel=1e-5)
    assert reach("leaky_rerope", length, window=window, factor=factor) == target


def test_blocks_of_dca_never_cross_a_chunk() -> None:
    made = scheme("dca", 32, chunk=7)
    for block in torch.arange(100).split(made.period):
        for segment in made.segments(int(block[0]), int(block[-1]) + 1):
            assert len(segment.first(block).unique()) == 1


def test_leaky_reropes_target_follows_from_k() -> None:
    assert reach("leaky_rerope", 32, k=4.0) == 16 + 4 * 16


@pytest.mark.parametrize("name", ["rerope", "dca", "lm_infinite", "streaming", "logn"])
def test_what_has_no_limit_says_so(name: str) -> None:
    assert reach(name, 32) is None


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 32, 4096])
def test_defaults_fit_every_trained_length(length: int) -> None:
    least = {"self_extend": 2, "leaky_rerope": 2, "dca": 2, "streaming": 5, "logn": 2}
    needed: dict[str, dict[str, Any]] = {"self_extend": {"group": 2}, "leaky_rerope": {"k": 2.0}}
    for name in (*ORACLES, "logn"):
        if length >= least.get(name, 1):
            scheme(name, length, **needed.get(name, {}))
        else:
            with pytest.raises(OptionError, match="trained length"):
                scheme(name, length, **needed.get(name, {}))


def scores(distances: Tensor, q_HTD: Tensor, k_HND: Tensor, inv_freq: Tensor, gain: float) -> Tensor:
    """<R(d) q, k> / sqrt(D) from the distance alone, by complex numbers; -inf where d is NaN."""
    half = q_HTD.shape[-1] // 2
    q = torch.complex(q_HTD[..., :half], q_HTD[..., half:])
    k = torch.complex(k_HND[..., :half], k_HND[..., half:])
    turn = torch.polar(torch.ones((), dtype=torch.float64), distances[..., None] * inv_freq.double())
    products = (q[:, :, None] * k[:, None].conj() * turn).sum(-1).real * gain**2 / (2 * half) ** 0.5
    return products.masked_fill(distances.isnan(), -torch.inf)


@pytest.mark.parametrize("gain", [1.0, 1.25])
@pytest.mark.parametrize("logn", [False, True])
@pytest.mark.parametrize(("name", "options", "whole"), DEFAULTS)
def test_attention_by_the_reference(
    name: str, options: dict[str, Any], whole: dict[str, Any], logn: bool, gain: float
) -> None:
    n, dims = 70, 8
    chosen, geometry = method(name), layer(32, dims, gain)
    made = chosen.build(geometry, parse_options(chosen, {**options, "logn": logn}))
    q, k, v = torch.randn(3, 2, n, dims, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(n)
    rotary = own_rotary(geometry)
    got = attend(
        q, k, v, made, q_positions=positions, k_positions=positions, rotary=rotary, layout=Layout(start=0, dims=dims)
    )
    distances = torch.tensor(
        [[math.nan if value is None else value for value in row] for row in ORACLES[name](n, **whole)],
        dtype=torch.float64,
    )
    factor = torch.tensor([max(1.0, math.log(i + 1) / math.log(32)) for i in range(n)] if logn else [1.0] * n)
    weights = torch.softmax(scores(distances, q, k, rotary.inv_freq, gain) * factor.double()[:, None], dim=-1)
    torch.testing.assert_close(got, weights @ v, rtol=0, atol=3e-5)


def test_logn_scales_and_does_nothing_else() -> None:
    made = scheme("logn", 32)
    agree(made, pairs(100, lambda i, j: i - j))
    assert made.scale is not None
    scale = made.scale(torch.arange(100))
    assert scale.dtype == torch.float32
    wanted = [max(1.0, math.log(i + 1) / math.log(32)) for i in range(100)]
    torch.testing.assert_close(scale, torch.tensor(wanted))
    assert scale[:32].tolist() == pytest.approx([1.0] * 32)
    assert float(scale[32]) > 1
    assert scheme("rerope", 32).scale is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("self_extend", {"group": 2, "factor": 2}, "group .* or factor .*, not both"),
        ("self_extend", {"group": 0}, "group must be a whole number >= 1"),
        ("self_extend", {"group": 2.5}, "group must be a whole number"),
        ("self_extend", {"group": 2, "window": 32}, r"allowed: 1\.\.31"),
        ("self_extend", {"factor": 0.5}, "factor must be a finite number >= 1"),
        ("rerope", {"window": 33}, r"given: 33\. Allowed: 1\.\.32"),
        ("rerope", {"window": 0}, "window must be a whole number >= 1"),
        ("rerope", {"factor": 2}, "unknown option 'factor'"),
        ("leaky_rerope", {"k": 2, "factor": 2}, "k .* or factor .*, not both"),
        ("leaky_rerope", {"k": 0.5}, "k must be a finite number >= 1"),
        ("leaky_rerope", {"k": 2, "window": 32}, r"allowed: 1\.\.31"),
        ("dca", {"chunk": 9, "largest": 8}, "1 <= chunk <= largest <= 31"),
        ("dca", {"largest": 32}, "1 <= chunk <= largest <= 31"),
        ("dca", {"chunk": 32}, "1 <= chunk <= largest <= 31"),
        ("string", {"shift": 33}, r"shift is above the trained length\. Given: 33"),
        ("string", {"shift": 4, "window": 5}, r"window is above shift\. Given: 5\. Allowed: 1\.\.4"),
        ("lm_infinite", {"window": 33}, r"allowed: 1\.\.32"),
        ("lm_infinite", {"sinks": -1}, "sinks must be a whole number >= 0"),
        ("streaming", {"window": 30}, r"sinks \+ window <= 32"),
        ("streaming", {"sinks": 32}, r"sinks \+ window <= 32"),
        ("logn", {"logn": False}, "logn must be True"),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"(?i){message}"):
        scheme(name, 32, **options)


@pytest.mark.parametrize("name", ["lm_infinite", "streaming"])
def test_what_forgets_says_so(name: str) -> None:
    assert "does not extend usable memory" in method(name).finetune

"""The methods that put a bias, or nothing, in place of the rotation: closed forms, gradients, numerics."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from ropepatch.attention.reference import attend
from ropepatch.attention.scheme import Scheme
from ropepatch.errors import OptionError
from ropepatch.methods import fire, kerple, sandwich, t5_bias
from ropepatch.methods._attention import LayerGeometry
from ropepatch.methods._base import METHODS
from ropepatch.methods._options import parse_options
from ropepatch.methods.alibi import alibi_slopes

BIASES = ("alibi", "fire", "kerple", "sandwich", "t5_bias")
LEARNED = ("fire", "kerple", "t5_bias")
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("alibi", {"factor": 4.0}),
    ("fire", {"width": 5}),
    ("kerple", {}),
    ("kerple", {"form": "power"}),
    ("sandwich", {"bar_d": 16}),
    ("t5_bias", {}),
]
IDS = ["alibi", "fire", "kerple log", "kerple power", "sandwich", "t5_bias"]
LAYER = LayerGeometry(length=64, heads=6, head_dim=8)
Loop = Callable[[int, int, int], float]
few = settings(max_examples=25, deadline=None)


def made(name: str, layer: LayerGeometry = LAYER, **options: Any) -> tuple[Scheme, nn.Module | None]:
    """The scheme and the learned part of one layer, options validated as in `patch`."""
    method: Any = METHODS.get(name)
    parsed = parse_options(method, options)
    scheme = method.build(layer, parsed)
    return scheme, method.learned(layer, parsed) if method.learned else None


def bias_of(name: str, q: Tensor, k: Tensor, layer: LayerGeometry = LAYER, **options: Any) -> Tensor:
    scheme, module = made(name, layer, **options)
    assert scheme.bias is not None
    return scheme.bias(q, k, module).detach()


def paper(name: str, heads: int, module: Any, **options: Any) -> Loop:
    """(head from 0, i, j) to the bias, written from the paper with Python's numbers."""
    if name == "alibi":
        slopes = press(heads)
        return lambda h, i, j: -slopes[h] * (i - j) / options.get("factor", 1.0)
    if name == "sandwich":
        d = options.get("bar_d", 128)

        def sandwiched(h: int, i: int, j: int) -> float:
            # The two embeddings themselves, and their inner product.
            def embed(position: int) -> list[float]:
                waves = [position / 10000 ** (2 * k / d) for k in range(d // 2)]
                return [math.sin(w) for w in waves] + [math.cos(w) for w in waves]

            product = sum(a * b for a, b in zip(embed(i), embed(j), strict=True))
            return (product - d / 2) / ((h + 1) * 8 / heads)

        return sandwiched
    state = {key: value.tolist() for key, value in module.state_dict().items()}
    if name == "kerple" and options.get("form") == "power":
        return lambda h, i, j: -math.exp(state["log_a"][h]) * (i - j) ** (2 / (1 + math.exp(-state["logit_p"][h])))
    if name == "kerple":
        return lambda h, i, j: -math.exp(state["log_p"][h]) * math.log(1 + math.exp(state["log_a"][h]) * (i - j))
    if name == "t5_bias":
        return lambda h, i, j: state["table"][t5_bucket(i - j)][h]
    assert name == "fire"

    def fired(h: int, i: int, j: int) -> float:
        c, threshold = math.exp(state["log_c"]), module.threshold * math.exp(state["log_multiplier"])
        share = math.log(c * (i - j) + 1) / math.log(c * max(i, threshold) + 1)
        total = state["out_bias"][h]
        for unit, out in enumerate(state["out_weight"][h]):
            total += out * max(0.0, state["hidden_weight"][unit] * share + state["hidden_bias"][unit])
        return float(total)

    return fired


def press(heads: int) -> list[float]:
    """The slopes as the paper's own code recurses."""
    if math.log2(heads).is_integer():
        start = 2 ** (-8 / heads)
        return [start**power for power in range(1, heads + 1)]
    below = 2 ** math.floor(math.log2(heads))
    return press(below) + press(2 * below)[0::2][: heads - below]


def t5_bucket(distance: int, buckets: int = 32, furthest: int = 128) -> int:
    half = buckets // 2
    if distance < half:
        return distance
    return min(buckets - 1, half + int(math.log(distance / half) / math.log(furthest / half) * (buckets - half)))


def moved(module: nn.Module | None) -> None:
    """Somewhere that no initial value is."""
    if module is not None:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


# --- all of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BIASES, "nope"])
def test_registered_for_rotary_models_without_a_limit_and_with_a_word_on_finetuning(name: str) -> None:
    method: Any = METHODS.get(name)
    assert method.seam == "attention" and method.mechanisms[:2] == ("rotary", "alibi")
    assert "finetune" in method.finetune or "recalibration" in method.finetune
    assert method.target(LAYER, parse_options(method, {})) is None
    assert (method.learned is not None) == (name in LEARNED)
    assert all(field.description for field in method.options.model_fields.values())


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=IDS)
@few
@given(st.lists(st.integers(0, 300), min_size=1, max_size=4), st.sampled_from([1, 2, 3, 6, 8]))
def test_bias_is_the_papers_formula(name: str, options: dict[str, Any], positions: list[int], heads: int) -> None:
    layer = LayerGeometry(length=64, heads=heads, head_dim=8)
    scheme, module = made(name, layer, **options)
    moved(module)
    assert scheme.bias is not None
    q = torch.tensor([positions, positions[::-1]])
    k = torch.tensor([[0, 1, 7, 40, 299], [5, 3, 200, 0, 2]])
    result = scheme.bias(q, k, module)
    assert result.dtype == torch.float32
    assert tuple(result.shape) == (2, heads, len(positions), 5)
    assert bool(torch.isfinite(result).all())  # those of invisible pairs too
    loop = paper(name, heads, module, **options)
    for b in range(2):
        for t, i in enumerate(q[b].tolist()):
            for n, j in enumerate(k[b].tolist()):
                for h in range(heads if j <= i else 0):
                    exact = loop(h, i, j)
                    # Sandwich subtracts bar_d / 2 from a sum of as much, then divides by as little as 8 / heads.
                    room = 2e-6 * (options["bar_d"] * heads / 8 if name == "sandwich" else 1 + abs(exact))
                    assert result[b, h, t, n].item() == pytest.approx(exact, abs=room, rel=2e-6), (b, h, i, j)


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=IDS)
def test_attention_is_the_plain_product_plus_the_bias(name: str, options: dict[str, Any]) -> None:
    scheme, module = made(name, **options)
    moved(module)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(6, 9, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    positions = torch.arange(40, 49)
    with torch.no_grad():
        result = attend(q, k, v, scheme, q_positions=positions, k_positions=positions, module=module)
    loop = paper(name, 6, module, **options)
    for h in range(6):
        for t in range(9):
            weights = [
                math.exp(float(q[h, t] @ k[h, n]) / math.sqrt(8) + loop(h, 40 + t, 40 + n)) for n in range(t + 1)
            ]
            expected = sum(w * v[h, n] for n, w in enumerate(weights)) / sum(weights)
            torch.testing.assert_close(result[h, t], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=IDS)
def test_a_query_gets_the_same_bias_in_any_block_of_any_batch(name: str, options: dict[str, Any]) -> None:
    k = torch.arange(50)[None]
    whole = bias_of(name, k, k, **options)
    for low, high in ((0, 50), (13, 14), (20, 37)):
        part = bias_of(name, k[:, low:high], k[:, 3:41], **options)
        torch.testing.assert_close(part, whole[:, :, low:high, 3:41], atol=1e-5, rtol=1e-6)
    shifted = torch.cat((k, k + 1000))
    torch.testing.assert_close(bias_of(name, shifted, shifted, **options)[:1], whole, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("name", ["alibi", "kerple", "sandwich", "t5_bias"])
@pytest.mark.parametrize("start", [10**6, 2**24 + 1, 10**9])
def test_bias_depends_on_the_distance_alone_however_far_from_the_start(name: str, start: int) -> None:
    near = torch.arange(40)[None]
    torch.testing.assert_close(bias_of(name, near + start, near + start), bias_of(name, near, near), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=IDS)
def test_far_positions_stay_finite(name: str, options: dict[str, Any]) -> None:
    q = torch.tensor([[10**9, 2**30, 0, -1]])
    assert bool(torch.isfinite(bias_of(name, q, torch.tensor([[0, 5, 10**9, -1]]), **options)).all())


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=IDS)
def test_autocast_does_not_reach_the_bias(name: str, options: dict[str, Any]) -> None:
    positions = torch.arange(70)[None]
    plain = bias_of(name, positions, positions, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = bias_of(name, positions, positions, **options)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, plain)


@pytest.mark.parametrize("heads", [1, 2, 5, 64])
@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=IDS)
def test_small_models_and_any_number_of_heads(name: str, options: dict[str, Any], heads: int) -> None:
    positions = torch.arange(3)[None]
    for length in (1, 2, 32):
        result = bias_of(name, positions, positions, LayerGeometry(length, heads, 8), **options)
        assert tuple(result.shape) == (1, heads, 3, 3)
        assert bool(torch.isfinite(result).all())


# --- learned parts -----------------------------------------------------------------------------------------------


LEARNED_SETTINGS = [(name, options) for name, options in SETTINGS if name in LEARNED]
LEARNED_IDS = [words for words in IDS if words.split()[0] in LEARNED]


@pytest.mark.parametrize(("name", "options"), LEARNED_SETTINGS, ids=LEARNED_IDS)
def test_learned_parts_are_float32_reproducible_and_leave_the_random_state_alone(
    name: str, options: dict[str, Any]
) -> None:
    state = torch.get_rng_state()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        first, second = made(name, **options)[1], made(name, **options)[1]
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(torch.get_rng_state(), state)
    assert first is not None and second is not None
    assert {parameter.dtype for parameter in first.parameters()} == {torch.float32}
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    assert not list(first.children()), "a submodule could be collected by its type"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("name", "options"), LEARNED_SETTINGS, ids=LEARNED_IDS)
def test_cast_parameters_are_computed_with_in_float32(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    module = made(name, **options)[1]
    assert module is not None
    cast = copy.deepcopy(module).to(dtype)
    rounded = copy.deepcopy(cast).float()
    q, k = torch.arange(60)[None], torch.arange(100)[None]
    result = cast(q, k)
    assert result.dtype == torch.float32
    assert torch.equal(result, rounded(q, k))


@pytest.mark.parametrize(("name", "options"), LEARNED_SETTINGS, ids=LEARNED_IDS)
def test_every_parameter_gets_the_gradient_of_finite_differences(name: str, options: dict[str, Any]) -> None:
    module = made(name, **options)[1]
    assert module is not None
    moved(module)
    # Beyond and below the threshold of fire, and no query on it.
    q, k = torch.tensor([[3, 9, 70, 300]]), torch.tensor([[0, 2, 3, 60]])
    weights = torch.randn(1, 6, 4, 4, generator=torch.Generator().manual_seed(1))
    (module(q, k) * weights).sum().backward()
    step = 2e-3
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), key
        flat = parameter.data.view(-1)
        for place in range(0, flat.numel(), max(1, flat.numel() // 7)):
            kept, sums = flat[place].item(), []
            for sign in (1, -1):
                flat[place] = kept + sign * step
                sums.append((module(q, k).double() * weights).sum().item())
            flat[place] = kept
            slope = (sums[0] - sums[1]) / (2 * step)
            got = parameter.grad.view(-1)[place].item()
            assert got == pytest.approx(slope, rel=2e-2, abs=2e-2), (key, place)


def test_gradients_in_float64_to_the_last_digits() -> None:
    generator = torch.Generator().manual_seed(0)

    def positive(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.2).requires_grad_()

    distance = torch.tensor([[[0.0, 1.0, 7.0], [2.0, 30.0, 90.0]]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p, a: kerple.log_kernel(distance, p, a), (positive(3), positive(3)))
    assert torch.autograd.gradcheck(lambda p, a: kerple.power_kernel(distance, p, a), (positive(3), positive(3)))
    at = torch.tensor([[9.0, 95.0]], dtype=torch.float64)
    threshold = torch.tensor(40.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c, t: fire.normalised(distance, at, c, t), (positive(), threshold))
    share = positive(1, 2, 3)
    signed = (positive(5), (positive(5) - 0.7).detach().requires_grad_(), positive(2, 5), positive(2))
    assert torch.autograd.gradcheck(fire.network, (share, *signed))


# --- alibi -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [*range(1, 41), 52, 64, 71, 96, 112, 128])
def test_slopes_are_those_of_bloom_and_mpt(heads: int) -> None:
    slopes = alibi_slopes(heads)
    assert slopes.dtype == torch.float32 and tuple(slopes.shape) == (heads,)
    bloom = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), heads, torch.float32)[:, 0, 1]
    mpt = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]
    # They round at each power; ours rounds once.
    torch.testing.assert_close(slopes, bloom, rtol=4e-6, atol=0)
    torch.testing.assert_close(slopes, mpt, rtol=4e-6, atol=0)
    assert slopes.tolist() == pytest.approx(press(heads), rel=1e-6)
    if heads in (1, 2, 4, 8):
        assert torch.equal(slopes, bloom) and torch.equal(slopes, mpt)


@pytest.mark.parametrize("heads", [8, 12, 20])
def test_the_exponent_of_mpt(heads: int) -> None:
    mpt = -build_mpt_alibi_tensor(heads, 2, alibi_bias_max=4)[:, 0, 0]
    torch.testing.assert_close(alibi_slopes(heads, bias_max=4), mpt, rtol=4e-6, atol=0)


def test_alibi_is_exactly_minus_slope_times_distance_and_falls() -> None:
    scheme, _ = made("alibi", factor=2.5)
    assert scheme.bias is not None and scheme.bias.slopes is not None
    assert scheme.bias.slopes.dtype == torch.float32
    torch.testing.assert_close(scheme.bias.slopes, alibi_slopes(6) / 2.5, rtol=0, atol=0)
    # Distances around an origin where float32 holds no odd number.
    q, k = torch.tensor([[2**30 + 7]]), 2**30 + 7 - torch.arange(8)[None]
    bias = scheme.bias(q, k, None)
    assert torch.equal(bias[0, :, 0], -scheme.bias.slopes[:, None] * torch.arange(8.0))
    assert bool((bias.diff(dim=-1) < 0).all())


def test_factor_one_is_alibi_itself_and_others_stretch_distances() -> None:
    assert torch.equal(made("alibi", factor=1.0)[0].bias.slopes, alibi_slopes(6))  # type: ignore[union-attr,arg-type]
    q, k = torch.tensor([[400]]), torch.arange(0, 400, 4)[None]
    torch.testing.assert_close(bias_of("alibi", q, k, factor=4.0), bias_of("alibi", q // 4, k // 4))


# --- kerple ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["log", "power"])
@few
@given(st.lists(st.floats(-8, 8, width=32), min_size=4, max_size=4))
def test_kerple_is_zero_at_home_and_falls_whatever_is_learned(form: str, raw: list[float]) -> None:
    layer = LayerGeometry(64, 2, 8)
    scheme, module = made("kerple", layer, form=form)
    assert module is not None and scheme.bias is not None and scheme.bias.slopes is None
    with torch.no_grad():
        for parameter, values in zip(module.parameters(), (raw[:2], raw[2:]), strict=True):
            parameter.copy_(torch.tensor(values))
        bias = scheme.bias(torch.tensor([[5000]]), 5000 - torch.arange(5000)[None], module)[0, :, 0]
    assert bool((bias[:, 0] == 0).all())
    assert bool((bias.diff(dim=-1) <= 0).all())
    assert bool((bias[:, -1] < 0).all())


@pytest.mark.parametrize("heads", [1, 2, 9, 32, 200])
def test_kerple_starts_in_the_range_of_the_published_code(heads: int) -> None:
    log, power = kerple.KerpleLog(heads), kerple.KerplePower(heads)
    for p in (log.log_p.exp(), 2 * power.logit_p.sigmoid()):
        assert p.min() > 0.0049 and p.max() < 2
        assert p.mean().item() == pytest.approx(1, abs=0.02)  # the uniform draw's
    for a in (log.log_a.exp(), power.log_a.exp()):
        assert a.min() > 0.0099 and a.max() < 1
        assert a.mean().item() == pytest.approx(0.5, abs=0.5 / heads + 0.1)
    if heads > 20:
        both = torch.stack((log.log_p.exp(), log.log_a.exp()))
        assert abs(torch.corrcoef(both)[0, 1].item()) < 0.2


# --- fire --------------------------------------------------------------------------------------------------------


def test_the_threshold_of_fire() -> None:
    parts = {length: made("fire", LayerGeometry(length, 2, 8))[1] for length in (1, 3, 32, 2048)}
    assert {length: part.threshold for length, part in parts.items()} == {1: 1, 3: 1, 32: 8, 2048: 512}  # type: ignore[union-attr]
    assert made("fire", threshold=64)[1].threshold == 64  # type: ignore[union-attr]
    with pytest.raises(OptionError, match="beyond the trained length") as caught:
        made("fire", threshold=65)
    assert caught.value.given == 65 and "64" in str(caught.value.allowed)


@few
@given(st.integers(0, 10**6), st.floats(1e-6, 1e3), st.floats(0.5, 1e6))
def test_shares_of_fire_lie_between_zero_and_one_and_rise(position: int, c: float, threshold: float) -> None:
    distance = torch.linspace(0, position, 50).round()[None, None]
    at = torch.tensor([[float(position)]])
    share = fire.normalised(distance, at, torch.tensor(c), torch.tensor(threshold))[0, 0]
    assert share[0] == 0
    assert bool((share >= 0).all()) and share.max() <= 1 + 1e-6
    assert bool((share.diff() >= 0).all())
    if position >= threshold:
        assert share[-1].item() == pytest.approx(1, abs=1e-5)


def test_fire_looks_the_same_at_the_far_end_from_every_query() -> None:
    q = torch.tensor([[16, 50, 64, 900, 10**6]])  # none below the threshold of 16
    bias = bias_of("fire", q, torch.tensor([[0]]))[0, :, :, 0]
    torch.testing.assert_close(bias, bias[:, :1].expand_as(bias), atol=1e-5, rtol=0)


# --- t5 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("buckets", "furthest"), [(32, 128), (32, 17), (64, 4096), (8, 16), (4, 8), (2, 2), (3, 50), (31, 1000)]
)
def test_buckets_are_those_of_transformers(buckets: int, furthest: int) -> None:
    distance = torch.cat((torch.arange(-20, 6000), torch.tensor([10**5, 10**6, 2**31, 10**12])))
    native = T5Attention._relative_position_bucket(-distance, False, buckets, furthest)
    ours = t5_bias.bucket(distance, buckets, furthest)
    assert torch.equal(ours, native)
    assert ours.dtype == torch.int64
    assert set(ours.tolist()) <= set(range(buckets))
    assert bool((ours.diff() >= 0).all())
    assert ours[-1] == buckets - 1


def test_the_table_of_t5_starts_small_and_tells_heads_apart() -> None:
    module = made("t5_bias", LayerGeometry(64, 16, 8))[1]
    assert module is not None
    table = module.get_parameter("table")
    assert tuple(table.shape) == (32, 16)
    assert table.std().item() == pytest.approx(0.02, rel=0.1)
    assert table.unique().numel() == table.numel()


def test_t5_options_that_leave_no_room_are_refused() -> None:
    with pytest.raises(OptionError, match="max_distance=16 must be above buckets // 2 = 16"):
        made("t5_bias", max_distance=16)
    made("t5_bias", max_distance=17)


# --- sandwich ----------------------------------------------------------------------------------------------------


def test_sandwich_penalises_every_distance_and_none_at_home() -> None:
    q, k = torch.tensor([[4000]]), 4000 - torch.arange(4001)[None]
    bias = bias_of("sandwich", q, k)[0, :, 0]
    ratios = torch.arange(1, 7) * 8 / 6
    assert bias[:, 0].abs().max() < 1e-4
    assert bias[:, 1:].max() < 0
    # A cosine is at least -1, so the sum of 64 at least -64.
    assert bool((bias * ratios[:, None] >= -128).all())
    torch.testing.assert_close(bias * ratios[:, None], (bias * ratios[:, None])[:1].expand_as(bias))
    # Near tokens come first on the whole: thousands of tokens away lies lower than tens.
    assert bool((bias[:, 1000:].mean(-1) < bias[:, 10:50].mean(-1)).all())


def test_sandwich_of_one_wave_and_of_no_whole_number_of_waves() -> None:
    with pytest.raises(OptionError, match="bar_d=7 must be even"):
        made("sandwich", bar_d=7)
    # A single plane has one wave, of frequency 1.
    bias = bias_of("sandwich", torch.tensor([[3]]), torch.tensor([[0, 1, 2, 3]]), bar_d=2)
    expected = torch.tensor([math.cos(3) - 1, math.cos(2) - 1, math.cos(1) - 1, 0]) / (8 / 6)
    torch.testing.assert_close(bias[0, 0, 0], expected, atol=1e-6, rtol=0)
    assert sandwich.BASE == 10000


# --- nope --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "logn"), [(1.0, False), (1.7, False), (1.0, True), (1.7, True)])
def test_nope_knows_nothing_of_position_but_its_scale(scale: float, logn: bool) -> None:
    scheme, module = made("drope", scale=scale, logn=logn)
    assert module is None and scheme.bias is None
    assert (scheme.scale is None) == (scale == 1 and not logn)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    positions = torch.tensor([0, 3, 50, 63, 5000])
    result = attend(q, k, v, scheme, q_positions=positions, k_positions=positions)
    for t, i in enumerate(positions.tolist()):
        factor = scale * (max(1.0, math.log(i + 1) / math.log(64)) if logn else 1.0)
        weights = torch.softmax((q[:, t : t + 1] @ k[:, : t + 1].transpose(1, 2))[:, 0] * factor / math.sqrt(8), -1)
        torch.testing.assert_close(result[:, t], (weights[:, :, None] * v[:, : t + 1]).sum(1), atol=1e-6, rtol=1e-6)


def test_the_scale_of_nope_takes_positions_of_any_shape() -> None:
    scale = made("nope", scale=2.0)[0].scale
    assert scale is not None
    for shape in ((), (3,), (2, 3)):
        factors = scale(torch.zeros(shape, dtype=torch.int64))
        assert factors.dtype == torch.float32 and tuple(factors.shape) == shape and bool((factors == 2).all())
    with pytest.raises(OptionError, match="scale"):
        made("nope", scale=0.0)

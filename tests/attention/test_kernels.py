"""Both kernels against the pair-by-pair oracle: forward, backward, padding, documents, windows, sinks, dtypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ropepatch.attention import blocks, chunked, flex, partial, reference
from ropepatch.attention.layer import Layer
from ropepatch.attention.rotation import Layout
from ropepatch.attention.scheme import Rotary, Scheme, Segment, everything, own, rotated, static, unrotated
from ropepatch.attention.visibility import Visibility

HEADS, KEY_HEADS, DIM = 4, 2, 16
LAYOUT = Layout(4, 8, interleaved=True)
ROTARY = Rotary(0.5 ** torch.arange(4, dtype=torch.float32), gain=1.1)
WINDOW, GROUP = 24, 4


class Slopes:
    """ALiBi."""

    slopes: Tensor | None = torch.tensor([0.5, 0.25, 0.3, 0.01])

    def __call__(self, q_positions: Tensor, k_positions: Tensor, module: Any) -> Tensor:
        assert self.slopes is not None
        distance = (q_positions[:, :, None] - k_positions[:, None, :]).float()
        return -self.slopes[:, None, None] * distance[:, None]


class Curved(Slopes):
    """A bias without a fast form, with a learned factor."""

    slopes = None

    def __call__(self, q_positions: Tensor, k_positions: Tensor, module: Any) -> Tensor:
        distance = (q_positions[:, :, None] - k_positions[:, None, :]).abs().float()
        factor = module if module is not None else 1.0
        return -factor * torch.log1p(distance)[:, None].expand(-1, HEADS, -1, -1)


def grouped() -> Scheme:
    near = Segment(lambda i: i - WINDOW + 1, own, own, own, "own")
    far = Segment(
        everything, lambda i: i - WINDOW, lambda i: i // GROUP + WINDOW - WINDOW // GROUP, lambda j: j // GROUP, "far"
    )
    return Scheme(static(near, far))


def clipped() -> Scheme:
    near = Segment(lambda i: i - WINDOW + 1, own, own, own, "own")
    far = Segment(everything, lambda i: i - WINDOW, lambda i: torch.full_like(i, WINDOW), None, "raw")
    return Scheme(static(near, far), scale=lambda i: (i + 1).clamp(min=32).float().log() / 3)


def sinks_and_window() -> Scheme:
    near = Segment(lambda i: i - WINDOW + 1, own, own, own, "own")
    first = Segment(everything, lambda i: (i - WINDOW).clamp(max=3), lambda i: i.clamp(max=WINDOW + 3), own, "own")
    return Scheme(static(near, first))


def _of_step(step: int) -> Callable[[Tensor], Tensor]:
    return lambda i: torch.where(i // 32 == step, i, torch.full_like(i, -1))


def stepped() -> Scheme:
    """Another frequency for each 32 positions of the query."""

    def segments(low: int, high: int) -> list[Segment]:
        found = []
        for step in range(low // 32, (high - 1) // 32 + 1):
            turned = Rotary(ROTARY.inv_freq / (step + 1), 1.0 + step / 8)
            found.append(Segment(everything, _of_step(step), own, own, f"step {step}", turned))
        return found

    return Scheme(segments, period=32)


SCHEMES: dict[str, Callable[[], Scheme]] = {
    "rotated": rotated,
    "unrotated": unrotated,
    "grouped": grouped,
    "clipped": clipped,
    "sinks and window": sinks_and_window,
    "stepped": stepped,
    "slopes": lambda: unrotated(Slopes()),
    "slopes over rotation": lambda: replace(grouped(), bias=Slopes()),
    "curved": lambda: unrotated(Curved()),
}
RIGHT_TO_ORACLE = 2e-6


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, uneven ones, and narrow insides also at small lengths."""
    monkeypatch.setattr(chunked, "BLOCK", 24)
    monkeypatch.setattr(chunked, "SLOPED_BLOCK", 28)
    monkeypatch.setattr(blocks, "BLOCK", 20)
    monkeypatch.setattr("ropepatch.attention.plan._NARROW", 8)


def inputs(batch: int, rows: int, columns: int, seed: int = 0, values: int = DIM) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, HEADS, rows, DIM, generator=generator),
        torch.randn(batch, KEY_HEADS, columns, DIM, generator=generator),
        torch.randn(batch, KEY_HEADS, columns, values, generator=generator),
    )


def plain(rows: int, columns: int, **more: Any) -> Visibility:
    k = torch.arange(columns)
    return Visibility(k[None, columns - rows :], k[None], k[columns - rows :], k, **more)


def layer_of(scheme: Scheme, **more: Any) -> Layer:
    return Layer(scheme, DIM**-0.5, ROTARY, LAYOUT, **more)


def oracle(q: Tensor, k: Tensor, v: Tensor, layer: Layer, seen: Visibility) -> Tensor:
    batch, group = q.shape[0], HEADS // KEY_HEADS
    pairs = seen.base_pairs(slice(None), slice(None)).expand(batch, -1, -1, -1)
    outputs = []
    for row in range(batch):
        outputs.append(
            reference.attend(
                q[row],
                k[row].repeat_interleave(group, 0),
                v[row].repeat_interleave(group, 0),
                layer.scheme,
                q_positions=seen.q_positions.expand(batch, -1)[row],
                k_positions=seen.k_positions.expand(batch, -1)[row],
                rotary=layer.rotary,
                layout=layer.layout,
                visible=pairs[row, 0],
                scaling=layer.scaling,
                softcap=layer.softcap,
                sinks=layer.sinks,
                module=layer.learned,
            )
        )
    return torch.stack(outputs)


def close(got: Tensor, wanted: Tensor, tolerance: float = RIGHT_TO_ORACLE) -> None:
    error = ((got.double() - wanted).abs().max() / wanted.abs().max()).detach()
    assert float(error) <= tolerance, float(error)


def kernels(scheme: Scheme) -> list[Any]:
    general = scheme.bias is not None and scheme.bias.slopes is None
    return [blocks.attend] if general else [chunked.attend, blocks.attend]


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("rows", "columns"), [(100, 100), (1, 100), (37, 100), (2, 2)])
def test_forward(name: str, rows: int, columns: int) -> None:
    layer = layer_of(SCHEMES[name]())
    q, k, v = inputs(2, rows, columns)
    wanted = oracle(q, k, v, layer, plain(rows, columns))
    for attend in kernels(layer.scheme):
        close(attend(q, k, v, layer, plain(rows, columns)), wanted)


def padded(columns: int, rows: int, left: list[int], right: list[int]) -> Visibility:
    slots = torch.arange(columns)
    lefts, rights = torch.tensor(left)[:, None], torch.tensor(right)[:, None]
    real = (slots >= lefts) & (slots < columns - rights)
    positions = (real.long().cumsum(1) - 1).clamp(min=0)
    documents = torch.where(real, 0, -1)
    own_rows = slice(columns - rows, columns)
    return Visibility(positions[:, own_rows], positions, slots[own_rows], slots, documents[:, own_rows], documents)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("rows", [90, 7, 1])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding(name: str, rows: int, side: str) -> None:
    layer = layer_of(SCHEMES[name]())
    q, k, v = inputs(3, rows, 90)
    left = [0, 5, 60] if side != "right" else [0, 0, 0]
    right = [0, 11, 3] if side != "left" else [0, 0, 0]
    seen = padded(90, rows, left, right)
    wanted = oracle(q, k, v, layer, seen)
    for attend in kernels(layer.scheme):
        close(attend(q, k, v, layer, seen), wanted)


@pytest.mark.parametrize("name", SCHEMES)
def test_packed_documents(name: str) -> None:
    layer = layer_of(SCHEMES[name]())
    q, k, v = inputs(2, 96, 96)
    lengths = [[50, 6, 40], [1, 70, 25]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    documents = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(row)) for row in lengths])
    slots = torch.arange(96)
    seen = Visibility(positions, positions, slots, slots, documents, documents)
    wanted = oracle(q, k, v, layer, seen)
    for attend in kernels(layer.scheme):
        close(attend(q, k, v, layer, seen), wanted)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("limits", [{"window": 30}, {"chunk": 40}, {"extra": True}])
def test_windows_chunks_and_masks_from_outside(name: str, limits: dict[str, Any]) -> None:
    layer = layer_of(SCHEMES[name]())
    q, k, v = inputs(2, 80, 80)
    if "extra" in limits:
        limits = {"extra": torch.rand(2, 1, 80, 80, generator=torch.Generator().manual_seed(1)) < 0.6}
    seen = plain(80, 80, **limits)
    wanted = oracle(q, k, v, layer, seen)
    for attend in kernels(layer.scheme):
        close(attend(q, k, v, layer, seen), wanted)


def test_positions_with_jumps_and_a_shift() -> None:
    positions = torch.cat((torch.arange(5, 40), torch.arange(70, 120)))[None]
    slots = torch.arange(85)
    seen = Visibility(positions, positions, slots, slots)
    q, k, v = inputs(1, 85, 85)
    for name, make in SCHEMES.items():
        layer = layer_of(make())
        wanted = oracle(q, k, v, layer, seen)
        for attend in kernels(layer.scheme):
            close(attend(q, k, v, layer, seen), wanted)
        assert name


def test_positions_out_of_order_are_looked_at_pair_by_pair() -> None:
    positions = torch.randperm(40, generator=torch.Generator().manual_seed(0))[None]
    slots = torch.arange(40)
    seen = Visibility(positions, positions, slots, slots)
    q, k, v = inputs(1, 40, 40)
    layer = layer_of(grouped())
    for attend in kernels(layer.scheme):
        got = attend(q, k, v, layer, seen)
        # The oracle's own rule is by position; here order decides too.
        close(got, oracle(q, k, v, layer, seen))


@pytest.mark.parametrize("name", SCHEMES)
def test_sinks(name: str) -> None:
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0])
    layer = layer_of(SCHEMES[name](), sinks=sinks)
    q, k, v = inputs(2, 70, 70)
    wanted = oracle(q, k, v, layer, plain(70, 70))
    for attend in kernels(layer.scheme):
        close(attend(q, k, v, layer, plain(70, 70)), wanted)


def test_softcap() -> None:
    layer = layer_of(grouped(), softcap=2.0)
    q, k, v = inputs(2, 70, 70)
    close(blocks.attend(q, k, v, layer, plain(70, 70)), oracle(q, k, v, layer, plain(70, 70)))


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in numbers."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.size = max(self.size, out.numel())
        return out


@pytest.mark.parametrize("name", ["rotated", "grouped", "curved"])
def test_the_general_path_holds_a_few_queries_at_a_time(name: str) -> None:
    layer, sizes = layer_of(SCHEMES[name](), softcap=2.0), []
    for length in (300, 600):
        with Largest() as largest:
            blocks.attend(*inputs(1, length, length), layer, plain(length, length))
        sizes.append(largest.size)
    assert sizes[1] <= 2.1 * sizes[0]
    assert sizes[1] <= HEADS * blocks.BLOCK * 600


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_of_some_queries(name: str) -> None:
    """What they make of one-hot values is what the oracle makes of them; learned sinks take the rest."""
    layer = layer_of(SCHEMES[name](), softcap=2.0, sinks=torch.tensor([0.5, -1.0, 3.0, 0.0]))
    q, k, _ = inputs(1, 90, 90)
    seen = plain(90, 90, window=70)
    wanted = oracle(q, k, torch.eye(90).expand(1, KEY_HEADS, -1, -1), layer, seen)
    rows = torch.tensor([0, 3, 4, 40, 41, 77, 89])
    got = torch.zeros(1, HEADS, len(rows), 90)
    for block, keys, weights in blocks.weights(q[:, :, rows], k, layer, seen.of_queries(rows), 3):
        got[:, :, block.start : block.stop, keys] = weights
    close(got, wanted[:, :, rows])
    assert bool((got.sum(-1) < 1).all())


def test_additive_mask() -> None:
    extra = torch.randn(2, HEADS, 50, 50, generator=torch.Generator().manual_seed(0))
    extra = extra.masked_fill(torch.rand(extra.shape, generator=torch.Generator().manual_seed(1)) < 0.2, -torch.inf)
    q, k, v = inputs(2, 50, 50)
    layer = layer_of(unrotated())
    got = blocks.attend(q, k, v, layer, plain(50, 50, extra=extra))
    scores = (
        torch.einsum("bhtd,bhnd->bhtn", q.double(), k.double().repeat_interleave(2, 1)) * layer.scaling + extra.double()
    )
    scores = scores.masked_fill(torch.ones(50, 50).triu(1).bool(), -torch.inf)
    wanted = torch.softmax(scores, -1).nan_to_num(0.0) @ v.double().repeat_interleave(2, 1)
    close(got, wanted)


@pytest.mark.parametrize("values", [8, 24])
def test_values_of_another_width(values: int) -> None:
    q, k, v = inputs(2, 60, 60, values=values)
    for name in ("grouped", "slopes"):
        layer = layer_of(SCHEMES[name]())
        for attend in kernels(layer.scheme):
            close(attend(q, k, v, layer, plain(60, 60)), oracle(q, k, v, layer, plain(60, 60)))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("case", ["plain", "padded", "sinks"])
def test_gradients(name: str, case: str) -> None:
    sinks = torch.tensor([0.5, -1.0, 1.0, 0.0]) if case == "sinks" else None
    learned = torch.tensor(0.7) if name == "curved" else None
    seen = padded(70, 70, [0, 9], [4, 0]) if case == "padded" else plain(70, 70)
    leaves = [x for x in (*inputs(2, 70, 70), sinks, learned) if x is not None]
    weight = torch.randn(2, HEADS, 70, DIM, generator=torch.Generator().manual_seed(3))

    def gradients(compute: Any) -> list[Tensor]:
        own_leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        q, k, v = own_leaves[:3]
        rest = own_leaves[3:]
        layer = layer_of(
            SCHEMES[name](),
            sinks=rest[0] if sinks is not None else None,
            learned=rest[-1] if learned is not None else None,
        )
        (compute(q, k, v, layer, seen) * weight).sum().backward()
        return [leaf.grad for leaf in own_leaves if leaf.grad is not None]

    wanted = gradients(oracle)
    assert len(wanted) == len(leaves)
    for attend in kernels(SCHEMES[name]()):
        for got, right in zip(gradients(attend), wanted, strict=True):
            close(got, right.double(), 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", SCHEMES)
def test_half_precisions(dtype: torch.dtype, name: str) -> None:
    layer = layer_of(SCHEMES[name]())
    q, k, v = (x.to(dtype) for x in inputs(2, 90, 90))
    wanted = oracle(q, k, v, layer, plain(90, 90))
    for attend in kernels(layer.scheme):
        got = attend(q, k, v, layer, plain(90, 90))
        assert got.dtype == dtype
        close(got, wanted, 0.02 if dtype == torch.bfloat16 else 0.003)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slopes_at_far_positions(dtype: torch.dtype) -> None:
    """A shift of all positions changes nothing, also where the dtype could not hold the positions."""
    layer = layer_of(unrotated(Slopes()))
    q, k, v = (x.to(dtype) for x in inputs(1, 60, 60))
    near = plain(60, 60)
    far = replace(near, q_positions=near.q_positions + 100_001, k_positions=near.k_positions + 100_001, plans={})
    assert torch.equal(chunked.attend(q, k, v, layer, near), chunked.attend(q, k, v, layer, far))


@pytest.mark.parametrize("name", ["grouped", "slopes"])
def test_the_way_without_the_cpu_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain operations, as on a device without the fused kernel, with tiles smaller than the rectangles."""
    monkeypatch.setattr(partial, "_TILE", 16)
    layer = layer_of(SCHEMES[name]())
    q, k, v = (x.requires_grad_() for x in inputs(2, 70, 70))
    fast = chunked.attend(q, k, v, layer, plain(70, 70))
    wanted = torch.autograd.grad(fast.square().sum(), (q, k, v))
    monkeypatch.setattr(partial, "forward", partial._math_forward)
    monkeypatch.setattr(partial, "backward", partial._math_backward)
    slow = chunked.attend(q, k, v, layer, plain(70, 70))
    close(slow, fast.double())
    for got, right in zip(torch.autograd.grad(slow.square().sum(), (q, k, v)), wanted, strict=True):
        close(got, right.double(), 5e-6)


def test_a_row_that_sees_nothing_is_zero() -> None:
    layer = layer_of(grouped())
    q, k, v = inputs(1, 30, 30)
    seen = padded(30, 30, [12], [0])
    for attend in kernels(layer.scheme):
        out = attend(q, k, v, layer, seen)
        assert not out[:, :, :12].any()
        assert torch.isfinite(out).all()


FUSED = [name for name in SCHEMES if name != "curved"]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("case", ["plain", "padded", "sinks", "softcap", "window"])
def test_the_fused_path_in_its_uncompiled_form(name: str, case: str) -> None:
    """What CUDA compiles, run as written: the same masks and scores, on the CPU."""
    from torch.nn.attention.flex_attention import flex_attention

    more: dict[str, Any] = {"sinks": torch.tensor([0.5, -1.0, 1.0, 0.0])} if case == "sinks" else {}
    more |= {"softcap": 2.0} if case == "softcap" else {}
    seen = padded(130, 130, [0, 9], [4, 0]) if case == "padded" else plain(130, 130)
    seen = replace(seen, window=30) if case == "window" else seen
    layer = layer_of(SCHEMES[name](), **more)
    q, k, v = inputs(2, 130, 130)
    assert flex.expresses(layer, seen)
    got = flex.attend(q, k, v, layer, seen, kernel=flex_attention)
    assert got is not None
    close(got, oracle(q, k, v, layer, seen), 5e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SCHEMES)
def test_on_cuda(name: str) -> None:
    """Whatever path the device gets, forward and backward."""
    from ropepatch.attention.interface import attend

    q, k, v = (x.cuda().requires_grad_() for x in inputs(2, 300, 300))
    layer = layer_of(SCHEMES[name]())
    seen = plain(300, 300)
    out = attend(q, k, v, layer, seen.to("cuda"))
    close(out.detach().cpu(), oracle(q.detach().cpu(), k.detach().cpu(), v.detach().cpu(), layer, seen), 1e-3)
    out.square().sum().backward()
    leaves = [x.detach().cpu().requires_grad_() for x in (q, k, v)]
    chunked_out = (chunked.attend if len(kernels(layer.scheme)) == 2 else blocks.attend)(*leaves, layer, seen)
    chunked_out.square().sum().backward()
    for on_device, leaf in zip((q, k, v), leaves, strict=True):
        assert on_device.grad is not None
        assert leaf.grad is not None
        close(on_device.grad.cpu(), leaf.grad.double(), 1e-3)


@pytest.mark.parametrize("name", SCHEMES)
def test_dropout_keeps_the_mean(name: str) -> None:
    layer, free = layer_of(SCHEMES[name](), dropout=0.3), layer_of(SCHEMES[name]())
    q, k, v = inputs(1, 12, 12)
    torch.manual_seed(0)
    drawn = torch.stack([blocks.attend(q, k, v, layer, plain(12, 12)) for _ in range(300)])
    assert float(drawn.std(0).max()) > 0.05
    assert float((drawn.mean(0) - blocks.attend(q, k, v, free, plain(12, 12))).abs().max()) < 0.3


@pytest.mark.parametrize("dim", [8, 24, 128, 256])
def test_head_sizes(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, HEADS, 60, dim, generator=generator)
    k, v = (torch.randn(1, KEY_HEADS, 60, dim, generator=generator) for _ in range(2))
    layout = Layout(0, 8)
    for name in ("grouped", "slopes"):
        layer = Layer(SCHEMES[name](), dim**-0.5, ROTARY, layout)
        for attend in kernels(layer.scheme):
            close(attend(q, k, v, layer, plain(60, 60)), oracle(q, k, v, layer, plain(60, 60)))

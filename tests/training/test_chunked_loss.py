"""The chunked cross entropy against torch's own over all logits: value, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from ropepatch.errors import OptionError
from ropepatch.training.loss import chunked_cross_entropy


def plain(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> Tensor:
    logits = scale * functional.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return functional.cross_entropy(
        logits.float() if logits.dtype != torch.float64 else logits, labels, reduction="sum"
    )


def problem(n: int, dim: int, size: int, ignored: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n * 10007 + dim * 101 + size)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((n, dim), (size, dim), (size,))
    )
    labels = torch.randint(0, size, (n,), generator=generator)
    labels[torch.rand(n, generator=generator) < ignored] = -100
    return [hidden, weight, labels, bias]


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    # Not 1: what comes in is passed on.
    return torch.autograd.grad(0.37 * loss, leaves)


@settings(max_examples=60)
@given(
    n=st.integers(1, 40),
    dim=st.integers(1, 9),
    size=st.integers(1, 33),
    chunk=st.integers(1, 50),
    ignored=st.sampled_from([0.0, 0.4, 0.95]),
    softcap=st.none() | st.floats(0.5, 40.0),
    scale=st.sampled_from([1.0, 0.0625, 3.0]),
    with_bias=st.booleans(),
)
def test_value_and_gradients_are_those_of_all_logits(
    n: int, dim: int, size: int, chunk: int, ignored: float, softcap: float | None, scale: float, with_bias: bool
) -> None:
    hidden, weight, labels, bias = problem(n, dim, size, ignored)
    given_bias, leaves = (bias, (hidden, weight, bias)) if with_bias else (None, (hidden, weight))
    expected = plain(hidden, weight, labels, given_bias, softcap, scale)
    found = chunked_cross_entropy(hidden, weight, labels, bias=given_bias, softcap=softcap, scale=scale, chunk=chunk)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(gradients(found, *leaves), gradients(expected, *leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_only_what_is_trained_gets_a_gradient(frozen: str) -> None:
    hidden, weight, labels, _ = problem(12, 5, 17, 0.2)
    (weight if frozen == "weight" else hidden).requires_grad_(False)
    chunked_cross_entropy(hidden, weight, labels, chunk=5).backward()
    given_gradient, none = (hidden, weight) if frozen == "weight" else (weight, hidden)
    assert none.grad is None
    expected = torch.autograd.grad(plain(hidden, weight, labels), given_gradient)[0]
    torch.testing.assert_close(given_gradient.grad, expected)


def test_a_weight_that_is_computed_from_something_else() -> None:
    hidden, factor, labels, _ = problem(9, 4, 11, 0.0)
    double = chunked_cross_entropy(hidden, factor * 2, labels, chunk=4)
    expected = plain(hidden, factor * 2, labels)
    torch.testing.assert_close(gradients(double, factor)[0], gradients(expected, factor)[0])


def test_float32() -> None:
    hidden, weight, labels, _ = problem(200, 32, 500, 0.3, torch.float32)
    found, expected = chunked_cross_entropy(hidden, weight, labels, chunk=64), plain(hidden, weight, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_the_truth_as_all_logits_are(dtype: torch.dtype) -> None:
    hidden, weight, labels, _ = problem(600, 64, 300, 0.1, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    truth = plain(*exact, labels)
    true_gradients = gradients(truth, *exact)
    error = []
    for loss in (chunked_cross_entropy(hidden, weight, labels, chunk=50), plain(hidden, weight, labels)):
        assert loss.dtype == torch.float32
        parts = gradients(loss, hidden, weight)
        off = [float((part - true).norm() / true.norm()) for part, true in zip(parts, true_gradients, strict=True)]
        error.append([abs(float((loss / truth).detach()) - 1), *off])
    for ours, theirs in zip(*error, strict=True):
        assert ours <= 1.2 * theirs + 2e-5


def test_very_large_and_very_small_logits() -> None:
    hidden = torch.tensor([[3e4], [-3e4], [1e-9]], requires_grad=True)
    weight, labels = torch.tensor([[1.0], [0.0], [-1.0]]), torch.tensor([2, 2, 0])
    loss = chunked_cross_entropy(hidden, weight, labels, chunk=2)
    assert float(loss.detach()) == pytest.approx(6e4 + 0 + 1.0986, rel=1e-6)
    assert gradients(loss, hidden)[0].flatten().tolist() == pytest.approx([0.37 * 2, 0, -0.37], abs=1e-6)


@pytest.mark.parametrize("rows", [0, 6])
def test_no_label_is_a_loss_of_zero_with_gradients_of_zero(rows: int) -> None:
    hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.full((rows,), -100))
    assert loss.dtype == torch.float32 and float(loss.detach()) == 0
    for gradient in gradients(loss, hidden, weight):
        assert not gradient.any()


def test_no_gradients_where_none_are_wanted() -> None:
    hidden, weight, labels, _ = problem(12, 5, 17, 0.2)
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, labels, chunk=5)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(hidden, weight, labels).detach())


def test_a_chunk_holds_a_token() -> None:
    with pytest.raises(OptionError, match="at least one token"):
        chunked_cross_entropy(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([0]), chunk=0)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_logits_of_one_chunk_exist_at_a_time() -> None:
    hidden, weight, labels, _ = problem(512, 4, 1000, 0.1, torch.bfloat16)
    with Largest() as ours:
        chunked_cross_entropy(hidden, weight, labels, chunk=16).backward()
    with Largest() as theirs:
        plain(hidden, weight, labels).backward()
    assert theirs.elements == 512 * 1000
    assert ours.elements <= 16 * 1000


def test_ignored_rows_are_not_projected() -> None:
    hidden, weight, labels, _ = problem(512, 4, 1000, 0.0)
    labels[7:] = -100
    with Largest() as made:
        chunked_cross_entropy(hidden, weight, labels, chunk=512).backward()
    assert made.elements <= 7 * 1000

"""The fastest way to read a text in pieces: taken when it agrees with a plain forward, left with a reason when not."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from small import model

from ropepatch.evaluation.cache import NoReuseError
from ropepatch.evaluation.chunked_attention import NAME
from ropepatch.evaluation.pieces import fastest_way
from ropepatch.evaluation.plain import full_logits

IDS = np.arange(3, 43, dtype=np.int32)


@torch.inference_mode()
def test_the_first_way_that_agrees_is_taken_and_kept() -> None:
    net, asked = model("llama"), []

    def read(unmasked: bool) -> torch.Tensor:
        asked.append((unmasked, net.config._attn_implementation))
        return full_logits(net, IDS, keep=7)

    with ExitStack() as stack:
        assert fastest_way(net, IDS, read, stack) is None
        assert asked == [(True, NAME)]
        assert net.config._attn_implementation == NAME
    assert net.config._attn_implementation == "sdpa"


@torch.inference_mode()
def test_a_way_that_disagrees_is_followed_by_the_plain_attention() -> None:
    net = model("llama")

    def read(unmasked: bool) -> torch.Tensor:
        return full_logits(net, IDS) + float(unmasked)  # a constant changes no probability, but is not rounding

    with ExitStack() as stack:
        assert fastest_way(net, IDS, read, stack) is None
        assert net.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("error", "times", "reason"),
    [
        (NoReuseError("its state cannot be cut back"), 1, "its state cannot be cut back"),
        (RuntimeError("sizes differ"), 2, "it cannot be read in pieces: RuntimeError: sizes differ"),
        (None, 2, "its logits change when it reads a text in pieces"),
    ],
)
@torch.inference_mode()
def test_why_none_is_taken(error: Exception | None, times: int, reason: str) -> None:
    net, asked = model("llama"), []

    def read(unmasked: bool) -> torch.Tensor:
        asked.append(unmasked)
        if error is not None:
            raise error
        return torch.zeros(5, net.config.vocab_size)

    with ExitStack() as stack:
        assert fastest_way(net, IDS, read, stack) == reason
        assert net.config._attn_implementation == "sdpa"
    assert asked == [True, False][:times]


@torch.inference_mode()
def test_other_errors_are_not_swallowed_and_nothing_stays_selected() -> None:
    net = model("llama")

    def read(unmasked: bool) -> torch.Tensor:
        raise KeyboardInterrupt

    with ExitStack() as stack, pytest.raises(KeyboardInterrupt):
        fastest_way(net, IDS, read, stack)
    assert net.config._attn_implementation == "sdpa"

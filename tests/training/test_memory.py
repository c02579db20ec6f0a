"""Trimming the heap during a forward: it happens after each layer, changes no value, and leaves nothing behind."""

from __future__ import annotations

import platform

import pytest
import torch

from ropepatch.testing import tiny_model
from ropepatch.training import memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_heap_is_trimmed_between_layers_on_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", num_hidden_layers=2 * memory._EVERY + 1)
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    real, calls = memory._trim(), []
    assert real is not None and real(0) in (0, 1)
    monkeypatch.setattr(memory, "_trim", lambda: lambda pad: calls.append(pad))
    with memory.trimmed(model):
        logits = model(ids).logits
        assert torch.equal(logits, expected)
        assert calls == [0] * 2
        logits.sum().backward()
    assert calls == [0] * 4
    model(ids).logits.sum().backward()
    assert len(calls) == 4


def test_nothing_is_done_where_there_is_no_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(memory, "_trim", lambda: None)
    with memory.trimmed(model):
        assert not any(module._forward_hooks for module in model.modules())

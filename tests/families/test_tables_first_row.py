"""Where position 0 stands in each family's table, held against what the model looks up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ropepatch.errors import UnsupportedModelError
from ropepatch.families import discover
from ropepatch.families._tables import adds_offset, first_row
from ropepatch.methods._sinusoid import law_of
from ropepatch.testing import tiny_inputs, tiny_model

# Kind, and the row of position 0 where the padding token is 1.
FAMILIES = {
    "bert": ("encoder", 0),
    "roberta": ("encoder", 2),
    "xlm-roberta": ("encoder", 2),
    "nystromformer": ("encoder", 2),
    "mpnet": ("encoder", 2),
    "gpt2": ("causal-lm", 0),
    "opt": ("causal-lm", 2),
    "biogpt": ("causal-lm", 2),
    "bart": ("encoder-decoder", 2),
    "led": ("encoder-decoder", 0),
    "blenderbot": ("encoder-decoder", 0),
    "marian": ("encoder-decoder", 0),
    "fsmt": ("encoder-decoder", 2),
    "prophetnet": ("encoder-decoder", 2),
}


def build(kind: str) -> Any:
    overrides = {"pad_token_id": 1} if FAMILIES[kind][1] and kind not in ("opt", "biogpt") else {}
    return tiny_model(kind, FAMILIES[kind][0], **overrides)


@torch.no_grad()
def rows_read(model: Any, module: nn.Module, length: int) -> list[int]:
    """Rows that a forward looks up, first to last: the table is filled with the numbers of its rows."""
    kept = module.weight.detach().clone()
    module.weight.copy_(torch.arange(len(kept))[:, None].expand_as(kept))
    read: list[torch.Tensor] = []
    handle = module.register_forward_hook(lambda _m, _i, out: read.append(out[0] if isinstance(out, tuple) else out))
    try:
        model(**tiny_inputs(model, length=length))
    finally:
        handle.remove()
        module.weight.copy_(kept)
    return [int(row) for row in read[0].reshape(-1, kept.shape[-1])[:length, 0]]


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_first_row_is_the_one_that_position_0_reads(kind: str) -> None:
    model = build(kind)
    tables = [site for site in discover(model) if site.kind == "table"]
    assert tables
    for site in tables:
        start = first_row(model, site.path)
        assert start == FAMILIES[kind][1]
        assert rows_read(model, model.get_submodule(site.path), 5) == [start + p for p in range(5)]


@pytest.mark.parametrize(("kind", "start"), [("xglm", 2), ("m2m_100", 1), ("musicgen", 0)])
def test_tables_of_sines_that_no_embedding_holds(kind: str, start: int) -> None:
    try:
        model = tiny_model(kind, "encoder-decoder" if kind == "m2m_100" else "causal-lm", pad_token_id=0)
    except UnsupportedModelError as error:
        pytest.skip(f"needs a transformers that builds it from defaults: {error}")
    site = next(site for site in discover(model) if site.kind == "table")
    module = model.get_submodule(site.path)
    assert first_row(model, site.path) == start
    assert adds_offset(model, site.path) == (kind == "xglm")
    law = law_of(module.weights)
    assert law is not None and law.to_base and law.layout == "halves" and law.cosine_first == (kind == "musicgen")
    # A row of zeros would be passed over.
    assert float(module.weights[start].abs().sum()) > 0


def test_what_a_patch_keeps_is_no_table() -> None:
    import ropepatch
    from ropepatch.surgery._changes import KEPT

    model = build("bert")
    ropepatch.patch(model, "linear", factor=2)
    assert any(KEPT in name for name, _ in model.named_buffers())
    assert [site.name for site in discover(model) if site.kind == "table"] == ["weight"]

"""The far-context probe: what stands before the end, and losses against plain forwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small import model, tokenizer

from ropepatch.errors import PromptError
from ropepatch.evaluation import evaluate
from ropepatch.evaluation.perplexity.documents import Document
from ropepatch.evaluation.perplexity.far import CONTEXTS, far_inputs, summarise_far
from ropepatch.evaluation.prompt import TextEncoder

SENTENCES = [f"The grass is green in year {i}, and Mr. Blue goes there." for i in range(24)]
TEXT = " ".join(SENTENCES[:12]) + "\n\n" + " ".join(SENTENCES[12:]) + "\n"


@pytest.mark.parametrize("name", ["byte_level", "byte_level_bos", "fused_newlines"])
def test_inputs(name: str) -> None:
    encoder = TextEncoder(tokenizer(name))
    inputs, scored = far_inputs(Document("x", "x", TEXT), encoder, keep=100, most=10_000, seed=0)
    assert inputs["intact"].tolist() == tokenizer(name)(TEXT)["input_ids"]
    ends = {tuple(inputs[context][-scored:].tolist()) for context in CONTEXTS}
    assert len(ends) == 1
    assert 99 <= scored <= 150
    texts = {context: encoder.decode(inputs[context]) for context in CONTEXTS}
    alone = texts["none"]
    assert alone.startswith("The grass")
    assert texts["intact"].endswith(alone) and texts["shuffled"].endswith(alone)
    far = {context: texts[context].removesuffix(alone) for context in ("intact", "shuffled")}
    pieces = {context: sorted(part.strip() for part in text.split("there.")) for context, text in far.items()}
    assert pieces["intact"] == pieces["shuffled"]
    assert far["intact"] != far["shuffled"]
    again, _ = far_inputs(Document("y", "y", TEXT), encoder, keep=100, most=10_000, seed=0)
    assert again["shuffled"].tolist() == inputs["shuffled"].tolist()
    other, _ = far_inputs(Document("x", "x", TEXT), encoder, keep=100, most=10_000, seed=1)
    assert other["shuffled"].tolist() != inputs["shuffled"].tolist()


def test_a_document_is_cut_at_its_most_tokens() -> None:
    encoder = TextEncoder(tokenizer("byte_level"))
    inputs, _ = far_inputs(Document("x", "x", TEXT), encoder, keep=100, most=300, seed=0)
    assert inputs["intact"].tolist() == tokenizer("byte_level")(TEXT)["input_ids"][:300]


def test_no_far_text() -> None:
    with pytest.raises(PromptError, match="has no far text"):
        far_inputs(Document("x", "x", "One. Two."), TextEncoder(tokenizer("byte_level")), keep=4, most=99, seed=0)


def test_a_run_is_what_plain_forwards_give(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT[300:])
    net = model("llama")
    options = {"text": str(tmp_path), "keep": 60, "max_tokens": 500, "progress": False, "output": tmp_path / "run"}
    result = evaluate(net, tokenizer("byte_level"), "far_context", **options)
    for row in result.trials:
        text = {"a.txt": TEXT, "b.txt": TEXT[300:]}[row["answer"]]
        inputs, scored = far_inputs(
            Document("x", "x", text), TextEncoder(tokenizer("byte_level")), keep=60, most=500, seed=0
        )
        for context in CONTEXTS:
            ids = torch.from_numpy(inputs[context].astype("int64"))
            with torch.no_grad():
                losses = -net(ids[None]).logits[0].double().log_softmax(-1)
            expected = losses[range(len(ids) - 1), ids[1:]][-scored:].sum()
            found = row["nll" if context == "intact" else f"nll_{context}"]
            assert found == pytest.approx(float(expected), rel=1e-4)
        assert row["length"] == len(inputs["intact"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    gain = sum(row["nll_none"] - row["nll"] for row in result.trials) / summary["tokens_scored"]
    assert summary["gains"]["far_text"]["loss"] == pytest.approx(gain)
    assert (tmp_path / "run" / "heatmap.png").stat().st_size > 1000
    assert "What far text gains" in (tmp_path / "run" / "report.html").read_text()
    assert evaluate(net, tokenizer("byte_level"), "far_context", **options).sum_of_prompts == 0


def test_gains_are_paired() -> None:
    rows = [
        {
            "trial": i,
            "answer": "x",
            "length": 9,
            "tokens_scored": n,
            "nll": s,
            "nll_shuffled": s + n,
            "nll_none": s + 2 * n,
        }
        for i, (s, n) in enumerate([(30.0, 10), (90.0, 20), (10.0, 15)])
    ]
    gains = summarise_far(rows, {"task": "far_context"})["gains"]
    for name, size in (("order", 1.0), ("far_text", 2.0)):
        assert [gains[name][key] for key in ("loss", "ci_low", "ci_high")] == pytest.approx([size] * 3)
    assert np.isfinite(gains["order"]["loss"])

"""Packed documents on a model: isolated ones do not see each other, others do; only what came before is ever seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_material import files, recipe, tokenizer, write_documents

import ropepatch
from ropepatch.training.data import build
from ropepatch.training.positions import Collator, training_attention


def _model(patch: str | None) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # sharper attention: what is seen moves logits
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
    return ropepatch.patch(model, patch, factor=2) if patch else model


@pytest.mark.parametrize("patch", [None, "linear", "self_extend"])
@pytest.mark.parametrize("isolate", [True, False])
def test_who_sees_whom(tmp_path: Path, patch: str | None, isolate: bool) -> None:
    write_documents(tmp_path / "texts", 30, most=12)
    whole = recipe(files(tmp_path / "texts"), length=64, isolate_documents=isolate, cache=str(tmp_path / "cache"))
    rows = build(whole, tokenizer())
    numbered = build(
        whole.model_copy(update={"data": whole.data.model_copy(update={"isolate_documents": True})}), tokenizer()
    )
    index = next(n for n in range(len(rows)) if max(numbered[n]["documents"]) >= 3)
    documents = torch.tensor(numbered[index]["documents"])
    model = _model(patch)
    with training_attention(model, whole) as numbered_masks, torch.no_grad():
        collate = Collator(whole, 128, numbered=numbered_masks)

        def logits(row: dict[str, Any]) -> torch.Tensor:
            batch = collate([row])
            batch.pop("labels")
            return model(**batch, use_cache=False).logits[0]

        before = logits(rows[index])
        changed = dict(rows[index])
        at = int((documents == 2).nonzero()[0]) - 1  # the last token of document 1
        changed["input_ids"] = [*changed["input_ids"]]
        changed["input_ids"][at] = (changed["input_ids"][at] + 1) % 100 + 10
        moved = (logits(changed) - before).abs().amax(-1) > 1e-5
    assert not moved[:at].any()
    assert moved[at]
    later = moved[documents >= 2]
    assert not later.any() if isolate else later.float().mean() > 0.5

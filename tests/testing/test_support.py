"""The support matrix, a sample of families by default and all of them under `slow`."""

from __future__ import annotations

import pytest
import torch

from ropepatch.testing import forward_logits, model_types, tiny_inputs, tiny_model
from ropepatch.testing.native import native_twin
from ropepatch.testing.support import CASES, measure

# One of every way in which transformers carries rotary positions.
ROTARY = [
    ("llama", "causal-lm"),  # the plain form
    ("qwen3_5", "causal-lm"),  # partial, several axes, beside linear attention
    ("gemma3_text", "causal-lm"),  # per layer type
    ("gemma4_text", "causal-lm"),  # proportional by training, heads of two sizes
    ("cohere2", "causal-lm"),  # interleaved, layers without positions
    ("gpt_neox", "causal-lm"),  # partial
    ("glm4", "causal-lm"),  # partial and interleaved
    ("phi3", "causal-lm"),  # its own place for the trained length
    ("deepseek_v2", "causal-lm"),  # latent attention, complex numbers
    ("deepseek_v3", "causal-lm"),  # latent attention, softmax scale
    ("deepseek_v4", "causal-lm"),  # labels that are not layer types, rotary inside the layers
    ("llama4_text", "causal-lm"),  # complex numbers
    ("gpt_oss", "causal-lm"),  # yarn from the start
    ("ministral3", "causal-lm"),  # yarn, and a temperature that reads the same parameters
    ("granite_swa", "causal-lm"),  # a module for each base
    ("moshi", "causal-lm"),  # a module for each layer
    ("gptj", "causal-lm"),  # a table
    ("roformer", "causal-lm"),  # a frozen embedding
    ("modernbert", "encoder"),
    ("esm", "encoder"),
    ("t5gemma", "encoder-decoder"),
    ("qwen2_vl_text", "text"),
]
OTHERS = [("bloom", "causal-lm", "alibi"), ("gpt2", "causal-lm", "learned"), ("t5", "encoder-decoder", "relative_bias")]
OTHERS += [("marian", "causal-lm", "sinusoidal"), ("mamba", "causal-lm", "none")]

QUICK = tuple(case for case in CASES if case.name in ("linear", "yarn", "ntk"))
FINE = {"exact", "close", "patched"}


@pytest.mark.parametrize(("model_type", "kind"), ROTARY)
def test_rotary_families_are_patched_and_agree_with_transformers(model_type: str, kind: str) -> None:
    if model_type not in model_types(kind):
        pytest.skip("younger than this transformers")
    support = measure(model_type, kind, QUICK)
    assert support.mechanism.startswith("rotary")
    assert {name: outcome for name, outcome in support.outcomes.items() if outcome.status not in FINE} == {}
    assert len(support.outcomes) == len(QUICK)


@pytest.mark.parametrize(("model_type", "kind", "mechanism"), OTHERS)
def test_other_mechanisms_are_named_and_refused(model_type: str, kind: str, mechanism: str) -> None:
    support = measure(model_type, kind, QUICK)
    assert support.mechanism == mechanism
    assert {outcome.status for outcome in support.outcomes.values()} == {"refused"}
    assert all("rotary" in outcome.detail for outcome in support.outcomes.values())


def test_the_twin_is_scaled_by_transformers_alone() -> None:
    model = tiny_model("llama")
    inputs = tiny_inputs(model, length=96)
    twin = native_twin(model, {"rope_type": "linear", "factor": 4.0})
    assert twin is not None
    assert torch.equal(twin.model.rotary_emb.inv_freq * 4, model.model.rotary_emb.inv_freq)
    assert model.config.rope_parameters["rope_type"] == "default"
    assert not torch.equal(forward_logits(twin, **inputs), forward_logits(model, **inputs))
    # Positions divided by the factor are the same thing said in another way.
    divided = forward_logits(model, **inputs, position_ids=torch.arange(96)[None] / 4)
    torch.testing.assert_close(forward_logits(twin, **inputs), divided, rtol=0, atol=1e-4)
    assert native_twin(tiny_model("gptj"), {"rope_type": "linear", "factor": 4.0}) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["causal-lm", "encoder", "encoder-decoder", "text"])
def test_the_whole_matrix(kind: str) -> None:
    rows = [measure(model_type, kind) for model_type in model_types(kind)]
    wrong = {
        (row.model_type, name): outcome
        for row in rows
        for name, outcome in row.outcomes.items()
        if outcome.status not in FINE | {"refused"}
    }
    assert wrong == {}
    if kind == "causal-lm":
        rotary = [row for row in rows if row.mechanism.startswith("rotary") and row.outcomes]
        linear = [row.outcomes["linear"].status for row in rotary]
        assert sum(status in FINE for status in linear) >= 120
        assert sum(status in ("exact", "close") for status in linear) >= 97

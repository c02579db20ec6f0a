"""The support matrix, a sample of families by default and all of them under `slow`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from ropepatch.attention.scheme import Rotary, Scheme, Segment, everything, own
from ropepatch.methods._attention import LayerGeometry, own_rotary
from ropepatch.methods._base import METHODS
from ropepatch.testing import forward_logits, model_types, tiny_inputs, tiny_model
from ropepatch.testing.cache_rule import SEAM_CASES, SeamCase, cache_rule
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
OTHERS = [("gpt2", "causal-lm", "learned"), ("t5", "encoder-decoder", "relative_bias")]
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
    assert set(support.seam) == ({case.method for case in SEAM_CASES} if kind == "causal-lm" else set())


@pytest.mark.parametrize(("model_type", "kind", "mechanism"), OTHERS)
def test_other_mechanisms_are_named_and_what_is_rotary_alone_is_refused(
    model_type: str, kind: str, mechanism: str
) -> None:
    support = measure(model_type, kind, QUICK)
    assert support.mechanism == mechanism
    found = {name: outcome.status for name, outcome in support.outcomes.items()}
    linear = "refused" if mechanism == "none" else "patched"
    assert found == {"linear": linear, "yarn": "refused", "ntk": "refused"}
    assert all("rotary" in outcome.detail for outcome in support.outcomes.values() if outcome.status == "refused")


def test_alibi_is_named_and_nothing_but_a_clear_refusal_goes_wrong() -> None:
    support = measure("bloom", "causal-lm", QUICK)
    assert support.mechanism == "alibi"
    assert {outcome.status for outcome in support.outcomes.values()} <= FINE | {"refused"}
    assert support.outcomes["yarn"].status == "refused"
    assert support.seam == {}


# One of every way in which a model calls its attention.
@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "gpt_oss", "gptj", "deepseek_v3", "granite_swa", "mistral", "zamba2", "bamba"]
)
def test_the_cache_rule_holds_at_the_attention_seam(model_type: str) -> None:
    if model_type not in model_types():
        pytest.skip("younger than this transformers")
    support = measure(model_type, "causal-lm", ())
    assert {name: outcome for name, outcome in support.seam.items() if outcome.status != "passed"} == {}
    for outcome in support.seam.values():
        if model_type == "zamba2" and "left out: unpatched" in outcome.detail:
            continue  # Older transformers do not keep to the rule with this one either.
        assert outcome.cached is not None and outcome.cached <= 5e-5
        assert outcome.padded is not None and outcome.padded <= 5e-5


def test_a_model_that_rotates_in_its_windows_only_is_patched_there() -> None:
    # Cohere 2 rotates in its windows only, and looks far without rotation.
    (outcome,) = measure("cohere2", "causal-lm", (), (SeamCase("dynamic_ntk"),)).seam.values()
    assert outcome.status == "passed"


def test_a_refusal_keeps_its_reason_without_the_hint() -> None:
    (outcome,) = measure("blt", "causal-lm", (), (SeamCase("alibi"),)).seam.values()
    assert outcome.status == "refused"
    assert outcome.detail.startswith("its rotary modules belong to several models")


def test_what_breaks_the_cache_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure can fail: here it meets frequencies that follow how far a call reaches."""

    def by_call(layer: LayerGeometry, options: Any) -> Scheme:
        del options
        rotary = own_rotary(layer)

        def segments(low: int, high: int) -> list[Segment]:
            del low
            slower = Rotary(rotary.inv_freq / (1 + high))
            return [Segment(everything, own, own, own, f"until {high}", slower)]

        return Scheme(segments)

    monkeypatch.setitem(METHODS._entries, "by_call", replace(METHODS.get("dynamic_ntk"), name="by_call", build=by_call))
    model = tiny_model("llama")
    inputs = tiny_inputs(model, length=96)
    outcome = cache_rule(model, inputs, forward_logits(model, **inputs), cases=(SeamCase("by_call"),))["by_call"]
    assert outcome.status == "differs"
    assert outcome.cached is not None and outcome.cached > 1e-2


def test_what_a_model_does_not_keep_by_itself_is_left_out_by_name() -> None:
    # Its cache drops what its mask still shows, patched or not.
    (outcome,) = measure("moshi", "causal-lm", (), (SeamCase("alibi"),)).seam.values()
    if outcome.status == "refused":
        pytest.skip("needs a transformers whose moshi asks the attention interface")
    assert outcome.status == "passed"
    assert outcome.cached is None and outcome.padded is not None
    assert outcome.detail.startswith("cached left out: unpatched")


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
        seam = [[outcome.status for outcome in row.seam.values()] for row in rotary]
        assert set().union(*seam) <= {"passed", "refused"}
        assert sum(set(statuses) == {"passed"} for statuses in seam) >= 110
        passed = [outcome for row in rotary for outcome in row.seam.values() if outcome.status == "passed"]
        assert sum(None in (outcome.cached, outcome.padded) for outcome in passed) <= 6

"""What is refused before it runs, and which native scalings forbid sharing prefixes."""

from __future__ import annotations

import pytest

import ropepatch
from ropepatch.evaluation.limits import check_length, length_dependent_rope
from ropepatch.testing import tiny_model


def test_a_learned_table_sets_the_limit() -> None:
    model = tiny_model("gpt2")
    length = model.config.max_position_embeddings
    assert check_length(model, length) == length
    with pytest.raises(ropepatch.UnsupportedModelError, match=str(length)):
        check_length(model, length + 1)


def test_only_scalings_that_look_at_the_input_forbid_sharing() -> None:
    planes = 8
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * planes,
        "long_factor": [2.0] * planes,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    switching = tiny_model("llama", head_dim=2 * planes, rope_parameters=longrope)
    assert length_dependent_rope(switching, 65) == "longrope"
    assert length_dependent_rope(switching, 64) is None
    assert check_length(switching, 10**6) is None
    model = ropepatch.patch(tiny_model("llama"), "mrrope", factor=4)
    assert model.config.rope_parameters["rope_type"] == "longrope"
    assert length_dependent_rope(model, 200) is None


def test_rows_before_the_first_position_do_not_count() -> None:
    model = tiny_model("roberta")
    rows, padding = model.config.max_position_embeddings, model.config.pad_token_id
    assert check_length(model, rows - padding - 1) == rows - padding - 1
    with pytest.raises(ropepatch.UnsupportedModelError, match="--patch linear"):
        check_length(model, rows - padding)

"""Several gloo processes against one: gradients of every parameter, refusals, sharded weights.

What the processes do is in parallel_cases.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parallel_cases import BATCHES, CASES, FAMILIES, METHODS, MODES, run

# float32 rounding, relative.
CLOSE = 1e-5

# One family with every method, every family, every kind of batch, both modes; the product of all is slow.
QUICK = [
    *(f"llama-{method}-all_gather" for method in METHODS),
    *(f"llama-{method}-ulysses" for method in ("yarn", "alibi", "kerple")),
    "qwen3-yarn-ulysses",
    "gpt_neox-dynamic_ntk-all_gather",
    "gemma2-none-all_gather",
    "gemma2-self_extend-ulysses",
    *(f"{kind}-self_extend-all_gather" for kind in BATCHES),
    *(f"{kind}-yarn-all_gather" for kind in BATCHES),
    "odd-none-all_gather",
    "odd-self_extend-ulysses",
    "checkpointed-self_extend-all_gather",
    "checkpointed-none-ulysses",
    "gpt2-none-all_gather",
    "bloom-alibi-all_gather",
    "few_keys-ulysses",
    "both-yarn-all_gather",
    "both-kerple-ulysses",
]
REFUSED = {
    "refused-heads": "OptionError: The attention heads cannot be shared out",
    "refused-mixing": "VerificationError: Split over processes, this model does not give its own outputs",
    "refused-own-alibi": "UnsupportedModelError: The model's attention cannot be split",
    "refused-dynamic": "UnsupportedModelError: rotary_emb chooses its frequencies by the longest position",
    "refused-call": "UsageError: A model that shares its sequences",
}
SHARDED = ["sharded-llama-yarn", "sharded-gemma2-kerple"]
LONG = [name for name in CASES if name.startswith("long-")]
SLOW = [name for name in CASES if name not in {*QUICK, *REFUSED, *SHARDED, *LONG, "autocast"}]

FOUR = [
    *(f"{family}-{method}-all_gather" for family in FAMILIES for method in ("none", "self_extend")),
    *(f"llama-{method}-{mode}" for method in ("alibi", "kerple") for mode in MODES),
    "odd-self_extend-all_gather",
    "padded-yarn-all_gather",
    "answer-alibi-ulysses",
]


def equal(found: dict[str, Any], share: float) -> bool:
    """The loss and the gradients of one process, by a slice and a few tokens of padding."""
    return found["loss"] <= CLOSE and found["gradient"] <= CLOSE and share <= found["held"] <= 1.1 * share


def as_one(found: dict[str, Any]) -> bool:
    """A sharded model's step and its checkpoint; of the weights a half, and a little for rows that cannot be halved."""
    close = found["gradient"] <= CLOSE and found["weights"] <= CLOSE
    return close and found["exact"] and 0.45 <= found["held"] <= 0.55


def wrong(results: dict[str, list[dict[str, Any]]], judge: Callable[[str, dict[str, Any]], bool]) -> dict[str, Any]:
    return {name: found for name, found in results.items() if not all(judge(name, one) for one in found)}


def test_two_processes(tmp_path: Path) -> None:
    """One test, so that one start of the processes serves all cases."""

    def judge(name: str, found: dict[str, Any]) -> bool:
        if "refused" in found or name in REFUSED:
            return str(found.get("refused")).startswith(REFUSED.get(name, "nothing"))
        if name == "autocast":
            return found == {}
        return as_one(found) if name in SHARDED else equal(found, 1 / 2)

    assert not wrong(run([*QUICK, *REFUSED, *SHARDED, "autocast"], tmp_path), judge)


@pytest.mark.slow
def test_all_families_methods_and_batches(tmp_path: Path) -> None:
    assert not wrong(run(SLOW, tmp_path), lambda _, found: equal(found, 1 / 2))


@pytest.mark.slow
def test_at_8k_tokens(tmp_path: Path) -> None:
    assert not wrong(run(LONG, tmp_path), lambda _, found: equal(found, 1 / 2))


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    assert not wrong(run(FOUR, tmp_path, size=4), lambda _, found: equal(found, 1 / 4))

"""The cache rule: the same tokens give the same logits, however they come.

One forward = chunks = token by token = padded on the left = beside a longer neighbour = greedy generation, for every
method of the attention seam on every family below, at three times the trained length.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import ropepatch
from ropepatch.testing import tiny_model

FAMILIES = (
    "llama",
    "qwen3",
    "gpt_neox",
    "gemma2",
    "gemma3_text",
    "cohere",
    "glm4",
    "phi3",
    "gpt_oss",
    "deepseek_v3",
    "olmo2",
    "smollm3",
    "gptj",
    "mixtral",
)

# Windows and chunks well inside the trained length of 64, so that every branch of a method is met.
OPTIONS: dict[str, dict[str, Any]] = {
    "alibi": {"factor": 2},
    "dca": {"chunk": 24, "largest": 40},
    "dynamic_longrope": {"factor": 3},
    "dynamic_ntk": {"factor": 2, "step": 16},
    "dynamic_yarn": {"step": 32},
    "fire": {},
    "kerple": {"form": "power"},
    "leaky_rerope": {"window": 20, "k": 4.0},
    "lm_infinite": {"window": 20, "sinks": 3},
    "logn": {},
    "nope": {"scale": 1.5, "logn": True},
    "rerope": {"window": 20, "logn": True},
    "sandwich": {},
    "self_extend": {"window": 16, "factor": 3},
    "streaming": {"sinks": 3, "window": 20},
    "string": {"shift": 24, "window": 10},
    "t5_bias": {"max_distance": 32},
}

TRAINED = 64
LENGTH, PADDING, SINGLES, NEW = 3 * TRAINED, 13, 8, 5
TOLERANCE = 2e-4

# Its table of angles ends at the trained length: only a patched one goes further.
ENDS_AT_TRAINED = {"gptj"}
# Carries a native scaling: methods start from the trained length below it.
SCALED = {"gpt_oss"}


def test_the_table_names_every_method_of_the_seam() -> None:
    """Of those that rotary models take; what is for ALiBi models only stands in tests/surgery/test_alibi.py."""
    methods = (method for method in ropepatch.methods() if "rotary" in method.mechanisms)
    assert set(OPTIONS) == {method.name for method in methods if method.seam == "attention"}


model_of = cache(tiny_model)


def patch(family: str, method: str) -> Any:
    model, options = model_of(family), dict(OPTIONS[method])
    if method == "dynamic_longrope":
        (planes,) = {site["rotary_dim"] // 2 for site in ropepatch.inspect(model).to_dict()["sites"]}
        options["short_factor"] = [1.0] * planes
        options["long_factor"] = [1.0 + 2 * plane / planes for plane in range(planes)]
    ropepatch.patch(model, method, on_scaled="replace" if family in SCALED else None, **options)
    assert ropepatch.inspect(model).trained_length == TRAINED
    return model


@torch.no_grad()
@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_give_the_same_logits(family: str, method: str) -> None:
    model = model_of(family)
    draw = random.Random(f"{family} {method}")
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    rows = torch.randint(10, 100, (2, LENGTH + PADDING), generator=generator)
    mask = torch.ones_like(rows)
    mask[0, :PADDING] = 0
    rows[0, :PADDING] = 0
    ids, neighbour = rows[:1, PADDING:], rows[1:]
    unpatched = ids[:, :TRAINED] if family in ENDS_AT_TRAINED else ids
    before = model(unpatched, use_cache=False).logits
    patch(family, method)
    try:
        whole, beside = model(ids, use_cache=False).logits, model(neighbour, use_cache=False).logits
        if family not in ENDS_AT_TRAINED:
            apart = distance(whole, before)
            assert apart > 10 * TOLERANCE, f"the method changes nothing ({apart:.1e})"
        ways = {"chunks and single tokens": in_parts(model, ids, cuts(draw, LENGTH))}
        together = model(rows, attention_mask=mask, use_cache=False).logits
        ways["padded on the left"], ways_beside = together[:1, PADDING:], {"beside a padded row": together[1:]}
        stated = (mask.cumsum(1) - 1).clamp(min=0)
        pieces = in_parts(model, rows, cuts(draw, LENGTH + PADDING), mask, stated)
        ways["padded, in parts, positions given"] = pieces[:1, PADDING:]
        ways_beside["beside a padded row, in parts, positions given"] = pieces[1:]
        for wanted, found in ((whole, ways), (beside, ways_beside)):
            for name, logits in found.items():
                apart = distance(logits, wanted)
                assert apart <= TOLERANCE, f"{name}: {apart:.1e}"
        generated = model.generate(rows, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
        assert_greedy(model, generated[:1, PADDING:])
        assert_greedy(model, generated[1:])
    finally:
        ropepatch.unpatch(model)
    assert torch.equal(model(unpatched, use_cache=False).logits, before)


def cuts(draw: random.Random, length: int) -> list[int]:
    """Where a sequence is cut: three chunks of any size, then single tokens."""
    chunks = sorted(draw.sample(range(1, length - SINGLES), 2))
    return [0, *chunks, *range(length - SINGLES, length + 1)]


def in_parts(
    model: Any, rows: Tensor, places: list[int], mask: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    past, parts = None, []
    for start, stop in pairwise(places):
        more = {} if mask is None else {"attention_mask": mask[:, :stop]}
        if positions is not None:
            more["position_ids"] = positions[:, start:stop]
        output = model(rows[:, start:stop], past_key_values=past, use_cache=True, **more)
        past = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


def assert_greedy(model: Any, ids: Tensor) -> None:
    """Each new token is the likeliest one by a single forward, but for ties within the tolerance."""
    logits = model(ids, use_cache=False).logits[0, -NEW - 1 : -1]
    if (end := model.generation_config.eos_token_id) is not None:
        logits[:, end] = -torch.inf  # min_new_tokens rules it out
    chosen = logits.gather(1, ids[0, -NEW:, None])[:, 0]
    assert bool((logits.amax(1) - chosen <= TOLERANCE * logits[torch.isfinite(logits)].abs().max()).all())


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())

"""Who sees whom in training batches, on real tiny models: across skips, between documents, on either kind of attention.

The oracle for skipped positions is the whole sequence: every position below the target has a token, and a mask of pairs
hides those that the short window skips.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import ropepatch
from ropepatch.errors import OptionError, RopepatchError, UnsupportedModelError, VerificationError
from ropepatch.testing import tiny_model
from ropepatch.training.positions import Collator, training_attention
from ropepatch.training.recipe import Recipe

TARGET, LENGTH = 128, 24
TOLERANCE = 2e-4
DOCUMENTS = [1] * 9 + [2] * 1 + [3] * 10 + [0] * 4

# Of both seams, small enough for every branch to be met within 128 tokens at a trained length of 64.
METHODS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "yarn": {"factor": 2},
    "abf": {"factor": 2},
    "self_extend": {"window": 16, "factor": 3},
    "dynamic_ntk": {"factor": 2, "step": 16},
    "dca": {"chunk": 24, "largest": 40},
    "alibi": {"factor": 2},
    "kerple": {},
    "logn": {},
}
ON_SEAM = {"self_extend", "dynamic_ntk", "dca", "alibi", "kerple", "logn"}


def recipe(*, isolate: bool = False, length: int = LENGTH, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "x"},
            "data": {"length": length, "sources": [{"kind": "files", "path": "x"}], "isolate_documents": isolate},
            "train": {"max_steps": 4, "batch_size": 1, **train},
        }
    )


POSE = {"kind": "pose", "target_length": TARGET}
RANDOM = {"kind": "random", "target_length": TARGET}


def model_of(family: str = "llama", method: str = "none") -> Any:
    model = tiny_model(family, hidden_size=32, num_attention_heads=4)
    options = METHODS[method]
    return model if options is None else ropepatch.patch(model, method, **options)


def row(documents: list[int], index: int = 0, seed: int = 0) -> dict[str, Any]:
    ids = torch.randint(5, 120, (len(documents),), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [token if number else -100 for token, number in zip(ids, documents, strict=True)]
    return {"input_ids": ids, "labels": labels, "documents": documents, "index": index}


def logits(model: Any, batch: dict[str, Tensor], **more: Any) -> Tensor:
    """In training no cache is made; with one, transformers never looks for packed documents."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        output: Tensor = model(**{"use_cache": False, **inputs, **more}).logits
    return output


def apart(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max())


def with_the_middle(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the batch's tokens within the whole sequence, the skipped positions filled and hidden."""
    positions = batch["position_ids"][0]
    total = int(positions[-1]) + 1
    ids = torch.randint(5, 120, (1, total), generator=torch.Generator().manual_seed(99))
    ids[0, positions] = batch["input_ids"][0]
    seen = torch.zeros(total, dtype=torch.bool)
    seen[positions] = True
    # What is skipped sees something too, itself, so that no row of the mask is empty.
    mask = (seen[None] | torch.eye(total, dtype=torch.bool)) & torch.ones(total, total, dtype=torch.bool).tril()
    with torch.no_grad():
        output: Tensor = model(ids, attention_mask=mask[None, None]).logits
    return output[:, positions]


@pytest.mark.parametrize("kind", ["pose", "random"])
@pytest.mark.parametrize("method", METHODS)
def test_a_short_window_equals_the_long_one_with_its_middle_hidden(method: str, kind: str) -> None:
    model = model_of(method=method)
    collate = Collator(recipe(positions={**POSE, "kind": kind}))
    for index in (0, 3):
        batch = collate([row([1] * LENGTH, index)])
        assert int(batch["position_ids"][0].diff().max()) > 1
        assert apart(logits(model, batch), with_the_middle(model, batch)) < TOLERANCE


@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "gpt2"])
def test_so_in_other_families(family: str) -> None:
    model = tiny_model(family, max_position_embeddings=TARGET)
    batch = Collator(recipe(positions=POSE))([row([1] * LENGTH, 3)])
    assert apart(logits(model, batch), with_the_middle(model, batch)) < TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_chunks_see_the_chunks_before_them(method: str) -> None:
    model, collate = model_of(method=method), Collator(recipe(positions={**POSE, "chunks": 3}))
    entry = row([1] * LENGTH, 2)
    batch = collate([entry])
    behind = int(batch["position_ids"][0].diff().argmax()) + 1
    changed = dict(batch, input_ids=batch["input_ids"].clone())
    changed["input_ids"][0, behind - 1] += 1
    difference = (logits(model, batch) - logits(model, changed))[0].abs().amax(-1)
    assert float(difference[: behind - 1].max()) == 0.0
    assert float(difference[behind]) > 1e-4


def test_the_trap_is_there_without_a_mask() -> None:
    """transformers takes a skip for a new document: what the mask of ones is for. If this fails, the trap is gone."""
    model, batch = model_of(), Collator(recipe(positions=POSE))([row([1] * LENGTH, 3)])
    without = {name: value for name, value in batch.items() if name != "attention_mask"}
    assert apart(logits(model, without), logits(model, batch)) > 100 * TOLERANCE


def test_another_trap_is_there_with_a_cache() -> None:
    """Resets isolate nothing in a call that fills a cache, as calls do by default; numbers do."""
    model, settings = model_of(), recipe(isolate=True)
    batch = Collator(settings)([row(DOCUMENTS)])
    wanted = logits(model, batch)
    assert apart(logits(model, batch, use_cache=True), wanted) > 100 * TOLERANCE
    with training_attention(model, settings) as numbered:
        batch = Collator(settings, numbered=numbered)([row(DOCUMENTS)])
        assert apart(logits(model, batch, use_cache=True)[:, :20], wanted[:, :20]) < TOLERANCE


def test_the_other_trap_is_there_with_a_mask_of_ones() -> None:
    """Packed documents leak under a mask of ones."""
    model, batch = model_of(), Collator(recipe(isolate=True))([row(DOCUMENTS)])
    leaking = dict(batch, attention_mask=torch.ones_like(batch["input_ids"]))
    assert apart(logits(model, leaking), logits(model, batch)) > 100 * TOLERANCE


def documents_alone(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of each document of DOCUMENTS in a call of its own, at the positions that it has in the batch."""
    parts, start = [], 0
    for size in (9, 1, 10):
        piece = {name: batch[name][:, start : start + size] for name in ("input_ids", "position_ids")}
        parts.append(logits(model, dict(piece, attention_mask=torch.ones_like(piece["input_ids"]))))
        start += size
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("skipped", [None, POSE, RANDOM], ids=["plain", "pose", "random"])
@pytest.mark.parametrize("method", METHODS)
def test_isolated_documents_are_as_if_alone(method: str, skipped: dict[str, Any] | None) -> None:
    model, settings = model_of(method=method), recipe(isolate=True, positions=skipped)
    with training_attention(model, settings) as numbered:
        assert numbered
        batch = Collator(settings, numbered=numbered)([row(DOCUMENTS, 1)])
        packed = logits(model, batch)[:, :20]
    assert apart(packed, documents_alone(model, batch)) < TOLERANCE


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gptj", "falcon", "deepseek_v3", "gpt_oss", "mixtral"])
def test_isolated_documents_of_other_families(family: str) -> None:
    """Softcaps, windows, tables, attention of their own, latent heads, sinks, experts."""
    model, settings = tiny_model(family), recipe(isolate=True)
    with training_attention(model, settings) as numbered:
        batch = Collator(settings, numbered=numbered)([row(DOCUMENTS)])
        packed = logits(model, batch)[:, :20]
    assert apart(packed, documents_alone(model, batch)) < TOLERANCE


@pytest.mark.parametrize("method", ["none", "yarn", "self_extend"])
def test_resets_isolate_too(method: str) -> None:
    """What a collator makes that was not told of numbers: right on either seam, and quadratic on plain attention."""
    model, settings = model_of(method=method), recipe(isolate=True)
    batch = Collator(settings)([row(DOCUMENTS)])
    assert apart(logits(model, batch)[:, :20], documents_alone(model, batch)) < TOLERANCE


def gradients(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def test_gradients_are_those_of_the_quadratic_mask() -> None:
    model, settings = model_of(method="yarn").train(), recipe(isolate=True)
    rows = [row(DOCUMENTS), row([1] * 20 + [2] * 4, 1, seed=1)]
    wanted = gradients(model, Collator(settings)(rows))
    with training_attention(model, settings) as numbered:
        batch = Collator(settings, numbered=numbered)(rows)
        got = gradients(model, batch)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        again = gradients(model, batch)
    for ours, kept, theirs in zip(got, again, wanted, strict=True):
        assert apart(ours, theirs) < TOLERANCE
        assert torch.equal(ours, kept)


def no_matrix(*_: Any, **__: Any) -> Any:
    raise AssertionError("a mask of tokens x tokens was made")


def test_no_quadratic_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    model, settings = model_of(), recipe(isolate=True)
    with training_attention(model, settings) as numbered:
        batch = Collator(settings, numbered=numbered)([row(DOCUMENTS)])
        for name in ("sdpa_mask", "eager_mask"):
            monkeypatch.setattr(masking_utils, name, no_matrix)
        monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", no_matrix)
        logits(model, batch)
    with pytest.raises(AssertionError, match="tokens x tokens"):
        logits(model, Collator(settings)([row(DOCUMENTS)]))


@pytest.mark.parametrize("method", ["none", "yarn", "self_extend"])
@pytest.mark.parametrize("settings", [{"isolate": True}, {"shifted_groups": {"group": 8}}], ids=["isolate", "groups"])
def test_the_model_is_restored_to_the_bit(method: str, settings: dict[str, Any]) -> None:
    model = model_of(method=method)
    batch = {"input_ids": torch.arange(5, 45)[None]}
    config, before = model.config.to_dict(), logits(model, batch)
    way, keys = model.config._attn_implementation, set(model.state_dict())
    names = {name: set(vars(module)) for name, module in model.named_modules()}
    with training_attention(model, recipe(**settings)):
        assert model.config._attn_implementation == "ropepatch"
        assert set(model.state_dict()) == keys
    assert model.config._attn_implementation == way
    assert model.config.to_dict() == config
    assert {name: set(vars(module)) for name, module in model.named_modules()} == names
    assert torch.equal(logits(model, batch), before)


def test_it_is_restored_after_an_error() -> None:
    model = model_of()
    with pytest.raises(KeyError), training_attention(model, recipe(isolate=True)):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_nothing_is_done_where_nothing_is_asked_for() -> None:
    model = model_of()
    with training_attention(model, recipe(positions=POSE)) as numbered:
        assert not numbered
        assert model.config._attn_implementation == "sdpa"
    with training_attention(model_of(method="self_extend"), recipe()) as numbered:
        assert numbered


def test_an_adapted_model() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model_of(method="yarn"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    settings = recipe(isolate=True, positions=POSE)
    with training_attention(model, settings) as numbered:
        batch = Collator(settings, numbered=numbered)([row(DOCUMENTS, 1)])
        packed = logits(model, batch)[:, :20]
    assert apart(packed, documents_alone(model, batch)) < TOLERANCE


@pytest.mark.parametrize(
    ("model", "settings", "error", "named"),
    [
        (partial(tiny_model, "bloom"), {"isolate": True}, UnsupportedModelError, "isolate_documents"),
        (partial(tiny_model, "bloom"), {"positions": POSE}, UnsupportedModelError, "change nothing"),
        (partial(tiny_model, "jamba"), {"isolate": True}, VerificationError, "not kept apart"),
        (partial(model_of, method="none"), {"shifted_groups": {"group": 1}}, OptionError, "half"),
    ],
    ids=["no positions", "positions unread", "recurrent", "no half"],
)
def test_what_a_model_cannot_do_is_refused(
    model: Any, settings: dict[str, Any], error: type[RopepatchError], named: str
) -> None:
    live = model()
    before = {name: set(vars(module)) for name, module in live.named_modules()}
    with pytest.raises(error, match=named), training_attention(live, recipe(**settings)):
        raise AssertionError("the block was entered")
    assert {name: set(vars(module)) for name, module in live.named_modules()} == before


def test_a_target_beyond_the_patch_is_refused() -> None:
    model = model_of(method="yarn")
    assert ropepatch.inspect(model).target_length == TARGET
    beyond = {**POSE, "target_length": TARGET + 1}
    with pytest.raises(OptionError, match="beyond what the patch reaches"):
        training_attention(model, recipe(positions=beyond)).__enter__()
    # Stages may raise the factor later; a method of the attention seam has no such limit; a bare model is asked itself.
    patch = {"method": "yarn", "options": {"factor": 2.0}}
    stages = [{"steps": 1, "length": LENGTH}, {"steps": 3, "length": LENGTH, "options": {"factor": 4.0}}]
    staged = Recipe.model_validate({**recipe(positions=beyond, stages=stages).model_dump(), "patch": patch})
    for live, settings in (
        (model, staged),
        (model_of(method="alibi"), recipe(positions=beyond)),
        (model_of(), recipe(positions=beyond)),
    ):
        with training_attention(live, settings):
            pass


def test_a_target_beyond_the_models_table_is_refused() -> None:
    model = tiny_model("gpt2", max_position_embeddings=64)
    for target, fits in ((64, True), (65, False)):
        settings = recipe(positions={"kind": "pose", "target_length": target})
        if fits:
            with training_attention(model, settings):
                pass
        else:
            with pytest.raises(OptionError, match="positions that the model has"):
                training_attention(model, settings).__enter__()


def test_positions_without_effect_are_refused() -> None:
    model = ropepatch.patch(model_of(), "nope")
    with (
        pytest.raises(UnsupportedModelError, match="change nothing"),
        training_attention(model, recipe(positions=POSE)),
    ):
        raise AssertionError("the block was entered")


@pytest.mark.parametrize("method", ["none", "yarn", "self_extend", "dynamic_ntk"])
def test_a_half_precision_is_judged_as_well(method: str) -> None:
    model = model_of(method=method).bfloat16()
    for settings in (recipe(isolate=True), recipe(positions=POSE), recipe(isolate=True, positions=POSE)):
        with training_attention(model, settings):
            pass


def test_an_alibi_model_reads_numbers_once_patched() -> None:
    model, settings = ropepatch.patch(tiny_model("bloom"), "alibi"), recipe(isolate=True)
    with training_attention(model, settings) as numbered:
        batch = Collator(settings, numbered=numbered)([row(DOCUMENTS)])
        packed = logits(model, batch)[:, :20]
    assert apart(packed, documents_alone(model, batch)) < TOLERANCE

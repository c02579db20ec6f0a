"""The loss of real model classes against the loss that they compute themselves: value and every gradient."""

from __future__ import annotations

import importlib.util
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import ropepatch
from ropepatch.errors import DependencyError, OptionError, PromptError, UnsupportedModelError, VerificationError
from ropepatch.testing import model_types, tiny_model
from ropepatch.training.loss import causal_loss, check, choose_backend
from ropepatch.training.loss.head import logit_rule


def make_batch(model: Any, rows: int = 2, length: int = 11, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(0, size, (rows, length), generator=generator)
    labels = ids.clone()
    labels[torch.rand(rows, length, generator=generator) < 0.3] = -100
    return {"input_ids": ids, "labels": labels}


def count(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The gradients, taken from the model."""
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def own(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's loss; from its logits where they are float64, since the models themselves round them to float32."""
    output = model(**batch)
    loss = output.loss
    if output.logits.dtype == torch.float64:
        loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    loss.backward()
    return loss.detach(), trained(model)


def ours(model: Any, batch: dict[str, Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    loss = causal_loss(model, batch, **{"tokens": count(batch), "chunk": 4, **options})
    loss.backward()
    return loss.detach(), trained(model)


def assert_same(model: Any, batch: dict[str, Tensor], *, tolerance: float = 1e-9, **options: Any) -> None:
    check(model)
    theirs, expected = own(model, batch)
    value, found = ours(model, batch, **options)
    torch.testing.assert_close(value.double(), theirs.double(), rtol=max(tolerance, 1e-6), atol=0)
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: n + m)


FAMILIES = {
    "llama": {},  # head apart from the embedding
    "gpt2": {},  # tied
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 5.0},
    "phi": {},  # a bias in the head
    "gpt_neox": {},  # a head of another name
    "opt": {},
    "falcon_h1": {"lm_head_multiplier": 0.37},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["chunked", "plain"])
def test_families(family: str, backend: str) -> None:
    model = tiny_model(family, **FAMILIES[family]).double()
    assert_same(model, make_batch(model), tolerance=1e-8 if backend == "chunked" else 1e-5, backend=backend)


def test_what_follows_the_head_is_measured() -> None:
    assert logit_rule(tiny_model("llama")).scale == 1.0
    assert logit_rule(tiny_model("llama")).softcap is None
    rule = logit_rule(tiny_model("gemma2", final_logit_softcapping=7.5))
    assert (rule.scale, rule.softcap) == (1.0, pytest.approx(7.5, rel=1e-6))
    assert logit_rule(tiny_model("granite", logits_scaling=8.0)).scale == pytest.approx(0.125, rel=1e-6)
    assert logit_rule(tiny_model("cohere", logit_scale=0.0625).bfloat16()).scale == pytest.approx(0.0625, rel=1e-6)


@pytest.mark.parametrize("backend", ["chunked", "plain"])
def test_mixture_of_experts(backend: str) -> None:
    model = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    batch = make_batch(model)
    assert_same(model, batch, tolerance=1e-5, backend=backend)
    without = tiny_model("mixtral")
    assert float(ours(without, batch)[0]) < float(ours(model, batch)[0]) - 0.1
    # Its share of the tokens.
    half, _ = ours(model, batch, tokens=2 * count(batch), backend=backend)
    torch.testing.assert_close(2 * half, ours(model, batch, backend=backend)[0])


def lora(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft", reason="needs peft")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=False, **options))
    return adapted


ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "adapter on the head": {"target_modules": ["q_proj", "lm_head"]},
    "DoRA on the head": {"target_modules": ["lm_head"], "use_dora": True},
    "head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters(adapter: str) -> None:
    model = lora(tiny_model("llama").double(), **ADAPTERS[adapter])
    assert_same(model, make_batch(model), tolerance=1e-8)


def test_tied_embeddings_trained_whole() -> None:
    base = tiny_model("llama", tie_word_embeddings=True).double()
    model = lora(base, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert_same(model, make_batch(model), tolerance=1e-8)


def test_dropout_on_the_head_draws_a_mask_once_per_token() -> None:
    # Gradients of the same draw: with a loss that projected twice they would belong to another mask.
    model = lora(tiny_model("llama").double(), target_modules=["lm_head"], lora_dropout=0.5).train()
    batch, step = make_batch(model), 1e-6
    torch.manual_seed(3)
    ours_value, gradient = ours(model, batch, chunk=100)
    name, weight = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        weight[2, 1] += step
    torch.manual_seed(3)
    moved, _ = ours(model, batch, chunk=100)
    assert float((moved - ours_value) / step) == pytest.approx(float(gradient[name][2, 1]), rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("trained_head", [False, True])
def test_autocast(trained_head: bool) -> None:
    whole = ["lm_head"] if trained_head else None
    model = lora(tiny_model("llama"), target_modules=["q_proj"], modules_to_save=whole)
    batch = make_batch(model, rows=4, length=32)
    with torch.autocast("cpu", torch.bfloat16):
        check(model)
        theirs, expected = own(model, batch)
        value, found = ours(model, batch)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, theirs, rtol=2e-3, atol=0)
    for name, gradient in expected.items():
        off = (found[name] - gradient).norm() / gradient.norm()
        assert float(off) < 3e-2, name


def test_bfloat16_weights() -> None:
    model = tiny_model("llama").bfloat16()
    batch = make_batch(model, rows=4, length=32)
    check(model)
    exact = tiny_model("llama").bfloat16().double()
    truth, expected = own(exact, batch)
    value, found = ours(model, batch)
    torch.testing.assert_close(value.double(), truth, rtol=5e-3, atol=0)
    assert found["lm_head.weight"].dtype == torch.bfloat16
    assert float((found["lm_head.weight"].double() - expected["lm_head.weight"]).norm()) < 2e-2 * float(
        expected["lm_head.weight"].norm()
    )


def test_activation_checkpointing_and_accumulation() -> None:
    model = tiny_model("llama").double().train()
    batch = make_batch(model, rows=4)
    _, expected = own(model, batch)
    model.gradient_checkpointing_enable()
    # Rows of different numbers of labels: means of means would be something else.
    pieces = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(4)]
    assert len({count(piece) for piece in pieces}) > 1
    for piece in pieces:
        causal_loss(model, piece, tokens=torch.tensor(count(batch)), chunk=3).backward()
    for name, gradient in trained(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("backend", ["chunked", "plain"])
def test_labels_that_are_shifted_already(backend: str) -> None:
    model = tiny_model("llama").double()
    batch = make_batch(model)
    shifted = torch.cat((batch["labels"][:, 1:], torch.full((2, 1), -100)), 1)
    value, found = ours(model, batch)
    again = causal_loss(
        model, {"input_ids": batch["input_ids"], "shifted_labels": shifted}, tokens=count(batch), backend=backend
    )
    again.backward()
    torch.testing.assert_close(again.detach().double(), value.double(), rtol=1e-6, atol=0)
    for name, gradient in trained(model).items():
        torch.testing.assert_close(gradient, found[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["yarn", "self_extend"])
def test_patched_models_with_positions_and_a_mask(method: str) -> None:
    model = ropepatch.patch(tiny_model("llama"), method, factor=2)
    batch = make_batch(model)
    batch["position_ids"] = torch.arange(11).expand(2, -1) + 3
    batch["attention_mask"] = torch.ones(2, 11, dtype=torch.long)
    assert_same(model, batch, tolerance=1e-5)
    ropepatch.unpatch(model)


@pytest.mark.parametrize("backend", ["chunked", "plain"])
def test_a_part_of_a_step_without_labels_is_a_zero_that_can_be_differentiated(backend: str) -> None:
    model = tiny_model("mixtral", output_router_logits=True)
    batch = make_batch(model)
    batch["labels"][:] = -100
    value, found = ours(model, batch, tokens=5, backend=backend)
    assert float(value) == 0
    assert found and not any(gradient.any() for gradient in found.values())


def test_a_step_without_labels_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(PromptError, match="(?i)no token of this step has a label"):
        causal_loss(model, make_batch(model), tokens=0)


def test_bad_arguments() -> None:
    model = tiny_model("llama")
    batch = make_batch(model)
    with pytest.raises(OptionError, match="(?i)one kind of labels"):
        causal_loss(model, {**batch, "shifted_labels": batch["labels"]}, tokens=1)
    with pytest.raises(OptionError, match="(?i)one kind of labels"):
        causal_loss(model, {"input_ids": batch["input_ids"]}, tokens=1)
    with pytest.raises(OptionError, match="(?i)unknown loss"):
        causal_loss(model, batch, tokens=1, backend="auto")


def test_nothing_is_left_on_the_model() -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state(), random.getstate()
    check(model)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError):  # a label outside the vocabulary
        causal_loss(model, {**make_batch(model), "labels": torch.full((2, 11), 10**6)}, tokens=1)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model(**make_batch(model)).logits.shape == (2, 11, model.config.vocab_size)


@pytest.mark.parametrize("family", ["bart", "prophetnet"])
def test_a_model_whose_own_loss_is_another_is_refused(family: str) -> None:
    # bart's decoder does not shift its labels; prophetnet predicts several tokens at each.
    with pytest.raises(VerificationError, match="loss: plain"):
        check(tiny_model(family))


@pytest.mark.slow
def test_every_causal_model_type_is_right_or_refused() -> None:
    refused = []
    for kind in model_types():
        try:
            model = tiny_model(kind)
            check(model)
        except (UnsupportedModelError, VerificationError):
            refused.append(kind)
            continue
        if kind == "reformer":  # it takes gradients in training mode only, where it draws random numbers
            continue
        batch = make_batch(model)
        _, expected = ours(model, batch, backend="plain")
        _, found = ours(model, batch)
        whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        for name, gradient in expected.items():
            off = (found.get(name, torch.zeros_like(gradient)) - gradient).norm() / whole
            assert float(off) < 1e-4, f"{kind}, {name}"
    assert len(refused) < 25, refused


def test_the_way_out_is_the_models_own_loss() -> None:
    model = tiny_model("bart")
    batch = make_batch(model)
    torch.testing.assert_close(ours(model, batch, backend="plain")[0], own(model, batch)[0])
    check(model, backend="plain")


def test_choice_of_a_backend() -> None:
    model = tiny_model("llama")
    assert choose_backend("auto", model) == "chunked"
    assert choose_backend("plain", model) == "plain"
    headless = model.model
    assert choose_backend("auto", headless) == "plain"
    with pytest.raises(UnsupportedModelError, match="(?i)which module makes its logits"):
        causal_loss(headless, make_batch(model), tokens=1)
    for name in ("liger", "cce"):
        with pytest.raises(OptionError, match="CUDA"):
            choose_backend(name, model)
    with pytest.raises(OptionError, match="(?i)unknown loss"):
        choose_backend("fused", model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["liger", "cce"])
def test_fused_kernels(name: str) -> None:
    model = tiny_model("gemma2", hidden_size=64).cuda().bfloat16()
    if importlib.util.find_spec({"liger": "liger_kernel", "cce": "cut_cross_entropy"}[name]) is None:
        with pytest.raises(DependencyError, match="pip install"):
            choose_backend(name, model)
        pytest.skip(f"needs the package of {name}")
    assert choose_backend(name, model) == name
    check(model, backend=name)
    batch = {key: value.cuda() for key, value in make_batch(model, rows=4, length=32).items()}
    theirs, expected = own(model, batch)
    value, found = ours(model, batch, backend=name)
    torch.testing.assert_close(value, theirs.float(), rtol=1e-2, atol=0)
    for parameter, gradient in expected.items():
        off = (found[parameter] - gradient).float().norm() / gradient.float().norm().clamp_min(1e-6)
        assert float(off) < 5e-2, parameter

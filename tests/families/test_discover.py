"""What inspect says of each architecture: the mechanism, where it sits, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ropepatch
from ropepatch.families import discover
from ropepatch.families._tables import is_sinusoidal
from ropepatch.testing import model_types, tiny_model

MECHANISMS = [
    ("llama", "causal-lm", "rotary"),
    ("gemma3_text", "causal-lm", "rotary"),
    ("gptj", "causal-lm", "rotary"),
    ("codegen", "causal-lm", "rotary"),
    ("deepseek_v2", "causal-lm", "rotary"),
    ("llama4_text", "causal-lm", "rotary"),
    ("falcon", "causal-lm", "rotary"),
    ("bloom", "causal-lm", "alibi"),
    ("mpt", "causal-lm", "alibi"),
    ("gpt2", "causal-lm", "learned"),
    ("opt", "causal-lm", "learned"),
    ("openai-gpt", "causal-lm", "learned"),
    ("xglm", "causal-lm", "sinusoidal"),
    ("ctrl", "causal-lm", "sinusoidal"),
    ("xlnet", "causal-lm", "relative_bias"),
    ("inkling_text", "causal-lm", "relative_bias"),
    ("mamba", "causal-lm", "none"),
    ("rwkv", "causal-lm", "none"),
    ("bert", "encoder", "learned"),
    ("reformer", "encoder", "learned"),
    ("mpnet", "encoder", "learned+relative_bias"),
    ("roformer", "encoder", "rotary"),
    ("modernbert", "encoder", "rotary"),
    ("bart", "encoder-decoder", "learned"),
    ("marian", "encoder-decoder", "sinusoidal"),
    ("pegasus_x", "encoder-decoder", "sinusoidal"),
    ("t5", "encoder-decoder", "relative_bias"),
    ("t5gemma", "encoder-decoder", "rotary"),
]


@pytest.mark.parametrize(("family", "kind", "mechanism"), MECHANISMS)
def test_inspect_names_the_mechanism(family: str, kind: str, mechanism: str) -> None:
    report = ropepatch.inspect(tiny_model(family, kind))
    assert report.mechanism == mechanism
    assert report.method is None
    assert report.model_type == family
    assert report.sites


def test_falcon_with_alibi_is_not_rotary() -> None:
    assert ropepatch.inspect(tiny_model("falcon", alibi=True)).mechanism == "alibi"


@pytest.mark.parametrize("kind", ["causal-lm", "encoder", "encoder-decoder"])
@pytest.mark.slow
def test_inspect_works_on_every_model_type(kind: str) -> None:
    seen = 0
    for family in model_types(kind):
        try:
            model = tiny_model(family, kind)
        except ropepatch.UnsupportedModelError:
            continue  # what cannot be built is listed, with its reason, by scripts/support_matrix.py
        assert str(ropepatch.inspect(model)), family
        seen += 1
    assert seen >= {"causal-lm": 180, "encoder": 45, "encoder-decoder": 25}[kind]


def test_only_the_text_part_of_a_multimodal_model_is_changed() -> None:
    model = tiny_model("gemma3")
    parts = {site.part for site in discover(model)}
    assert parts == {"text", "vision"}
    other = {site.path: model.get_submodule(site.path) for site in discover(model) if site.part != "text"}
    before = {path: {k: v.clone() for k, v in module.state_dict().items()} for path, module in other.items()}
    ropepatch.patch(model, "linear", factor=2)
    for path, module in other.items():
        assert all(torch.equal(value, before[path][key]) for key, value in module.state_dict().items())


def test_an_unused_rotary_module_is_not_counted() -> None:
    sites = discover(tiny_model("granite_swa"))
    assert {site.path for site in sites} == {"model.rotary_embs.0"}


def test_a_model_that_recomputes_its_frequencies_is_refused_with_the_reason() -> None:
    with pytest.raises(ropepatch.UnsupportedModelError, match="every forward"):
        ropepatch.patch(tiny_model("phimoe"), "linear", factor=2)


def test_wrappers_are_seen_through_and_ambiguity_is_refused() -> None:
    model = tiny_model("llama")

    class Wrapper(nn.Module):
        def __init__(self, *models: nn.Module) -> None:
            super().__init__()
            self.models = nn.ModuleList(models)

    wrapped = Wrapper(model)
    assert ropepatch.patch(wrapped, "linear", factor=2) is wrapped
    assert ropepatch.inspect(model).method == "linear"
    ropepatch.unpatch(wrapped)
    with pytest.raises(ropepatch.UnsupportedModelError, match="several"):
        ropepatch.patch(Wrapper(model, tiny_model("gpt2")), "linear", factor=2)


def test_a_part_patched_by_itself_blocks_the_whole() -> None:
    model = tiny_model("llama")
    ropepatch.patch(model.model, "linear", factor=2)
    with pytest.raises(ropepatch.AlreadyPatchedError, match="model"):
        ropepatch.patch(model, "yarn", factor=2)
    ropepatch.unpatch(model)
    assert ropepatch.inspect(model).method is None


def test_sinusoidal_tables_are_told_from_learned_ones() -> None:
    angles = torch.arange(50.0)[:, None] * 10000 ** (-torch.arange(0, 32, 2) / 32)
    halves = torch.cat((angles.sin(), angles.cos()), dim=1)
    pairs = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(1)
    assert is_sinusoidal(halves)
    assert is_sinusoidal(pairs)
    assert is_sinusoidal(torch.cat((torch.zeros(2, 32), halves)))
    assert not is_sinusoidal(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)))
    assert not is_sinusoidal(torch.zeros(50, 32))

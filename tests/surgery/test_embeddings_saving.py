"""Models with a longer table, saved and loaded: with us patched and undoable, else a longer model or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import ropepatch
from ropepatch.errors import ModelLoadError, RopepatchError, UnsupportedModelError
from ropepatch.sidecar import FILE
from ropepatch.testing import forward_logits, tiny_inputs, tiny_model

KINDS = {
    "bert": "encoder",
    "roberta": "encoder",
    "gpt2": "causal-lm",
    "gpt_neo": "causal-lm",
    "opt": "causal-lm",
    "bart": "encoder-decoder",
    "mpnet": "encoder",
    "deberta-v2": "encoder",
    "marian": "encoder-decoder",
    "m2m_100": "encoder-decoder",
}
# Plain transformers computes these tables (or biases) from the config.
COMPUTED = ("marian", "m2m_100")
BIASED = ("mpnet", "deberta-v2")


def build(kind: str) -> Any:
    return tiny_model(kind, KINDS[kind])


def logits(model: Any, length: int) -> torch.Tensor:
    return forward_logits(model, **tiny_inputs(model, length=length))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["linear", "sinusoidal"])
def test_saved_loaded_undone(kind: str, method: str, tmp_path: Path) -> None:
    model = build(kind)
    before = logits(model, 50)
    ropepatch.patch(model, method, factor=4)
    wanted = logits(model, 200)
    ropepatch.save_pretrained(model, tmp_path)
    again = ropepatch.from_pretrained(tmp_path)
    assert logits(again, 200).equal(wanted)
    assert ropepatch.inspect(again).to_dict() == ropepatch.inspect(model).to_dict()
    assert logits(ropepatch.unpatch(again), 50).equal(before)
    native = getattr(transformers, type(model).__name__)
    if method == "linear" and kind in (*COMPUTED, *BIASED):
        with pytest.raises(ValueError, match="ropepatch"):
            native.from_pretrained(tmp_path)
    else:
        # float32 angles, as the model computes them, and ours
        torch.testing.assert_close(logits(native.from_pretrained(tmp_path), 200), wanted, rtol=0, atol=2e-5)


def test_a_table_trained_after_the_patch_is_the_one_that_comes_back(tmp_path: Path) -> None:
    model = build("gpt2")
    old = model.transformer.wpe.weight.detach().clone()
    ropepatch.patch(model, "linear", factor=2)
    with torch.no_grad():
        model.transformer.wpe.weight.add_(1.0)
    wanted = logits(model, 100)
    ropepatch.save_pretrained(model, tmp_path)
    again = ropepatch.from_pretrained(tmp_path)
    assert logits(again, 100).equal(wanted)
    assert ropepatch.unpatch(again).transformer.wpe.weight.equal(old)


def test_a_plain_save_loads_as_the_longer_model_that_it_is(tmp_path: Path) -> None:
    model = ropepatch.patch(build("bert"), "hierarchical", factor=4)
    wanted = logits(model, 200)
    model.save_pretrained(tmp_path)
    again = ropepatch.from_pretrained(tmp_path)
    assert logits(again, 200).equal(wanted)
    found = ropepatch.inspect(again)
    assert (found.method, found.trained_length) == (None, 256)


def test_a_plain_save_without_half_of_its_patch_is_refused(tmp_path: Path) -> None:
    ropepatch.patch(build("mpnet"), "linear", factor=4).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"another shape.*save with ropepatch\.save_pretrained"):
        ropepatch.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "roberta", "bart"])
def test_an_exported_table_is_a_plain_table(kind: str, tmp_path: Path) -> None:
    model = ropepatch.patch(build(kind), "linear", factor=4, interpolation="cubic")
    wanted = logits(model, 200)
    exported = ropepatch.export(model, tmp_path)
    assert exported.target_length == ropepatch.inspect(model).target_length and exported.hf_overrides is None
    assert not (tmp_path / FILE).exists()
    plain = getattr(transformers, type(model).__name__).from_pretrained(tmp_path)
    assert "ropepatch" not in plain.config.to_dict()
    assert logits(plain, 200).equal(wanted)


@pytest.mark.parametrize("kind", [*COMPUTED, *BIASED])
def test_what_no_config_says_is_not_exported(kind: str, tmp_path: Path) -> None:
    model = ropepatch.patch(build(kind), "linear", factor=4)
    with pytest.raises(UnsupportedModelError, match="no config can say|No config can say"):
        ropepatch.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_brings_the_patch_of_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    base = build("gpt2")
    base.save_pretrained(tmp_path / "base")
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    ropepatch.patch(base, "linear", factor=2)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    ropepatch.save_pretrained(adapted, tmp_path / "adapter")
    again = ropepatch.from_pretrained(tmp_path / "adapter")
    assert logits(again, 100).equal(logits(adapted.eval(), 100))


def test_a_kept_table_of_another_shape_is_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    ropepatch.save_pretrained(ropepatch.patch(build("bert"), "linear", factor=2), tmp_path)
    file = tmp_path / "ropepatch.safetensors"
    save_file({name: value[:5].contiguous() for name, value in load_file(file).items()}, file)
    with pytest.raises(RopepatchError, match="another shape"):
        ropepatch.from_pretrained(tmp_path)

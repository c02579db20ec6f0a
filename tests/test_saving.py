"""Save and reload: the same logits bit for bit, nothing lost by those who never call us, nothing hostile taken in."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import ropepatch
from ropepatch.errors import ModelLoadError, OutputError, RecordError, RopepatchError, UnknownNameError, UsageError
from ropepatch.testing.tiny import tiny_model

IDS = torch.arange(150).mul(7).remainder(128)[None]
PLANES = [1.0 + i / 4 for i in range(8)]
LISTS = {"short_factor": PLANES, "long_factor": [2 * x for x in PLANES], "factor": 4.0}
OPTIONS: dict[str, dict[str, Any]] = {
    **{
        name: {"factor": 4} for name in ("linear", "ntk", "ntk_by_parts", "yarn", "llama3", "abf", "truncated", "power")
    },
    **{name: {"factor": 4} for name in ("mrrope", "resonance", "self_extend", "leaky_rerope")},
    "proportional": {"partial_rotary_factor": 0.5},
    "longrope": LISTS,
    "dynamic_longrope": LISTS,
}
# What plain transformers must then say of a folder that it cannot load rightly.
REFUSAL = r"ropepatch\.from_pretrained"


def options(method: str) -> dict[str, Any]:
    return OPTIONS.get(method, {})


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.remainder(model.config.get_text_config().vocab_size)).logits


def disturb(model: Any) -> None:
    """Give what a patch learns values of its own."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "ropepatch_bias" in name:
            parameter.data.add_(torch.rand_like(parameter))


def patched(method: str, model_type: str = "llama", **keywords: Any) -> Any:
    model = tiny_model(model_type)
    ropepatch.patch(model, method, **options(method), **keywords)
    disturb(model)
    return model.eval()


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def skip_unless_savable(model: Any) -> None:
    try:
        model.config.validate()
    except KeyError as error:
        pytest.skip(f"needs a transformers that can save scalings per layer type ({error} is looked for at the top)")


METHODS = [
    info.name
    for info in ropepatch.methods()
    if info.seam in ("frequencies", "attention") and "rotary" in info.mechanisms
]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_comes_back_bit_for_bit(tmp_path: Path, method: str) -> None:
    model = patched(method)
    wanted, record = logits(model), ropepatch.record_of(model)
    ropepatch.save_pretrained(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "plain")
    for folder in ("ours", "plain"):
        again = ropepatch.from_pretrained(tmp_path / folder)
        assert torch.equal(logits(again), wanted)
        assert ropepatch.record_of(again) == record
        # As good as the original: undone, it is the model before the patch.
        ropepatch.unpatch(again)
        assert torch.equal(logits(again), logits(tiny_model("llama")))
        if model.config.ropepatch and ropepatch.record_of(model)["seam"] == "attention":
            with pytest.raises(ValueError, match=REFUSAL):
                plain(tmp_path / folder)
        else:
            torch.testing.assert_close(logits(plain(tmp_path / folder)), wanted, atol=5e-5, rtol=0)


FAMILIES = {
    "gemma3_text": ("yarn", "self_extend"),
    "phi3": ("linear", "alibi"),
    "gpt_neox": ("ntk", "kerple"),
    "gptj": ("dca",),
    "deepseek_v3": ("yarn", "rerope"),
    "gpt_oss": ("streaming",),
    "bloom": ("linear", "kerple"),
    "falcon": ("nope",),
}


@pytest.mark.parametrize(
    ("model_type", "method"), [(kind, method) for kind, all_ in FAMILIES.items() for method in all_]
)
def test_families(tmp_path: Path, model_type: str, method: str) -> None:
    keywords = {"on_scaled": "replace"} if model_type == "gpt_oss" else {}
    model = patched(method, model_type, **keywords)
    skip_unless_savable(model)
    ropepatch.save_pretrained(model, tmp_path)
    assert torch.equal(logits(ropepatch.from_pretrained(tmp_path)), logits(model))


def test_composition_and_selection_come_back(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    ropepatch.patch(model, "self_extend", factor=2, logn=True, base={"method": "yarn", "factor": 2}, layers=[0, 2])
    ropepatch.save_pretrained(model, tmp_path)
    again = ropepatch.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert ropepatch.record_of(again) == ropepatch.record_of(model)


def test_an_unpatched_model_is_saved_and_loaded_plainly(tmp_path: Path) -> None:
    model = patched("self_extend")
    ropepatch.save_pretrained(model, tmp_path)
    ropepatch.unpatch(model)
    ropepatch.save_pretrained(model, tmp_path)
    assert not (tmp_path / "ropepatch.json").exists()
    assert "ropepatch" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits(plain(tmp_path)), logits(model))
    assert ropepatch.record_of(ropepatch.from_pretrained(tmp_path)) is None


def test_load_model_brings_the_patch_back(tmp_path: Path, tiny_model_folder: Path) -> None:
    """So every verb takes a saved patched model by its folder."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = ropepatch.load_model(tiny_model_folder, dtype="float32")
    ropepatch.patch(model, "self_extend", factor=4)
    ropepatch.save_pretrained(model, tmp_path / "whole", tokenizer=tokenizer)
    again, words = ropepatch.load_model(tmp_path / "whole", dtype="float32")
    assert torch.equal(logits(again), logits(model))
    assert words("The pass key").input_ids == tokenizer("The pass key").input_ids
    adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)).eval()
    ropepatch.save_pretrained(adapter, tmp_path / "adapter")
    again, words = ropepatch.load_model(tmp_path / "adapter", dtype="float32")
    assert torch.equal(logits(again), logits(adapter))
    assert words("The pass key").input_ids == tokenizer("The pass key").input_ids


def test_a_copy_is_saved_as_well_as_the_original(tmp_path: Path) -> None:
    model = copy.deepcopy(patched("fire"))
    ropepatch.save_pretrained(model, tmp_path)
    assert torch.equal(logits(ropepatch.from_pretrained(tmp_path)), logits(model))
    model.save_pretrained(tmp_path / "plain")
    assert torch.equal(logits(ropepatch.from_pretrained(tmp_path / "plain")), logits(model))


def test_shards_and_dtype(tmp_path: Path) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    ropepatch.patch(model, "kerple")
    disturb(model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = ropepatch.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))


def test_the_model_card_says_what_was_done(tmp_path: Path) -> None:
    """Once, however often it is saved, and beside what others wrote."""
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    for method, more in (("linear", "outdated"), ("yarn", "| length | accuracy |")):
        ropepatch.save_pretrained(patched(method), tmp_path, card=more)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n# Mine\n")
    assert card.count("## Long context") == 1
    for words in ("method `yarn`", '"factor": 4.0', "Trained length 64 tokens, target length 256 tokens", more):
        assert words in card
    assert "linear" not in card
    assert "outdated" not in card
    assert torch.equal(logits(ropepatch.from_pretrained(tmp_path)), logits(patched("yarn")))


# -- adapters


def adapted(base: Path, method: str, order: str) -> Any:
    from peft import LoraConfig, get_peft_model

    model = plain(base)
    if order == "patch first":
        ropepatch.patch(model, method, **options(method))
    adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    if order == "adapter first":
        ropepatch.patch(adapter, method, **options(method))
    disturb(adapter)
    return adapter.eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("saver", ["ours", "peft's"])
@pytest.mark.parametrize("order", ["patch first", "adapter first"])
@pytest.mark.parametrize("method", ["yarn", "self_extend", "kerple"])
def test_adapters(tmp_path: Path, base: Path, method: str, order: str, saver: str) -> None:
    from peft import PeftModel

    model = adapted(base, method, order)
    wanted = logits(model)
    if saver == "ours":
        ropepatch.save_pretrained(model, tmp_path)
    else:
        model.save_pretrained(str(tmp_path))
    again = ropepatch.from_pretrained(tmp_path)
    assert isinstance(again, PeftModel)
    assert torch.equal(logits(again), wanted)
    assert json.loads((tmp_path / "ropepatch.json").read_text())["kind"] == "adapter"
    # Whoever loads it onto the bare base is told.
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(plain(base), tmp_path)
    assert any("ropepatch" in str(warning.message) for warning in said)
    merged = model.merge_and_unload()
    ropepatch.save_pretrained(merged, tmp_path / "merged")
    assert torch.equal(logits(ropepatch.from_pretrained(tmp_path / "merged")), logits(merged))


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_the_trainer_loses_nothing(tmp_path: Path, base: Path, kind: str) -> None:
    from transformers import Trainer, TrainingArguments

    model = adapted(base, "self_extend", "patch first") if kind == "adapter" else patched("self_extend")
    arguments = TrainingArguments(tmp_path, max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
    rows = [{"input_ids": IDS[0, :40], "labels": IDS[0, :40]}] * 2
    Trainer(model, arguments, train_dataset=rows).train()
    again = ropepatch.from_pretrained(tmp_path / "checkpoint-1")
    assert torch.equal(logits(again), logits(model.eval()))


def test_transformers_own_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = patched("rerope")
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "ropepatch.json").read_text())["patch"]["method"] == "rerope"


def test_unpatching_takes_the_watch_off_adapters(tmp_path: Path, base: Path) -> None:
    model = adapted(base, "yarn", "patch first")
    model.save_pretrained(str(tmp_path / "patched"))
    ropepatch.unpatch(model)
    model.save_pretrained(str(tmp_path / "plain"))
    assert not (tmp_path / "plain" / "ropepatch.json").exists()
    assert not any(vars(config).get("save_pretrained") for config in model.peft_config.values())


def test_another_base_is_refused_naming_the_difference(tmp_path: Path, base: Path) -> None:
    ropepatch.save_pretrained(adapted(base, "yarn", "patch first"), tmp_path / "adapter")
    tiny_model("llama", intermediate_size=96).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelLoadError, match="intermediate_size 96"):
        ropepatch.from_pretrained(tmp_path / "adapter", base_model=str(tmp_path / "other"))
    moved = tmp_path / "moved"
    tiny_model("llama").save_pretrained(moved)
    assert ropepatch.record_of(ropepatch.from_pretrained(tmp_path / "adapter", base_model=str(moved)))
    with pytest.raises(UsageError, match="for adapters"):
        ropepatch.from_pretrained(moved, base_model=str(moved))


def test_an_adapter_without_its_patch_is_refused(tmp_path: Path, base: Path) -> None:
    ropepatch.save_pretrained(adapted(base, "yarn", "patch first"), tmp_path)
    (tmp_path / "ropepatch.json").unlink()
    with pytest.raises(RecordError, match="patch is lost"):
        ropepatch.from_pretrained(tmp_path)


# -- what goes wrong


class Broken:
    def save_pretrained(self, folder: Path) -> None:
        del folder
        raise OSError(28, "No space left on device")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, which not even root can write to")
@pytest.mark.parametrize("write", [ropepatch.save_pretrained, ropepatch.export])
def test_a_place_that_cannot_be_written_is_one_clear_error(write: Any) -> None:
    model = patched("yarn")
    with pytest.raises(OutputError, match="/proc"):
        write(model, "/proc/ropepatch")
    assert ropepatch.inspect(model).method == "yarn"


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "model"
    first, second = patched("yarn"), patched("linear")
    ropepatch.save_pretrained(first, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(OutputError, match="No space left"):
        ropepatch.save_pretrained(second, target, tokenizer=Broken())
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (target / "notes.txt").write_text("mine")
    ropepatch.save_pretrained(second, target)
    assert torch.equal(logits(ropepatch.from_pretrained(target)), logits(second))
    assert (target / "notes.txt").read_text() == "mine"


def test_a_path_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(OutputError, match="annot save to"):
            ropepatch.save_pretrained(patched("yarn"), path)


def test_a_part_that_was_patched_by_itself_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.config = copy.deepcopy(model.config)
    ropepatch.patch(model.model, "yarn", factor=4)
    with pytest.raises(UsageError, match="patched by itself"):
        ropepatch.save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


DEEP: Any = 1
for _ in range(40):
    DEEP = [DEEP]

HOSTILE: dict[str, tuple[Any, str]] = {
    "newer": ({"schema_version": 99}, "newer ropepatch"),
    "newer patch": ({"patch": {"schema_version": 7}}, "schema_version"),
    "unknown field": ({"run": "rm"}, "run"),
    "wrong type": ({"kind": 3}, "kind"),
    "path": ({"learned": "../../etc/passwd"}, "learned"),
    "class": ({"model_class": "os.system"}, "model_class"),
    "huge number": ({"patch": {"options": {"factor": 10**30}}}, "too large"),
    "deep": ({"patch": {"options": {"factor": DEEP}}}, "deeply"),
    "long list": ({"patch": {"layers": [0] * 5 + [-1]}}, "layers"),
    "another entry": ({"patch": {"config_before": {"": {"auto_map": {"AutoModel": "x.y"}}}}}, "does not change"),
    "another part": ({"patch": {"config_before": {"nothing": {"rope_parameters": {}}}}}, "does not have"),
    "method name": ({"patch": {"method": "a/../b"}}, "method"),
}


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    nested = {key: merge(old[key], value) for key, value in new.items() if isinstance(old.get(key), dict)}
    return {**old, **new, **nested}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_records_are_refused(tmp_path: Path, name: str) -> None:
    change, reason = HOSTILE[name]
    ropepatch.save_pretrained(patched("yarn"), tmp_path)
    side = tmp_path / "ropepatch.json"
    content = merge(json.loads(side.read_text()), change)
    if name == "another entry":
        content["patch"]["config_before"] = change["patch"]["config_before"]
    side.write_text(json.dumps(content))
    with pytest.raises(RecordError, match=reason):
        ropepatch.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema_version": NaN}', "[" * 100_000])
def test_broken_records_are_refused(tmp_path: Path, text: str) -> None:
    ropepatch.save_pretrained(patched("yarn"), tmp_path)
    (tmp_path / "ropepatch.json").write_text(text)
    with pytest.raises(RecordError, match=r"ropepatch\.json"):
        ropepatch.from_pretrained(tmp_path)


def test_an_unknown_method_is_named_before_weights_are_read(tmp_path: Path) -> None:
    ropepatch.save_pretrained(patched("yarn"), tmp_path)
    side = tmp_path / "ropepatch.json"
    side.write_text(side.read_text().replace('"method": "yarn"', '"method": "yarm"'))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UnknownNameError, match="yarn"):
        ropepatch.from_pretrained(tmp_path)


def test_missing_weights_are_one_clear_error(tmp_path: Path) -> None:
    ropepatch.save_pretrained(patched("kerple"), tmp_path)
    (tmp_path / "ropepatch.safetensors").unlink()
    with pytest.raises(RecordError, match=r"ropepatch\.safetensors"):
        ropepatch.from_pretrained(tmp_path)
    ropepatch.save_pretrained(patched("kerple"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelLoadError):
        ropepatch.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(RopepatchError):
        ropepatch.from_pretrained(tmp_path)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    model = patched("yarn")
    ropepatch.save_pretrained(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError):
        ropepatch.from_pretrained(tmp_path)

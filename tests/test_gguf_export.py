"""GGUF export: every key and tensor read back, and the rotation recomputed by llama.cpp's formula.

The oracle below is written from llama.cpp's sources (ggml-cpu/ops.cpp: ggml_rope_cache_init, rope_yarn;
llama-context.cpp: how the gain comes about) and shares nothing with ropepatch.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import ropepatch
from ropepatch.cli.app import app
from ropepatch.errors import DependencyError, OptionError, OutputError, UnsupportedModelError, VerificationError
from ropepatch.gguf import rotation as rotations
from ropepatch.gguf import vocabulary, writing
from ropepatch.gguf.architectures import interleave
from ropepatch.gguf.rotation import Rotation, frequencies_of, spell
from ropepatch.testing.tiny import tiny_model

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

ROOT = Path(__file__).resolve().parents[1]
FREQUENCIES = [info.name for info in ropepatch.methods() if info.seam == "frequencies"]
PLANES = [1.0 + plane / 4 for plane in range(8)]
OPTIONS: dict[str, dict[str, Any]] = {
    "proportional": {"partial_rotary_factor": 0.5},
    "longrope": {"factor": 4.0, "short_factor": PLANES, "long_factor": PLANES},
}
VOCABULARY = 300


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the cat and the other cat sat on the mat"], trainer)
    backend.add_tokens(["<tool>"])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    made.chat_template = "{{ messages }}"
    return made


def patched(method: str, kind: str = "llama", **config: Any) -> Any:
    model = tiny_model(kind, vocab_size=VOCABULARY, num_key_value_heads=2, **config)
    return ropepatch.patch(model, method, **OPTIONS.get(method, {"factor": 4}))


def written(model: Any, folder: Path, tokenizer: Any, **options: Any) -> Any:
    done = ropepatch.export(model, folder / "x.gguf", "gguf", tokenizer=tokenizer, **options)
    assert [path.name for path in folder.iterdir()] == ["x.gguf"]
    return gguf.GGUFReader(done.path)


def keys(reader: Any) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def tensors(reader: Any) -> dict[str, Tensor]:
    """Every tensor in float32, in torch's order of dimensions."""
    found = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        data = np.array(tensor.data)
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            found[tensor.name] = torch.from_numpy(data.view(np.int16)).view(torch.bfloat16).float().reshape(shape)
        else:
            found[tensor.name] = torch.from_numpy(data.astype(np.float32)).reshape(shape)
    return found


# -- the oracle


def in_llama_cpp(reader: Any) -> tuple[Tensor, float]:
    """Frequencies and gain on cos and sin that llama.cpp would compute from a file, plane by plane."""
    values = keys(reader)
    name = values["general.architecture"]
    dims = values[f"{name}.rope.dimension_count"]
    base = values[f"{name}.rope.freq_base"]
    kind = values[f"{name}.rope.scaling.type"]
    freq_scale = 1.0 if kind == "none" else 1 / values.get(f"{name}.rope.scaling.factor", 1.0)
    ext_factor = 1.0 if kind == "yarn" else 0.0
    factors = tensors(reader).get("rope_freqs.weight", torch.ones(dims // 2)) if name == "llama" else None
    trained = values[f"{name}.rope.scaling.original_context_length"]

    attn_factor = 1.0
    if ext_factor != 0:
        factor = 1 / freq_scale
        attn_factor = (1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0) / (1 + 0.1 * math.log(factor))
    attn_factor *= values.get(f"{name}.rope.scaling.attn_factor", 1.0)

    def corr_dim(rotations: float) -> float:
        return dims * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    start, end = max(0, math.floor(corr_dim(32))), min(dims - 1, math.ceil(corr_dim(1)))
    angles = []
    for i0 in range(0, dims, 2):
        theta = base ** (-i0 / dims) / (1.0 if factors is None else float(factors[i0 // 2]))
        interpolated = freq_scale * theta
        if ext_factor != 0:
            y = (i0 // 2 - start) / max(0.001, end - start)
            mix = (1 - min(1, max(0, y))) * ext_factor
            interpolated = interpolated * (1 - mix) + theta * mix
        angles.append(interpolated)
    gain = attn_factor * (1 + 0.1 * math.log(1 / freq_scale) if ext_factor != 0 else 1)
    return torch.tensor(angles, dtype=torch.float64), gain


def assert_same_rotation(reader: Any, model: Any) -> None:
    rotary = model.model.rotary_emb
    found, gain = in_llama_cpp(reader)
    torch.testing.assert_close(found, rotary.inv_freq.double(), rtol=1e-6, atol=1e-20)
    assert gain == pytest.approx(rotary.attention_scaling, rel=1e-6)


# -- positions


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("method", FREQUENCIES)
def test_every_frequencies_method(tmp_path: Path, tokenizer: Any, method: str, kind: str) -> None:
    model = patched(method, kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reader = written(model, tmp_path, tokenizer)
    assert_same_rotation(reader, model)
    name = keys(reader)["general.architecture"]
    assert keys(reader)[f"{name}.context_length"] == model.config.max_position_embeddings
    assert keys(reader)[f"{name}.rope.scaling.original_context_length"] == 64
    # The model itself is as it was.
    assert ropepatch.record_of(model)["method"] == method
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("method", "kind", "scaling", "base", "gain"),
    [
        ("linear", "llama", "linear", 10000.0, None),
        ("ntk", "llama", "none", 10000 * 4 ** (16 / 14), None),
        ("yarn", "llama", "yarn", 10000.0, None),
        ("yarn", "qwen3", "yarn", 10000.0, None),
        ("longrope", "llama", "none", 10000.0, math.sqrt(1 + math.log(4) / math.log(64))),
    ],
)
def test_the_plainest_words(
    tmp_path: Path, tokenizer: Any, method: str, kind: str, scaling: str, base: float, gain: float | None
) -> None:
    reader = written(patched(method, kind), tmp_path, tokenizer)
    values = keys(reader)
    assert values["general.architecture"] == kind
    assert values[f"{kind}.rope.scaling.type"] == scaling
    assert values[f"{kind}.rope.freq_base"] == pytest.approx(base, rel=1e-6)
    assert values.get(f"{kind}.rope.scaling.factor") == (None if scaling == "none" else 4)
    assert values.get(f"{kind}.rope.scaling.attn_factor") == (gain and pytest.approx(gain))
    assert ("rope_freqs.weight" in tensors(reader)) == (method == "longrope")


def test_a_gain_and_betas_of_ones_own(tmp_path: Path, tokenizer: Any) -> None:
    model = tiny_model("llama", vocab_size=VOCABULARY)
    ropepatch.patch(model, "yarn", factor=4, attention_factor=1.0, beta_slow=0.1)
    reader = written(model, tmp_path, tokenizer)
    assert_same_rotation(reader, model)
    # llama.cpp reads no betas for this architecture: the file says the frequencies instead.
    assert keys(reader)["llama.rope.scaling.type"] == "none"
    assert "rope_freqs.weight" in tensors(reader)


def test_qwen2_that_its_own_architecture_cannot_say_is_a_llama(tmp_path: Path, tokenizer: Any) -> None:
    model = patched("ntk_by_parts", "qwen2")
    reader = written(model, tmp_path, tokenizer)
    assert keys(reader)["general.architecture"] == "llama"
    bias = model.model.layers[0].self_attn.k_proj.bias
    assert torch.equal(tensors(reader)["blk.0.attn_k.bias"], interleave(bias, 2))
    assert_same_rotation(reader, model)


def test_a_scaling_of_the_checkpoint_itself(tmp_path: Path, tokenizer: Any) -> None:
    parameters = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    parameters |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model = tiny_model("llama", vocab_size=VOCABULARY, rope_parameters=parameters, max_position_embeddings=512)
    assert_same_rotation(written(model, tmp_path, tokenizer), model)


@settings(max_examples=60, deadline=None)
@given(
    theta=st.floats(100, 1e7),
    divisors=st.lists(st.floats(0.5, 1e4), min_size=8, max_size=8),
    gain=st.floats(0.5, 2),
)
def test_any_frequencies_as_divisors(theta: float, divisors: list[float], gain: float) -> None:
    series = theta ** (-torch.arange(8, dtype=torch.float64) / 8)
    wanted = (series / torch.tensor(divisors)).float()
    found = spell(wanted, gain, theta=theta, original_length=64, yarn=None, divisors=True)
    assert found is not None
    torch.testing.assert_close(frequencies_of(found, 16), wanted.double(), rtol=1e-6, atol=0)
    assert rotations.gain_of(found) == pytest.approx(gain)


def test_planes_that_stand_still(tmp_path: Path, tokenizer: Any) -> None:
    model = patched("proportional")
    assert float(model.model.rotary_emb.inv_freq[-1]) == 0
    reader = written(model, tmp_path, tokenizer)
    divisors = tensors(reader)["rope_freqs.weight"]
    assert bool(divisors.isfinite().all())
    assert float(in_llama_cpp(reader)[0][-1]) * 1e9 < 1e-15


# -- tensors


def test_neighbours_turned_are_halves_turned() -> None:
    """q after NORM rotation of the permuted projection is q after transformers' rotation, but for the order."""
    torch.manual_seed(0)
    heads, dims, hidden = 3, 8, 5
    weight, x = torch.randn(heads * dims, hidden, dtype=torch.float64), torch.randn(hidden, dtype=torch.float64)
    angle = torch.rand(dims // 2, dtype=torch.float64)
    halves = (weight @ x).view(heads, dims)
    first, second = halves[:, : dims // 2], halves[:, dims // 2 :]
    cos, sin = angle.cos(), angle.sin()
    expected = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    rows = (interleave(weight, heads) @ x).view(heads, dims)
    found = torch.empty_like(rows)
    for plane in range(dims // 2):
        a, b = rows[:, 2 * plane], rows[:, 2 * plane + 1]
        found[:, 2 * plane] = a * cos[plane] - b * sin[plane]
        found[:, 2 * plane + 1] = a * sin[plane] + b * cos[plane]
    torch.testing.assert_close(found[:, ::2], expected[:, : dims // 2])
    torch.testing.assert_close(found[:, 1::2], expected[:, dims // 2 :])


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_every_tensor(tmp_path: Path, tokenizer: Any, kind: str) -> None:
    model = patched("yarn", kind)
    found = tensors(written(model, tmp_path, tokenizer))
    state = model.state_dict()
    short = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    short |= {f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"} | {"self_attn.o_proj": "attn_output"}
    short |= {f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"}
    short |= {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    names |= {f"model.layers.{i}.{old}": f"blk.{i}.{new}" for i in range(2) for old, new in short.items()}
    expected = {}
    for name, value in state.items():
        module, suffix = name.rsplit(".", 1)
        if kind == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = 4 if module.endswith("q_proj") else 2
            order = [head * 16 + half * 8 + i for head in range(heads) for i in range(8) for half in range(2)]
            value = value[order]
        expected[f"{names[module]}.{suffix}"] = value
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_tied_embeddings_are_written_once(tmp_path: Path, tokenizer: Any) -> None:
    reader = written(patched("linear", tie_word_embeddings=True), tmp_path, tokenizer)
    assert "output.weight" not in tensors(reader)
    assert "token_embd.weight" in tensors(reader)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "auto"])
def test_types(tmp_path: Path, tokenizer: Any, dtype: str) -> None:
    model = patched("yarn", dtype=torch.bfloat16)
    reader = written(model, tmp_path, tokenizer, dtype=dtype)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["token_embd.weight"] == {"float32": "F32", "float16": "F16"}.get(dtype, "BF16")
    assert kinds["output_norm.weight"] == "F32"
    found, value = tensors(reader)["blk.1.ffn_up.weight"], model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(found, (value.half() if dtype == "float16" else value).float())
    kind = {"float32": "ALL_F32", "float16": "MOSTLY_F16"}.get(dtype, "MOSTLY_BF16")
    assert keys(reader)["general.file_type"] == gguf.LlamaFileType[kind]


# -- keys


def test_keys(tmp_path: Path, tokenizer: Any) -> None:
    model = patched("yarn")
    values = keys(written(model, tmp_path, tokenizer))
    assert {name.removeprefix("llama."): value for name, value in values.items() if name.startswith("llama.")} == {
        "context_length": 256,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 64,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "vocab_size": VOCABULARY,
        "rope.dimension_count": 16,
        "rope.freq_base": 10000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
    }


def test_the_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    values = keys(written(patched("yarn"), tmp_path, tokenizer))
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    assert values["tokenizer.ggml.model"] == "gpt2"
    assert values["tokenizer.ggml.pre"] == "gpt-2"
    assert [merge.split(" ") for merge in values["tokenizer.ggml.merges"]] == content["model"]["merges"]
    tokens, types = values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCABULARY
    known = tokenizer.get_vocab()
    assert all(tokens[index] == token for token, index in known.items())
    kind = gguf.TokenType
    assert [types[known[token]] for token in ("<s>", "</s>", "<tool>", "cat")] == [
        kind.CONTROL,
        kind.CONTROL,
        kind.USER_DEFINED,
        kind.NORMAL,
    ]
    assert types[-1] == kind.UNUSED
    assert (values["tokenizer.ggml.bos_token_id"], values["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert (values["tokenizer.ggml.add_bos_token"], values["tokenizer.ggml.add_eos_token"]) == (False, False)
    assert values["tokenizer.chat_template"] == "{{ messages }}"


def test_how_text_is_cut_is_read_off_the_tokenizer(tokenizer: Any) -> None:
    from transformers.models.qwen2 import tokenization_qwen2

    digits = {"type": "Digits", "individual_digits": True}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bare = {**whole, "use_regex": False}
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    qwen2 = {**split, "pattern": {"Regex": tokenization_qwen2.PRETOKENIZE_REGEX}}
    threes = tokenization_qwen2.PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    llama3 = {**split, "pattern": {"Regex": threes}}
    content = json.loads(tokenizer.backend_tokenizer.to_str())

    def pre(*steps: dict[str, Any], ignore_merges: bool = False, normalizer: Any = None) -> str:
        model = {**content["model"], "ignore_merges": ignore_merges}
        cut = {"type": "Sequence", "pretokenizers": list(steps)}
        return vocabulary._pre({**content, "model": model, "pre_tokenizer": cut, "normalizer": normalizer})

    assert pre(whole) == "gpt-2"
    assert pre(digits, whole) == "smollm"
    assert pre(qwen2, bare, normalizer={"type": "NFC"}) == "qwen2"
    assert pre(llama3, bare, ignore_merges=True) == "llama-bpe"
    assert pre(llama3, bare) == "smaug-bpe"
    for steps in ([bare], [digits], [qwen2, whole], [{**qwen2, "invert": True}, bare]):
        with pytest.raises(OptionError, match="tokenizer_pre"):
            pre(*steps)
    with pytest.raises(OptionError, match="Lowercase"):
        pre(whole, normalizer={"type": "Lowercase"})


def test_a_tokenizer_of_pieces(tmp_path: Path) -> None:
    """LLaMA 2's kind: bytes to fall back on, and scores in the order of the merges."""
    alphabet = ["<unk>", "<s>", "</s>", *(f"<0x{value:02X}>" for value in range(256)), "\u2581", "a", "b"]
    merges = [("a", "b"), ("\u2581", "ab"), ("\u2581", "a")]
    pieces = [*alphabet, *("".join(merge) for merge in merges)]
    model = models.BPE(
        {piece: index for index, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    values = keys(written(patched("yarn"), tmp_path, tokenizer))
    assert values["tokenizer.ggml.model"] == "llama"
    assert "tokenizer.ggml.merges" not in values
    assert values["tokenizer.ggml.add_space_prefix"] is True
    assert values["tokenizer.ggml.add_bos_token"] is True
    types, kind = values["tokenizer.ggml.token_type"], gguf.TokenType
    assert types[:3] == [kind.UNKNOWN, kind.CONTROL, kind.CONTROL]
    assert set(types[3:259]) == {kind.BYTE}
    assert set(types[259:265]) == {kind.NORMAL}
    assert values["tokenizer.ggml.scores"][262:265] == [0, -1, -2]
    with pytest.raises(OptionError, match="SentencePiece"):
        ropepatch.export(patched("yarn"), tmp_path / "x.gguf", "gguf", tokenizer=tokenizer, tokenizer_pre="gpt-2")


# -- refusals


def refused(tmp_path: Path, error: type[Exception], words: str, model: Any, tokenizer: Any, **options: Any) -> str:
    with pytest.raises(error, match=words) as caught:
        ropepatch.export(model, tmp_path / "out" / "x.gguf", "gguf", tokenizer=tokenizer, **options)
    assert not any((tmp_path / "out").glob("*")), "something was left behind"
    return str(caught.value)


@pytest.mark.parametrize("method", ["ntk_by_parts", "resonance", "llama3", "proportional"])
def test_frequencies_that_qwen3_cannot_say(tmp_path: Path, tokenizer: Any, method: str) -> None:
    text = refused(tmp_path, UnsupportedModelError, "no words", patched(method, "qwen3"), tokenizer)
    assert "'yarn' comes nearest" in text
    assert method in text


def test_models_that_llama_cpp_computes_otherwise(tmp_path: Path, tokenizer: Any) -> None:
    window = {"sliding_window": 16}
    refused(tmp_path, UnsupportedModelError, "sliding window", patched("yarn", "mistral", **window), tokenizer)
    refused(tmp_path, UnsupportedModelError, "hidden_act", patched("yarn", hidden_act="gelu"), tokenizer)
    refused(tmp_path, UnsupportedModelError, "model type", tiny_model("gpt_neox"), tokenizer)
    headless = ropepatch.patch(tiny_model("llama").model, "yarn", factor=2)
    refused(tmp_path, UnsupportedModelError, "causal", headless, tokenizer)
    extend = ropepatch.patch(tiny_model("llama"), "self_extend", factor=4)
    refused(tmp_path, UnsupportedModelError, "changes the attention", extend, tokenizer)


def test_a_window_as_long_as_the_context_is_none(tmp_path: Path, tokenizer: Any) -> None:
    written(patched("yarn", "mistral", sliding_window=256), tmp_path, tokenizer)


def test_a_native_scaling_that_changes_from_call_to_call(tmp_path: Path, tokenizer: Any) -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = tiny_model("llama", vocab_size=VOCABULARY, rope_parameters=dynamic)
    refused(tmp_path, UnsupportedModelError, "from call to call", model, tokenizer)
    ropepatch.patch(model, "yarn", factor=4, original_length=64, on_scaled="replace")
    assert_same_rotation(written(model, tmp_path, tokenizer), model)


def test_options(tmp_path: Path, tokenizer: Any) -> None:
    model = patched("yarn")
    refused(tmp_path, OptionError, "type of numbers", model, tokenizer, dtype="int8")
    refused(tmp_path, OptionError, "nknown option", model, tokenizer, max_shard_size="1GB")
    refused(tmp_path, OptionError, "ass tokenizer=", model, None)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    refused(tmp_path, OptionError, "does not fit in float16", model, tokenizer, dtype="float16")


def test_tokenizers_that_llama_cpp_cuts_otherwise(tmp_path: Path, tokenizer: Any) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    text = refused(tmp_path, OptionError, "how this tokenizer cuts", patched("yarn"), other)
    assert "tokenizer_pre" in text
    values = keys(written(patched("yarn"), tmp_path / "given", other, tokenizer_pre="tekken"))
    assert values["tokenizer.ggml.pre"] == "tekken"
    refused(
        tmp_path,
        UnsupportedModelError,
        "no embedding",
        ropepatch.patch(tiny_model("llama"), "abf", factor=2),
        tokenizer,
    )
    pieces = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordPiece(unk_token="x")))
    refused(tmp_path, UnsupportedModelError, "kind of tokenizer", patched("yarn"), pieces)


def test_a_quantised_model_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    model = patched("yarn")
    module = model.model.layers[0].mlp.up_proj
    del module.weight
    module.register_buffer("weight", torch.zeros(64, 64, dtype=torch.int8))
    refused(tmp_path, UnsupportedModelError, "quantisation", model, tokenizer)


# -- the file


def test_a_folder_gets_a_model_file(tmp_path: Path, tokenizer: Any) -> None:
    done = ropepatch.export(patched("yarn"), tmp_path / "out", "gguf", tokenizer=tokenizer)
    assert done.path == tmp_path / "out" / "model.gguf"
    assert done.target_length == 256
    assert done.rope_parameters["llama.rope.scaling.type"] == "yarn"
    assert done.hf_overrides is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.gguf"]


def test_a_failure_leaves_the_old_file(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x.gguf"
    file.write_text("old")
    said = Rotation(1e4, "linear", 3.0, 64)
    monkeypatch.setattr(writing, "read_rotation", lambda reader, name: said)
    with pytest.raises(VerificationError, match="otherwise"):
        ropepatch.export(patched("yarn"), file, "gguf", tokenizer=tokenizer)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


def test_a_place_that_cannot_be_written(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.gguf").mkdir()
    for path in (tmp_path / "file" / "x.gguf", tmp_path / "folder.gguf", tmp_path / "file"):
        with pytest.raises(OutputError, match="annot write"):
            ropepatch.export(patched("yarn"), path, "gguf", tokenizer=tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.gguf"]


def test_without_the_package(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(DependencyError, match=r"ropepatch\[export\]"):
        ropepatch.export(patched("yarn"), tmp_path / "x.gguf", "gguf", tokenizer=tokenizer)


def test_the_command(tmp_path: Path, tiny_model_folder: Path) -> None:
    file = tmp_path / "x.gguf"
    words = [
        "export",
        str(tiny_model_folder),
        "--patch",
        "yarn",
        "--set",
        "factor=4",
        "--format",
        "gguf",
        "-o",
        str(file),
    ]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert f"llama-cli -m {file} -c 1024" in result.stdout
    assert keys(gguf.GGUFReader(file))["llama.context_length"] == 1024
    as_json = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert as_json["output"] == str(file)
    assert as_json["rope_parameters"]["llama.rope.scaling.factor"] == 4
    assert CliRunner().invoke(app, [*words, "--dtype", "float16", "--tokenizer-pre", "tekken"]).exit_code == 0
    found = gguf.GGUFReader(file)
    assert keys(found)["tokenizer.ggml.pre"] == "tekken"
    assert {tensor.tensor_type.name for tensor in found.tensors} == {"F16", "F32"}
    result = CliRunner().invoke(app, ["export", str(tiny_model_folder), "-o", "x", "--tokenizer-pre", "tekken"])
    assert result.exit_code == 2
    assert "--tokenizer-pre is for --format gguf" in " ".join(result.output.split())


# -- a real llama.cpp


@pytest.mark.slow
def test_in_a_real_llama_cpp() -> None:
    node = os.environ.get("NODE_LLAMA_CPP")
    if not node:
        pytest.skip(
            "needs node-llama-cpp: npm install --prefix DIR --ignore-scripts node-llama-cpp; NODE_LLAMA_CPP=DIR"
        )
    command = [sys.executable, str(ROOT / "scripts" / "check_llama_cpp.py"), node, "--tiny", "--tolerance", "1e-3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("32 of   32") > 50

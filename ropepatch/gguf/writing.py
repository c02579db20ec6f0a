"""From a live model to one GGUF file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ropepatch
from ropepatch.errors import OptionError, OutputError, UnsupportedModelError, VerificationError
from ropepatch.families import discover
from ropepatch.families._meta import refuse_meta
from ropepatch.families._native import PER_CALL_TYPES, current_frequencies, current_gain
from ropepatch.families._rotary import rope_parameters_of
from ropepatch.gguf._dependency import require_gguf
from ropepatch.gguf.architectures import Architecture, architectures_of, interleave
from ropepatch.gguf.rotation import Rotation, frequencies_of, gain_of, spell
from ropepatch.gguf.vocabulary import write_vocabulary

# Our name -> torch's type, and the names that the package gguf has for the type of a tensor and of a file.
_DTYPES = {
    "float32": (torch.float32, "F32", "ALL_F32"),
    "float16": (torch.float16, "F16", "MOSTLY_F16"),
    "bfloat16": (torch.bfloat16, "BF16", "MOSTLY_BF16"),
}
_FILE = "model.gguf"


@dataclass(frozen=True)
class Written:
    """What `write_gguf` left behind.

    Attributes:
        path: the file.
        context_length: tokens that it says the model reaches.
        rotation: its keys on positions, as plain data; `rope_freqs.weight` as a list.
    """

    path: Path
    context_length: int
    rotation: dict[str, Any]


@dataclass(frozen=True)
class _Entry:
    """A tensor of the file: its shape and type now, its values when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: Callable[[], Tensor]


def write_gguf(
    model: Any,
    path: Path,
    *,
    tokenizer: Any,
    dtype: str = "auto",
    tokenizer_pre: str | None = None,
    verify: bool = True,
) -> Written:
    """Write a model as it is now, patched or not, for llama.cpp. The model is left alone.

    The rotation is read off the live model, whatever method made it: the base, a factor or yarn where llama.cpp
    computes the same from them, else one divisor a plane (`rope_freqs.weight`).

    Args:
        model: a LLaMA, Mistral, Qwen2 or Qwen3 for causal language modelling, without adapters.
        path: the file, where it ends in ".gguf"; else a folder, which gets a "model.gguf". It is there whole or not at
            all.
        tokenizer: a fast one.
        dtype: of the matrices: "float32", "float16", "bfloat16" or "auto", the model's own. Vectors are float32.
        tokenizer_pre: llama.cpp's word for how a byte-level tokenizer cuts text, where we do not know it.
        verify: read the file back and hold its rotation and the list of its tensors against the model.

    Raises:
        UnsupportedModelError: llama.cpp would compute something else.
        OptionError: an unknown dtype, or no word for the tokenizer.
        VerificationError: the file says something else than the model; nothing is left behind.
        OutputError: it cannot be written.
        DependencyError: the package gguf is missing.
    """
    gguf = require_gguf()
    name = _dtype(model, dtype)
    architecture, rotation, length = _rotation(model)
    entries = list(_entries(model, architecture, rotation, name))
    # Keeps everything but the tensors in memory until it is told a path: so far nothing is written.
    writer = gguf.GGUFWriter(None, architecture.name)
    _write_keys(writer, model, rotation, length, name)
    write_vocabulary(writer, tokenizer, model.get_input_embeddings().weight.shape[0], tokenizer_pre)
    file = path if path.suffix == ".gguf" else path / _FILE
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise OutputError(f"cannot write {file}: it is a folder")
        # Beside its place, then renamed.
        with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
            stage = Path(folder) / _FILE
            try:
                _write_tensors(writer, entries, stage)
            finally:
                writer.close()
            if verify:
                _verify(stage, architecture, model, entries)
            os.replace(stage, file)
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror or error}") from error
    return Written(file, length, _plain(rotation, architecture))


def _dtype(model: Any, dtype: str) -> str:
    name = str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype
    if name not in _DTYPES:
        raise OptionError("no such type of numbers in a GGUF export", given=name, allowed=("auto", *_DTYPES))
    return name


# -- positions


def _rotation(model: Any) -> tuple[Architecture, Rotation, int]:
    """Under which architecture, in which words, and up to which length."""
    choices = architectures_of(model)
    inv_freq, gain, theta = _turning(model)
    parameters = rope_parameters_of(model.config, None)
    yarn = parameters if parameters.get("rope_type") == "yarn" else None
    trained = ropepatch.inspect(model).trained_length
    length = model.config.max_position_embeddings
    for choice in choices:
        rotation = spell(
            inv_freq,
            gain,
            theta=theta,
            original_length=trained or length,
            yarn=yarn,
            divisors=choice.divisors,
        )
        if rotation is not None:
            return choice, rotation, length
    record = ropepatch.record_of(model)
    raise UnsupportedModelError(
        f"llama.cpp has no words for these frequencies in its architecture {choices[0].name!r}",
        given=record["method"] if record else yarn or parameters,
        allowed="another base (ntk, abf), linear, or yarn with its usual betas",
        hint="'yarn' comes nearest, with attention_factor=1 where no gain is wanted",
    )


def _turning(model: Any) -> tuple[Tensor, float, float]:
    """Frequencies, gain and rope_theta in force."""
    sites = [site for site in discover(model) if site.mechanism == "rotary"]
    if len(sites) != 1 or sites[0].kind != "frequencies":
        raise UnsupportedModelError("GGUF export needs one rotary for all layers", given=f"{len(sites)} places")
    site = sites[0]
    if site.rotary_dim != site.head_dim or site.rope_theta is None:
        raise UnsupportedModelError(
            "llama.cpp turns whole heads here", given=f"{site.rotary_dim} of {site.head_dim} dimensions"
        )
    kind = getattr(model.get_submodule(site.path), "rope_type", site.rope_type)
    parameters = rope_parameters_of(model.config, site.layer_type)
    if kind in PER_CALL_TYPES and parameters.get("short_factor", 0) != parameters.get("long_factor", 1):
        raise UnsupportedModelError(
            f"the native {kind!r} scaling changes its frequencies from call to call, and a file keeps one set",
            hint="patch the model first, with on_scaled='replace'",
        )
    return current_frequencies(model, site), current_gain(model, site), site.rope_theta


def _write_keys(writer: Any, model: Any, rotation: Rotation, length: int, dtype: str) -> None:
    gguf = require_gguf()
    config = model.config
    name = Path(str(getattr(config, "_name_or_path", "") or config.model_type)).name
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_DTYPES[dtype][2]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(_key_heads(config))
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(model.get_input_embeddings().weight.shape[0])
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(rotation.base)
    # Without a type llama.cpp takes "linear".
    writer.add_rope_scaling_type(gguf.RopeScalingType(rotation.scaling))
    writer.add_rope_scaling_orig_ctx_len(rotation.original_length)
    if rotation.scaling != "none":
        writer.add_rope_scaling_factor(rotation.factor)
    if rotation.attn_factor != 1:
        writer.add_rope_scaling_attn_factors(rotation.attn_factor)


def _plain(rotation: Rotation, architecture: Architecture) -> dict[str, Any]:
    """The keys of a rotation, by their names in the file."""
    start = f"{architecture.name}.rope"
    keys = {
        f"{start}.freq_base": rotation.base,
        f"{start}.scaling.type": rotation.scaling,
        f"{start}.scaling.original_context_length": rotation.original_length,
    }
    if rotation.scaling != "none":
        keys[f"{start}.scaling.factor"] = rotation.factor
    if rotation.attn_factor != 1:
        keys[f"{start}.scaling.attn_factor"] = rotation.attn_factor
    if rotation.divisors is not None:
        keys["rope_freqs.weight"] = rotation.divisors.tolist()
    return keys


# -- tensors


def _entries(model: Any, architecture: Architecture, rotation: Rotation, dtype: str) -> Iterator[_Entry]:
    gguf = require_gguf()
    config = model.config
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    divisors = rotation.divisors
    if divisors is not None:
        yield _Entry("rope_freqs.weight", tuple(divisors.shape), "float32", _values(divisors, None))
    tied = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        refuse_meta(tensor, name)
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None or not tensor.is_floating_point() or tensor.dim() > 2:
            raise UnsupportedModelError(
                f"no place in a GGUF file for the tensor {name!r}",
                given=f"{tensor.dtype}, {list(tensor.shape)}",
                hint="load the model without quantisation: llama.cpp quantises the file",
            )
        heads = {"q_proj": config.num_attention_heads, "k_proj": _key_heads(config)}.get(name.split(".")[-2])
        turned = heads if architecture.interleaved else None
        yield _Entry(new, tuple(tensor.shape), dtype if tensor.dim() == 2 else "float32", _values(tensor, turned))


def _values(tensor: Tensor, heads: int | None) -> Callable[[], Tensor]:
    return lambda: tensor.detach().cpu() if heads is None else interleave(tensor.detach().cpu(), heads)


def _key_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _write_tensors(writer: Any, entries: list[_Entry], stage: Path) -> None:
    """The whole file, with one tensor in memory at a time: the list of all comes first in it."""
    gguf = require_gguf()
    for entry in entries:
        kind, name, _ = _DTYPES[entry.dtype]
        count = int(np.prod(entry.shape))
        # The width alone is taken from the numpy type, which has no bfloat16.
        width = np.dtype(np.float32 if kind.itemsize == 4 else np.float16)
        raw = gguf.GGMLQuantizationType[name]
        writer.add_tensor_info(entry.name, entry.shape, width, count * kind.itemsize, raw_dtype=raw)
    writer.write_header_to_file(stage)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        kind, _, _ = _DTYPES[entry.dtype]
        values = entry.values()
        cast = values.to(kind).contiguous()
        if kind == torch.float16 and bool((cast.isinf() & ~values.isinf()).any()):
            raise OptionError(f"{entry.name} does not fit in float16", hint="use bfloat16 or float32")
        writer.write_tensor_data(cast.view(torch.int16 if kind.itemsize == 2 else torch.int32).numpy())


# -- the file, read back


def _verify(file: Path, architecture: Architecture, model: Any, entries: list[_Entry]) -> None:
    reader = require_gguf().GGUFReader(file)
    found = {tensor.name: tensor for tensor in reader.tensors}
    wanted = {entry.name: entry for entry in entries}
    if found.keys() != wanted.keys():
        raise VerificationError(
            "the file holds other tensors than the model", given=sorted(found.keys() ^ wanted.keys())
        )
    rotation = read_rotation(reader, architecture.name)
    inv_freq, gain, _ = _turning(model)
    same = torch.allclose(frequencies_of(rotation, 2 * inv_freq.numel()), inv_freq.double(), rtol=1e-6, atol=1e-20)
    if not same or abs(gain_of(rotation) / gain - 1) > 1e-6:
        raise VerificationError("llama.cpp would turn heads otherwise than the model does", given=rotation)


def read_rotation(reader: Any, architecture: str) -> Rotation:
    """What a file, opened by gguf.GGUFReader, says of positions."""

    def value(key: str, default: Any) -> Any:
        field = reader.get_field(f"{architecture}.rope.{key}")
        return default if field is None else field.contents()

    divisors = next((tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"), None)
    return Rotation(
        base=value("freq_base", None),
        scaling=value("scaling.type", "linear"),
        factor=value("scaling.factor", 1.0),
        original_length=value("scaling.original_context_length", None),
        attn_factor=value("scaling.attn_factor", 1.0),
        divisors=None if divisors is None else torch.from_numpy(np.array(divisors)),
    )

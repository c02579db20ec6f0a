"""Ship a patched model to those who do not have ropepatch: a plain checkpoint whose config says the patch."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ropepatch
from ropepatch.errors import OptionError, UnsupportedModelError, VerificationError, did_you_mean
from ropepatch.families import host_of
from ropepatch.saving import staged
from ropepatch.sidecar import CONFIG_KEY
from ropepatch.surgery._carry import REFUSAL
from ropepatch.surgery._image_size import image_of
from ropepatch.surgery._series_check import PAST, example

FORMATS = ("transformers", "gguf")
_GGUF_OPTIONS = ("dtype", "tokenizer_pre")

# A method of the attention seam, and the frequencies that come nearest to it.
_NEAREST = {
    "dynamic_ntk": "ntk",
    "dynamic_yarn": "yarn",
    "dynamic_longrope": "longrope",
    "self_extend": "ntk_by_parts",
    "leaky_rerope": "ntk_by_parts",
    "rerope": "ntk_by_parts",
    "dca": "ntk",
    "string": "ntk",
}
# Rounding of frequencies that the config says in other words (as a base, as divisors), seen in logits.
_TOLERANCE = 1e-3
_TOKENS = 24


@dataclass(frozen=True)
class Exported:
    """What `export` left behind.

    Attributes:
        path: the folder, or the GGUF file.
        target_length: tokens that the model now reaches, or None where its config does not say.
        rope_parameters: what its config, or the GGUF file, says of positions, as plain data.
        hf_overrides: the same as an argument for vLLM's `--hf-overrides` and SGLang's `--json-model-override-args`:
            to serve the *original* checkpoint with the patch. None for a GGUF file, and where weights changed.
    """

    path: Path
    target_length: int | None
    rope_parameters: Any
    hf_overrides: str | None


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = "transformers",  # noqa: A002 - the public name
    *,
    tokenizer: Any = None,
    verify: bool = True,
    **kwargs: Any,
) -> Exported:
    """Write a patched model as a folder that others load without ropepatch.

    With `format="transformers"` plain transformers, vLLM and SGLang read the patch from the config: with the words of
    the method itself where transformers has them, else as another base (`ntk`, `abf`) or as `longrope` divisors. A
    longer position table is in the weights, and its length in the config.

    With `format="gguf"` llama.cpp reads a file with weights, tokenizer and patch (LLaMA, Mistral, Qwen2, Qwen3).

    Args:
        model: a patched PreTrainedModel; merge adapters first.
        path: the folder; made if missing. For "gguf" a file that ends in ".gguf", or a folder for a "model.gguf".
        format: "transformers" or "gguf".
        tokenizer: saved too, when given; "gguf" needs it.
        verify: load the folder with plain transformers and compare logits, within and beyond the trained length; read
            the GGUF file back and compare frequencies and gain.
        kwargs: for the model's `save_pretrained`; for "gguf" `dtype` ("auto", "float32", "float16", "bfloat16") and
            `tokenizer_pre`.

    Raises:
        OptionError: another format, or an option that it does not have.
        UnsupportedModelError: the patch cannot be said in a config; names the nearest method that can.
        VerificationError: the folder's logits differ; nothing is left behind.
        OutputError: the folder cannot be written.
        DependencyError: "gguf" without the package gguf.
    """
    check_format(format)
    host: Any = host_of(model)
    if getattr(model, "peft_config", None) or getattr(host, "peft_config", None):
        raise UnsupportedModelError(
            "an adapter is on the model", given=type(model).__name__, hint="call merge_and_unload() first, then export"
        )
    record = ropepatch.record_of(host)
    if record is not None and record["seam"] == "attention":
        near = _NEAREST.get(record["method"])
        raise UnsupportedModelError(
            f"{record['method']!r} changes the attention itself, which no config can say",
            allowed=[method.name for method in ropepatch.methods() if method.seam == "frequencies"],
            hint=f"{near!r} comes nearest; or keep it with ropepatch.save_pretrained"
            if near
            else "keep it with ropepatch.save_pretrained",
        )
    if vars(host.config).get("_attn_implementation") == REFUSAL:
        raise UnsupportedModelError(
            f"no config can say what {(record or {}).get('method')!r} did to this {host.config.model_type} model: "
            "transformers computes its table or its biases itself",
            hint="'sinusoidal' makes a table of sines and cosines longer in a way that a config can say; or keep it "
            "with ropepatch.save_pretrained",
        )
    tables = record is not None and record["seam"] == "embeddings"
    if format == "gguf":
        return _gguf(host, Path(path), tokenizer, verify, kwargs)
    with staged(Path(path)) as stage:
        host.save_pretrained(stage, **kwargs)
        _forget(stage / "config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        if verify:
            _verify(host, stage, tables)
        exported = _describe(stage, Path(path), tables, record)
    return exported


def check_format(name: str) -> None:
    """Refuse a format that we do not write.

    Raises:
        OptionError: names those that we do.
    """
    if name not in FORMATS:
        raise OptionError("unknown format", given=name, allowed=FORMATS, hint=did_you_mean(name, FORMATS))


def _gguf(host: Any, path: Path, tokenizer: Any, verify: bool, options: dict[str, Any]) -> Exported:
    from ropepatch.gguf.writing import write_gguf

    unknown = sorted(set(options).difference(_GGUF_OPTIONS))
    if unknown:
        raise OptionError("unknown option of format='gguf'", given=", ".join(unknown), allowed=_GGUF_OPTIONS)
    done = write_gguf(host, path, tokenizer=tokenizer, verify=verify, **options)
    return Exported(done.path, done.context_length, done.rotation, None)


def _forget(file: Path) -> None:
    """A plain checkpoint says nothing of us."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content.pop(CONFIG_KEY, None)
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _verify(host: Any, stage: Path, tables: bool) -> None:
    kind: Any = type(host)
    while kind.__module__.split(".")[0] != "transformers":
        kind = kind.__base__
    plain = kind.from_pretrained(stage, dtype=host.dtype).to(host.device).eval()
    for inputs, where in _inputs(host, tables):
        found, wanted = _outputs(plain, inputs), _outputs(host, inputs)
        difference = float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))
        tolerance = _TOLERANCE if host.dtype == torch.float32 else 0.1
        if not difference <= tolerance:
            raise VerificationError(
                "the exported folder gives other logits than the patched model",
                given=f"{difference:.2g} relative, {where}",
                allowed=f"{tolerance:g}",
            )


def _inputs(host: Any, tables: bool) -> Iterator[tuple[dict[str, Any], str]]:
    """What both models are asked, within and beyond the trained length, and that in words."""
    trained = ropepatch.inspect(host).trained_length or 0
    if getattr(host, "main_input_name", "") == "pixel_values":
        image = image_of(host.config)
        yield {"pixel_values": image}, f"on an image of {image.shape[2]} x {image.shape[3]} pixels"
        return
    if getattr(host, "main_input_name", "") == PAST:
        yield example(host), f"on a context of {host.config.context_length} time steps"
        return
    vocabulary = host.config.get_text_config(decoder=True).vocab_size
    accepted = inspect.signature(type(host).forward).parameters
    # A position table is looked up by where a token stands; rotary models are asked for far positions directly.
    for start in (0, trained):
        count = start + _TOKENS if tables and start else _TOKENS
        if tables and start:
            count = min(count, ropepatch.inspect(host).target_length or count)
        tokens = torch.arange(count).remainder(vocabulary)[None]
        inputs: dict[str, Any] = {"input_ids": tokens}
        if not tables:
            inputs["position_ids"] = torch.arange(start, start + _TOKENS)[None]
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        if "decoder_input_ids" in accepted:
            inputs["decoder_input_ids"] = tokens
        yield inputs, f"on {count} tokens" if tables else f"at positions {start} to {start + _TOKENS}"


@torch.inference_mode()
def _outputs(model: Any, inputs: dict[str, Any]) -> Tensor:
    given = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    given = {name: value.to(model.dtype) if _is_float(value) else value for name, value in given.items()}
    training = model.training
    model.eval()
    try:
        # Some models draw at random in evaluation too (Informer samples queries): both from one seed.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            output = model(**given)
        return (output.logits if hasattr(output, "logits") else output[0]).float()
    finally:
        model.train(training)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _describe(stage: Path, path: Path, tables: bool, record: dict[str, Any] | None) -> Exported:
    if tables and record is not None:
        # The original weights do not have the longer table.
        return Exported(path, record["target_length"], None, None)
    content = json.loads((stage / "config.json").read_text(encoding="utf-8"))
    text = content.get("text_config", content)
    length = text.get("max_position_embeddings")
    words = {"rope_parameters": text.get("rope_parameters")}
    words |= {"max_position_embeddings": length} if length else {}
    overrides = {"text_config": words} if text is not content else words
    return Exported(path, length, words["rope_parameters"], json.dumps(overrides, separators=(",", ":")))

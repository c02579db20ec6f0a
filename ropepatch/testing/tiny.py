"""Tiny random models of the real transformers classes, one of every text model type, built on CPU without network."""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any

from ropepatch.errors import RopepatchError, UnsupportedModelError, unknown_name
from ropepatch.testing._shrink import field_names, parts_of, shrink, text_part
from ropepatch.testing._sizes import SPECIAL_TOKENS, VOCABULARY

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

KINDS = ("causal-lm", "encoder", "encoder-decoder", "text")

_NOISE = 0.1

# Text models with positions that no head class of the other kinds leads to, besides those named "..._text".
_MORE_TEXT_MODELS = ("canine", "markuplm", "mistral4", "openai_privacy_filter", "splinter", "visual_bert")

# Named so, but they read speech or pictures, or have no class of their own.
_NOT_TEXT_MODELS = ("kyutai_speech_to_text", "sam3_lite_text", "speech_to_text", "voxtral_realtime_text")


@cache
def model_types(kind: str = "causal-lm") -> tuple[str, ...]:
    """The model types of a kind in the installed transformers, sorted. No type is of two of the last three kinds.

    Args:
        kind: "causal-lm" (a causal language model class exists), "encoder-decoder" (sequence to sequence), "encoder"
            (masked language models and text encoders that are not encoder-decoders) or "text" (headless text models
            that are none of these, mostly the text parts of multimodal models).

    Raises:
        UnknownNameError: no such kind.
    """
    return tuple(sorted(_auto_classes(kind)))


def _auto_classes(kind: str) -> dict[str, Any]:
    """Model type to the transformers Auto class that builds it."""
    import transformers
    from transformers.models.auto import modeling_auto as names

    causal = dict.fromkeys(names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM)
    if kind == "causal-lm":
        return causal
    both = dict.fromkeys(names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForSeq2SeqLM)
    if kind == "encoder-decoder":
        return both
    masked = dict.fromkeys(names.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM)
    encoders = dict.fromkeys(names.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES, transformers.AutoModelForTextEncoding)
    encoders = {name: auto for name, auto in encoders.items() if name not in causal} | masked
    if kind == "encoder":
        return {name: auto for name, auto in encoders.items() if name not in both}
    if kind == "text":
        return {
            name: transformers.AutoModel
            for name in names.MODEL_MAPPING_NAMES
            if name.endswith(("_text", "_text_model")) or name in _MORE_TEXT_MODELS
            if not (name in causal or name in both or name in encoders or name in _NOT_TEXT_MODELS)
        }
    raise unknown_name("kind", kind, KINDS)


def tiny_config(model_type: str, kind: str = "causal-lm", **overrides: Any) -> PreTrainedConfig:
    """A config of `model_type` with the class's defaults made tiny.

    About 64 hidden units, 4 heads, 2 layers (more where it takes more to show every kind of layer), 128 tokens and
    a trained length of 64. A rope scaling that the class's defaults carry is kept, for a trained length of 64.

    Args:
        model_type: transformers' name; `model_types(kind)` lists them.
        kind: see `model_types`.
        overrides: fields of the config, or of its text part.

    Raises:
        UnknownNameError: no such kind or model type.
        OptionError: a field that the config does not know.
        UnsupportedModelError: the config cannot be built; the message has the cause.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    classes = _auto_classes(kind)
    if model_type not in classes:
        raise unknown_name("model type", model_type, classes)
    config_class = CONFIG_MAPPING[model_type]
    try:
        config = shrink(config_class, overrides)
        if kind == "causal-lm" and "is_decoder" in field_names(config) and "is_decoder" not in overrides:
            config.is_decoder = True
    except RopepatchError:
        raise
    except Exception as error:
        raise _cannot("config", model_type, error) from error
    return config


def tiny_model(
    model_type: str,
    kind: str = "causal-lm",
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    **config_overrides: Any,
) -> PreTrainedModel:
    """A model of `tiny_config`, in evaluation mode, with random weights that depend on the seed only.

    Args:
        model_type: transformers' name; `model_types(kind)` lists them.
        kind: see `model_types`.
        seed: of the weights. The global random state is left alone.
        dtype: of the weights; float32 by default.
        config_overrides: fields of the config, or of its text part.

    Raises:
        UnknownNameError: no such kind or model type.
        OptionError: a field that the config does not know.
        UnsupportedModelError: the model cannot be built; the message has the cause.
    """
    import torch

    config = tiny_config(model_type, kind, **config_overrides)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = _build(_auto_classes(kind)[model_type], config, dtype or torch.float32)
            _stir(model)
    except Exception as error:
        raise _cannot("model", model_type, error) from error
    return model.eval()


def _build(auto_class: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    model_class = auto_class._model_mapping[type(config)]
    model_class = model_class[0] if isinstance(model_class, tuple) else model_class
    # A composite config may stand for a model of one of its parts: Musicgen's language model is its decoder.
    parts = [part for _, part in parts_of(config) if type(part) is model_class.config_class]
    return model_class._from_config(parts[0] if parts else config, dtype=dtype)


def _stir(model: PreTrainedModel) -> None:
    """Noise on what the class initialises to one constant: a gate of zeros would hide everything behind it."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point() and _is_constant(parameter):
                parameter.add_(torch.randn_like(parameter), alpha=_NOISE)


def _is_constant(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and bool(tensor.min() == tensor.max())


def _cannot(what: str, model_type: str, error: Exception) -> UnsupportedModelError:
    cause = " ".join(str(error).split())
    return UnsupportedModelError(f"no tiny {what} of {model_type!r} can be built ({type(error).__name__}: {cause})")


def tiny_inputs(model: PreTrainedModel, *, length: int, batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """What a plain text forward of a tiny model takes.

    Args:
        model: from `tiny_model`.
        length: tokens a row.
        batch: rows.
        seed: of the tokens.

    Returns:
        `input_ids` int64 [batch, length] without special tokens, `attention_mask` int64 [batch, length] of ones, and
        `decoder_input_ids` int64 [batch, length] for an encoder-decoder.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    vocabulary = getattr(text_part(model.config), "vocab_size", VOCABULARY)  # CANINE reads characters and has none

    def tokens() -> Tensor:
        return torch.randint(SPECIAL_TOKENS, vocabulary, (batch, length), generator=generator)

    inputs = {"input_ids": tokens(), "attention_mask": torch.ones(batch, length, dtype=torch.int64)}
    accepted = inspect.signature(model.forward).parameters
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = tokens()
    return {name: value for name, value in inputs.items() if name in accepted or "kwargs" in accepted}


def forward_logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Logits of one forward, or the last hidden state of a model without a head, [batch, length, ...], no gradient."""
    import torch

    with torch.no_grad():
        output = model(**inputs)
    logits = getattr(output, "logits", None)
    return logits if logits is not None else output.last_hidden_state

"""A model and its tokenizer by name: `demo:smollm2`, a folder or a hub id. What cannot be loaded is one clear error."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from ropepatch.errors import ModelLoadError, OptionError, RopepatchError, first_line
from ropepatch.saving import from_pretrained, is_saved_patched, tokenizer_source
from ropepatch.sources import model_source as model_source

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "bfloat16", "float16", "float32")


class LoadedModel(NamedTuple):
    """What `load_model` returns; unpacks as (model, tokenizer)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_model(name_or_path: str | os.PathLike[str], *, dtype: str | torch.dtype | None = None) -> LoadedModel:
    """Load a causal language model for evaluation: in eval mode, on the accelerator if there is one, else on the CPU.

    What `ropepatch.save_pretrained` saved comes back patched.

    Args:
        name_or_path: `demo:smollm2`, a folder with config, weights and tokenizer, or a hub id.
        dtype: of the weights: "float32", "bfloat16", "float16", or "auto" (the default), which is bfloat16 where the
            processor computes in it and float32 elsewhere. `inv_freq` stays float32.

    Raises:
        ModelLoadError: the folder or hub model is missing, incomplete or corrupt.
        UnknownNameError: no such demo model.
        DependencyError: the demo model's package is not installed.
        OptionError: another dtype.
    """
    kind = resolve_dtype(dtype)
    source = model_source(name_or_path)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        if is_saved_patched(source):
            model = from_pretrained(source, dtype=kind)
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(source))
            return LoadedModel(model.to(_device()).eval(), tokenizer)
        tokenizer = AutoTokenizer.from_pretrained(source)
        # Mismatched sizes are refused below, with their names: transformers' own error only points at its log.
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, dtype=kind, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except RopepatchError:
        raise
    except Exception as error:  # transformers, safetensors, tokenizers and huggingface_hub raise a dozen types
        raise ModelLoadError(f"cannot load {name_or_path}: {first_line(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    # transformers fills what is missing with random numbers and only logs it.
    lacking = sorted(map(str, loading["missing_keys"])) + sorted(str(key[0]) for key in loading["mismatched_keys"])
    if lacking:
        raise ModelLoadError(
            f"cannot load {name_or_path}: tensors are missing from its weights, or have another shape: "
            + ", ".join(lacking[:3])
            + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        )
    return LoadedModel(model.to(_device()).eval(), tokenizer)


def resolve_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype that a name means; "auto" and None choose by the processor.

    Raises:
        OptionError: not one of "auto", "bfloat16", "float16", "float32".
    """
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    match dtype:
        case None | "auto":
            return torch.bfloat16 if _computes_in_bfloat16() else torch.float32
        case "bfloat16":
            return torch.bfloat16
        case "float16":
            return torch.float16
        case "float32":
            return torch.float32
    raise OptionError("unknown dtype", given=dtype, allowed=DTYPES)


def _computes_in_bfloat16() -> bool:
    """Whether bfloat16 is a native format here: emulated, it is slower than float32."""
    import torch

    device = _device().type
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _device() -> torch.device:
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))

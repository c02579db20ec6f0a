"""The model of a recipe: loaded by name or made of random weights, with the dtype that training asks for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ropepatch.errors import DependencyError, ModelLoadError, OptionError, RopepatchError, first_line
from ropepatch.sources import model_source
from ropepatch.training.recipe import ModelSection, Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SCRATCH = "scratch:"


def computes_in_bfloat16(recipe: Recipe) -> bool:
    """Whether the forward runs in bfloat16: as asked, or, for "auto", where the device computes in it."""
    import torch

    from ropepatch.loading import resolve_dtype

    precision = recipe.train.precision
    return precision == "bf16" or (precision == "auto" and resolve_dtype("auto") is torch.bfloat16)


def autocast(model: nn.Module, recipe: Recipe) -> torch.autocast:
    """A context in which the model computes as in training."""
    import torch

    kind = next(model.parameters()).device.type
    return torch.autocast(kind, torch.bfloat16, enabled=computes_in_bfloat16(recipe))


def weights_dtype(recipe: Recipe) -> torch.dtype | str:
    """Of the weights as they are loaded.

    "auto" is float32 where the whole forward runs in it and where all weights are trained, else the checkpoint's own.

    Raises:
        OptionError: half precision weights, and a forward in float32.
    """
    import torch

    asked = recipe.model.dtype
    if asked != "auto":
        if asked != "float32" and not computes_in_bfloat16(recipe):
            raise OptionError(
                f"model.dtype={asked} needs a forward in half precision, and this one runs in float32",
                given=f"train.precision={recipe.train.precision}",
                hint="set train.precision=bf16, or model.dtype=float32",
            )
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    return torch.float32 if recipe.lora is None or not computes_in_bfloat16(recipe) else "auto"


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, or the one that the recipe names beside it.

    Raises:
        ModelLoadError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    source = _tokenizer_source(section)
    try:
        return AutoTokenizer.from_pretrained(source, revision=None if section.tokenizer else section.revision)
    except Exception as error:  # transformers, tokenizers and huggingface_hub raise a dozen types
        raise ModelLoadError(
            f"cannot load a tokenizer from {source}: {first_line(error)}", hint="name one: model.tokenizer=PATH"
        ) from error


def load_base(recipe: Recipe) -> PreTrainedModel:
    """The model before any patch, in eval mode on its device. Random weights depend on `train.seed` only.

    Raises:
        ModelLoadError: it is missing, incomplete or corrupt.
        DependencyError: quantization without bitsandbytes.
        OptionError: adapters on random weights, which no file could name as their base.
    """
    import torch

    section, dtype = recipe.model, weights_dtype(recipe)
    if section.name.startswith(SCRATCH):
        if recipe.lora is not None:
            raise OptionError(
                "adapters need a base that others can load, and random weights are none",
                given=section.name,
                hint="set lora=null: all weights are trained",
            )
        config = load_config(section)
        with _seeded(recipe.train.seed):
            return _from_config(config, torch.float32 if isinstance(dtype, str) else dtype).to(device()).eval()
    source = model_source(section.name)
    more = quantized(recipe)
    from transformers import AutoModelForCausalLM

    with quiet():
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                revision=section.revision,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **more,
            )
        except Exception as error:  # transformers, safetensors and huggingface_hub raise a dozen types
            raise ModelLoadError(f"cannot load {section.name}: {first_line(error)}") from error
    lacking = sorted(map(str, report["missing_keys"])) + sorted(str(key[0]) for key in report["mismatched_keys"])
    if lacking:
        raise ModelLoadError(f"cannot load {section.name}: weights are missing or misshapen: {', '.join(lacking[:3])}")
    if section.quantization:
        _keep_differentiable(model)
        return model.eval()
    return model.to(device()).eval()


def load_config(section: ModelSection) -> PreTrainedConfig:
    """The config of a recipe's model.

    Raises:
        ModelLoadError: there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    scratch = section.name.startswith(SCRATCH)
    source = os.path.expanduser(section.name.removeprefix(SCRATCH)) if scratch else model_source(section.name)
    try:
        return AutoConfig.from_pretrained(source, revision=section.revision)
    except Exception as error:  # transformers and huggingface_hub raise a dozen types
        raise ModelLoadError(f"cannot load a config from {source}: {first_line(error)}") from error


def quantized(recipe: Recipe) -> dict[str, Any]:
    """Arguments that load a model with quantized weights, for `from_pretrained`; none without quantization.

    Raises:
        DependencyError: bitsandbytes is not installed.
    """
    import importlib.util

    import torch

    section = recipe.model
    if section.quantization is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise DependencyError(
            f"model.quantization={section.quantization} needs bitsandbytes", hint="run: pip install bitsandbytes"
        )
    from transformers import BitsAndBytesConfig

    if section.quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if computes_in_bfloat16(recipe) else torch.float32,
        )
    return {"quantization_config": config, "device_map": {"": device()}}


def device() -> torch.device:
    """This process's accelerator, or the CPU."""
    from ropepatch.loading import _device

    return _device()


def shrunk(recipe: Recipe, vocabulary: int) -> PreTrainedModel:
    """A tiny random model of the recipe's architecture, with its lengths and rope settings, for a rehearsal.

    Args:
        vocabulary: number of tokens.

    Raises:
        ModelLoadError: the config cannot be loaded.
        UnsupportedModelError: the architecture cannot be made small.
    """
    import torch

    from ropepatch.errors import UnsupportedModelError
    from ropepatch.surgery._lengths import LENGTH_NAMES
    from ropepatch.testing._shrink import field_names, shrink

    config = load_config(recipe.model)
    known = field_names(config)
    kept = {name: getattr(config, name) for name in (*LENGTH_NAMES, "rope_parameters") if name in known}
    # Lists of rope factors fit the head they were made for.
    if "head_dim" in known and getattr(config, "head_dim", None):
        kept["head_dim"] = config.head_dim
    try:
        small = shrink(type(config), {**kept, "vocab_size": vocabulary}, config)
        with _seeded(recipe.train.seed):
            return _from_config(small, torch.float32).eval()
    except RopepatchError:
        raise
    except Exception as error:  # what a config refuses differs from class to class
        raise UnsupportedModelError(
            f"no small model of {config.model_type} can be made: {first_line(error)}"
        ) from error


def base_name(section: ModelSection) -> str:
    """What a saved adapter calls its base: a name of the demo or the hub as it is, a folder by its whole path."""
    path = Path(os.path.expanduser(section.name))
    return str(path.resolve()) if path.is_dir() else section.name


def _keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference.

    On CPUs that compute in bfloat16 it does so, for good, at the first forward without gradients; the packed weights
    let no gradient through, and say so in a warning only. (bitsandbytes 0.50)
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _tokenizer_source(section: ModelSection) -> str:
    if section.tokenizer is not None:
        return os.path.expanduser(section.tokenizer)
    if not section.name.startswith(SCRATCH):
        return model_source(section.name)
    place = Path(os.path.expanduser(section.name.removeprefix(SCRATCH)))
    return str(place.parent if place.is_file() else place)


def _from_config(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(config, dtype=dtype)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's global generator at `seed` for a while."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and the warnings that loading and wrapping a model makes, which say nothing about this run."""
    import warnings

    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers by an old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            # It looks the base up on the hub to see whether tokens were added, which nothing here does.
            warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
            # Our own mark in an adapter's config, which `ropepatch.from_pretrained` is there to read.
            warnings.filterwarnings("ignore", r"Unexpected keyword arguments \['ropepatch'\]", UserWarning)
            yield
    finally:
        if bars:
            logging.enable_progress_bar()

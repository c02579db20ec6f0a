"""LoRA on a patched model: which layers are adapted, and what is trained whole beside the adapters.

Layers are found by what they are, not by lists of class names. What is trained whole goes through PEFT's
`modules_to_save`: parameters that are only switched to `requires_grad` would be lost when the adapter is saved. The
parameters of a swapped-in bias are the exception: ropepatch saves them itself, beside the adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from ropepatch.attention.interface import LEARNED
from ropepatch.errors import DependencyError, OptionError, UnsupportedModelError, did_you_mean
from ropepatch.families import discover, host_of
from ropepatch.training import loading
from ropepatch.training.recipe import LoraSection, Recipe

_IN_LEARNED = f".{LEARNED}."
_HEADS = ("num_heads", "num_attention_heads", "num_key_value_groups", "head_dim", "head_size")


def adapt(model: Any, recipe: Recipe) -> Any:
    """A loaded model, patched or not, with what the recipe trains made trainable: adapters, or all weights.

    Random weights depend on `train.seed` only.

    Returns:
        The PeftModel; without a lora section the model itself.

    Raises:
        OptionError, UnsupportedModelError, DependencyError: as `add_lora`.
    """
    import torch

    if recipe.lora is None:
        return model.requires_grad_(True)
    if recipe.model.quantization is not None:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.train.seed)
        return add_lora(model, recipe.lora, base=loading.base_name(recipe.model), revision=recipe.model.revision)


def add_lora(model: nn.Module, lora: LoraSection, *, base: str | None = None, revision: str | None = None) -> Any:
    """Wrap a model, patched or not, in adapters. Random weights come from torch's global generator.

    Args:
        model: a transformers model.
        lora: what to adapt and what to train whole.
        base, revision: how the saved adapter names its base; by default the name that the model was loaded by.

    Returns:
        The PeftModel. All trainable weights are float32 where the base's dtype is a half precision.

    Raises:
        OptionError: `target_modules` that match nothing.
        UnsupportedModelError: no attention projections, norms, embeddings or position tables are found.
        DependencyError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise DependencyError("LoRA needs peft", hint="run: pip install 'ropepatch[train]'") from error
    whole = [
        *(_norms(model) if lora.train_norms else ()),
        *(_embeddings(model) if lora.train_embeddings else ()),
        *(_positions(model) if lora.train_positions else ()),
    ]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=_targets(model, lora),
        modules_to_save=whole or None,
        ensure_weight_tying=lora.train_embeddings and _tied(model),
        use_dora=lora.use_dora,
        use_rslora=lora.use_rslora,
        revision=revision,
    )
    with loading.quiet():
        # It stores GPT-2's weights transposed, sees that, and tells.
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed", UserWarning)
        adapted = get_peft_model(model, config)
    if base is not None:
        # PEFT takes the name that the model was loaded by, which for a demo is a folder of this machine.
        adapted.peft_config["default"].base_model_name_or_path = base
    train_learned(adapted)
    masters(adapted)
    return adapted


def train_learned(model: nn.Module) -> None:
    """Let the parameters of a swapped-in bias learn; PEFT freezes all that it does not know."""
    for name, parameter in model.named_parameters():
        if _IN_LEARNED in name:
            parameter.requires_grad_(True)


def masters(model: nn.Module) -> None:
    """Trainable weights in float32: small steps are lost in a half precision."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def attention_projections(model: nn.Module) -> list[str]:
    """Full names of the linear layers inside attention modules: query, key, value and output, fused or not.

    An attention module has a layer number and heads, and scales scores or is causal; where a model has none of these,
    a layer number and heads are enough, without a convolution (state-space layers have one).
    """
    named = [(name, module) for name, module in model.named_modules() if not _learned(name)]
    candidates = [
        (name, m) for name, m in named if hasattr(m, "layer_idx") and any(hasattr(m, word) for word in _HEADS)
    ]
    scoring = [(name, m) for name, m in candidates if hasattr(m, "scaling") or hasattr(m, "is_causal")]
    others = [(name, m) for name, m in candidates if not any(isinstance(part, nn.Conv1d) for part in m.children())]
    return [full for name, module in scoring or others for full in _linear_children(name, module)]


def _targets(model: nn.Module, lora: LoraSection) -> list[str]:
    wanted = lora.target_modules
    if isinstance(wanted, list):
        return _named(model, wanted)
    if wanted == "attention":
        found = attention_projections(model)
    else:
        head = model.get_output_embeddings()  # type: ignore[operator]
        found = [name for name, module in model.named_modules() if _linear(module) and module is not head]
        found = [name for name in found if not _learned(name)]
    if not found:
        raise UnsupportedModelError(
            f"no linear layers are found for lora.target_modules={wanted}",
            given=host_of(model).config.model_type,
            hint="name them: lora.target_modules=[...]",
        )
    return found


def _named(model: nn.Module, wanted: list[str]) -> list[str]:
    """The names as given; each must match a linear layer, by its whole name or its last parts."""
    linear = [name for name, module in model.named_modules() if _linear(module)]
    ends = {name.rpartition(".")[2] for name in linear}
    for name in wanted:
        if not any(full == name or full.endswith(f".{name}") for full in linear):
            raise OptionError(
                f"lora.target_modules names {name!r}, and the model has no such linear layer",
                allowed=sorted(ends),
                hint=did_you_mean(name, ends),
            )
    return list(wanted)


def _norms(model: nn.Module) -> list[str]:
    """Full names of the modules whose only parameters are vectors: a gain, perhaps with a bias."""
    found = []
    for name, module in model.named_modules():
        own = list(module.parameters())
        if own and not list(module.children()) and all(p.ndim == 1 for p in own) and hasattr(module, "weight"):
            found.append(name)
    found = [name for name in found if not _learned(name)]
    if not found:
        raise UnsupportedModelError("lora.train_norms: the model has no norms with weights")
    return found


def _embeddings(model: nn.Module) -> list[str]:
    """Full names of the token embeddings, and of the head where it has weights of its own."""
    named = {id(module): name for name, module in model.named_modules()}
    tokens, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    names = [named[id(tokens)]]
    if head is not None and not _tied(model):
        names.append(named[id(head)])
    return names


def _positions(model: nn.Module) -> list[str]:
    """Full names of the modules whose weight is a position table."""
    host = host_of(model)
    tables = [site.path for site in discover(host) if site.mechanism == "learned" and site.name == "weight"]
    if not tables:
        raise UnsupportedModelError(
            "lora.train_positions: the model has no learned position table",
            given=host.config.model_type,
            hint="leave train_positions out",
        )
    named = {id(module): name for name, module in model.named_modules()}
    return [named[id(host.get_submodule(path))] for path in tables]


def _tied(model: nn.Module) -> bool:
    tokens, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    return head is not None and getattr(head, "weight", None) is getattr(tokens, "weight", 0)


def _linear_children(name: str, module: nn.Module) -> Iterator[str]:
    for child, part in module.named_children():
        if _linear(part):
            yield f"{name}.{child}".strip(".")


def _linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    # Quantised layers of bitsandbytes are subclasses of Linear.
    return isinstance(module, (nn.Linear, Conv1D))


def _learned(name: str) -> bool:
    return _IN_LEARNED in f".{name}."

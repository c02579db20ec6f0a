"""Which models llama.cpp computes as transformers does, and how it lays out and rotates their heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ropepatch.errors import UnsupportedModelError


@dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures.

    Attributes:
        name: `general.architecture`, and the prefix of its keys.
        interleaved: its rope type is NORM: plane i is the dimensions 2i and 2i + 1. Otherwise NEOX: i and i + d/2, as
            in transformers.
        divisors: its graph divides each frequency by `rope_freqs.weight`, where the file has it (src/models/llama.cpp
            passes them to ggml_rope_ext; src/models/qwen2.cpp and qwen3.cpp pass none, and a file with a tensor that
            nothing reads does not load).
    """

    name: str
    interleaved: bool
    divisors: bool


_LLAMA = Architecture("llama", interleaved=True, divisors=True)
_QWEN2 = Architecture("qwen2", interleaved=False, divisors=False)
_QWEN3 = Architecture("qwen3", interleaved=False, divisors=False)

# In the order of preference. Qwen2 is LLaMA with biases on queries, keys and values, which llama.cpp's "llama" reads
# too: frequencies that "qwen2" cannot say are said there.
_BY_TYPE = {
    "llama": (_LLAMA,),
    "mistral": (_LLAMA,),
    "qwen2": (_QWEN2, _LLAMA),
    "qwen3": (_QWEN3,),
}


def architectures_of(model: Any) -> tuple[Architecture, ...]:
    """The architectures under which llama.cpp can run a causal language model, best first.

    Raises:
        UnsupportedModelError: it cannot, or would compute something else.
    """
    config = model.config
    kind = config.model_type
    if kind not in _BY_TYPE:
        raise UnsupportedModelError(
            "no GGUF export for this model type",
            given=kind,
            allowed=sorted(_BY_TYPE),
            hint="export format='transformers' and convert it with llama.cpp's convert_hf_to_gguf.py",
        )
    if getattr(model, "lm_head", None) is None:
        raise UnsupportedModelError("GGUF export needs a causal language model", given=type(model).__name__)
    if config.hidden_act != "silu":
        raise UnsupportedModelError("llama.cpp computes silu here", given=f"hidden_act={config.hidden_act!r}")
    window = _window(config)
    length = config.max_position_embeddings
    if window is not None and window < length:
        raise UnsupportedModelError(
            "llama.cpp computes full attention in this architecture, and the model has a sliding window",
            given=f"{window} of {length} tokens",
        )
    return _BY_TYPE[kind]


def _window(config: Any) -> int | None:
    """The sliding window in force in any layer, in tokens, or None."""
    window: int | None = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None)
    return window if layers is None or "sliding_attention" in layers else None


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in the order that a NORM rotation needs.

    Row i of a head goes to 2i and row i + d/2 to 2i + 1, so that rotating neighbours here is rotating halves there.

    Args:
        weight: [heads x d, ...], a weight or a bias.
        heads: number of heads in it.
    """
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)

"""The ways of computing the loss, by name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ropepatch.errors import DependencyError, OptionError, UnsupportedModelError
from ropepatch.training.loss.chunked import LogitRule
from ropepatch.training.loss.head import output_head

BACKENDS = ("auto", "chunked", "plain", "liger", "cce")

# Backend -> top module, package, and where the function is. Both need Triton, hence CUDA.
_KERNELS = {
    "liger": (
        "liger_kernel",
        "liger-kernel",
        "liger_kernel.transformers.functional",
        "liger_fused_linear_cross_entropy",
    ),
    "cce": ("cut_cross_entropy", "cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy"),
}


def choose_backend(name: str, model: Any) -> str:
    """The backend that `name` stands for on this model and its device.

    "auto" is a fused kernel on CUDA, where one is installed and the head is a plain linear layer; else "chunked"; and
    "plain" for a model that does not say which module makes its logits.

    Raises:
        OptionError: no such backend, or one that needs CUDA or a plain linear head.
        DependencyError: its package is not installed.
    """
    if name not in BACKENDS:
        raise OptionError("unknown loss", given=name, allowed=BACKENDS)
    if name in ("chunked", "plain"):
        return name
    try:
        head = output_head(model)
    except UnsupportedModelError:
        if name == "auto":
            return "plain"
        raise
    on_cuda = next(head.parameters()).device.type == "cuda"
    if name == "auto":
        usable = [kernel for kernel in _KERNELS if on_cuda and _installed(kernel) and _plain_linear(head)]
        return (*usable, "chunked")[0]
    if not on_cuda:
        raise OptionError(f"the loss {name!r} needs the model on a CUDA device", given=name, allowed="chunked, plain")
    if not _installed(name):
        raise DependencyError(f"the loss {name!r} is not installed", hint=f"run: pip install {_KERNELS[name][1]}")
    if not _plain_linear(head):
        raise OptionError(
            f"the loss {name!r} needs a head that is a plain linear layer",
            given=type(head).__name__,
            hint="train with `loss: chunked`",
        )
    return name


def fused_kernel(name: str, head: nn.Module, rule: LogitRule) -> Callable[[Tensor, Tensor], Tensor]:
    """The function from hidden states [N, D] and labels [N] to the summed loss, of "liger" or "cce"."""
    weight, bias = head.get_parameter("weight"), getattr(head, "bias", None)
    if bias is not None and rule.scale != 1.0:
        raise OptionError(f"the loss {name!r} cannot scale logits with a bias", hint="train with `loss: chunked`")

    _, _, module, function = _KERNELS[name]
    kernel = getattr(importlib.import_module(module), function)

    def loss(hidden: Tensor, labels: Tensor) -> Tensor:
        # A scale of the logits is one of the hidden states, and autocast does not reach into the kernels.
        scaled = hidden.to(weight.dtype) * rule.scale if rule.scale != 1.0 else hidden.to(weight.dtype)
        value: Tensor = kernel(scaled, weight, labels, bias=bias, softcap=rule.softcap, reduction="sum")
        return value.float()

    return loss


def _plain_linear(head: nn.Module) -> bool:
    # Not a subclass: adapters and quantised layers compute more than their weight says.
    return type(head) is nn.Linear


def _installed(name: str) -> bool:
    return importlib.util.find_spec(_KERNELS[name][0]) is not None

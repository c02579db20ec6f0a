"""The output head of a causal model: where it is, what the model does to its output, and how to compute in its place.

Everything goes through the model's own forward, by forward hooks. The loss is computed when the model reaches its head,
with the head's own weights in place (sharded weights are gathered then), and leaves as part of the output, so that
wrappers (DistributedDataParallel, FSDP) see a forward with a loss like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ropepatch.errors import UnsupportedModelError, VerificationError
from ropepatch.families._unwrap import host_of
from ropepatch.training.loss.chunked import LogitRule

_RULE = "_ropepatch_logit_rule"
_WAY_OUT = "train with `loss: plain`"


class Outcome(NamedTuple):
    """What a forward gave: the loss that was computed at the head, and the model's auxiliary loss, weighted, if any."""

    loss: Tensor
    auxiliary: Tensor | None


def output_head(model: Any) -> nn.Module:
    """The module that maps hidden states to logits, adapters included.

    Raises:
        UnsupportedModelError: the model has none.
    """
    head = host_of(model).get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise UnsupportedModelError(
            "the model does not say which module makes its logits",
            given=type(host_of(model)).__name__,
            hint=_WAY_OUT,
        )
    return head


def forward_to_head(model: nn.Module, inputs: dict[str, Tensor], compute: Callable[[Tensor], Tensor]) -> Outcome:
    """Run the model, with `compute` in place of its logits.

    Args:
        model: the model as it is trained, wrappers included.
        inputs: arguments of its forward, without labels.
        compute: from hidden states [B, L, D] to a scalar.

    Raises:
        VerificationError: the model did not call its head once, with hidden states of that shape.
    """
    host, head = host_of(model), output_head(model)
    losses: list[Tensor] = []
    outcomes: list[Outcome] = []

    def at_head(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = arguments[0] if arguments else None
        if not isinstance(hidden, Tensor) or hidden.shape[:-1] != inputs["input_ids"].shape:
            raise _strange("passes its head something other than one hidden state for each token")
        losses.append(compute(hidden))
        # The head still runs, on one token, so that the rest of the forward has logits to work on.
        return hidden[:, :1].detach(), *arguments[1:]

    def at_end(_: nn.Module, __: tuple[Any, ...], output: Any) -> dict[str, Tensor]:
        if len(losses) != 1:
            raise _strange(f"used its head {len(losses)} times in one forward")
        outcome = Outcome(losses[0], _auxiliary(host, output))
        outcomes.append(outcome)
        return {name: value for name, value in outcome._asdict().items() if value is not None}

    hooks = [head.register_forward_pre_hook(at_head), called_module(model).register_forward_hook(at_end, prepend=True)]
    try:
        output = model(**inputs, **without_cache(host))
    finally:
        for hook in hooks:
            hook.remove()
    if len(outcomes) != 1:
        raise _strange("does not run the hooks of its forward")
    # FSDP's policy may round what leaves the model, and with it every gradient; its own hooks are on what was there
    # before. DistributedDataParallel's are on what leaves.
    rounded = output["loss"].dtype != outcomes[0].loss.dtype
    return outcomes[0] if rounded else Outcome(output["loss"], output.get("auxiliary"))


def logit_rule(model: nn.Module) -> LogitRule:
    """What the model does to its head's output; measured once, by a forward of one token, and kept on the model.

    Raises:
        VerificationError: it is neither a scale nor a softcap.
    """
    host = host_of(model)
    if (known := getattr(host, _RULE, None)) is not None:
        return known
    seen: list[Tensor] = []

    def replace(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        # At least float32, so that the answer is exact whatever the model computes in.
        dtype = torch.promote_types(output.dtype, torch.float32)
        probe = torch.linspace(-50, 50, output.shape[-1], device=output.device, dtype=dtype)
        probe[0], probe[1] = _FAR, _NEAR
        seen.append(probe)
        return probe.expand_as(output)

    hook = output_head(model).register_forward_hook(replace)
    try:
        with evaluating(model), torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.long, device=input_device(host))
            answer = model(input_ids=ids, **without_cache(host))
    finally:
        hook.remove()
    logits = getattr(answer, "logits", None)
    if len(seen) != 1 or not isinstance(logits, Tensor) or logits.numel() != seen[0].numel():
        raise _strange("does not pass the output of its head on as logits")
    rule = _fit(seen[0], logits.flatten().to(seen[0].dtype))
    setattr(host, _RULE, rule)
    return rule


# Powers of two, so that dividing by them is exact.
_FAR, _NEAR = 2.0**17, 2.0**-10


def _fit(probe: Tensor, answer: Tensor) -> LogitRule:
    scale = float(answer[1]) / _NEAR
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    far = float(answer[0])
    rule = LogitRule(scale, None if abs(far - scale * _FAR) <= 1e-4 * abs(far) else far)
    if not (scale > 0 and far > 0 and torch.allclose(rule(probe), answer, rtol=1e-4, atol=1e-4)):
        raise _strange("changes its logits after the head in a way that is neither a scale nor a softcap")
    return rule


def called_module(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and its like, whose call is certain to go through its hooks."""
    while "module" in model._modules:
        model = model.get_submodule("module")
    return model


def without_cache(host: nn.Module) -> dict[str, bool]:
    """The argument that keeps a model from keeping its keys and values, where it takes one."""
    import inspect

    named = inspect.signature(type(host).forward).parameters
    return {"use_cache": False} if "use_cache" in named else {}


def input_device(host: Any) -> torch.device:
    """Where the model takes its token ids."""
    return next(host.get_input_embeddings().parameters()).device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, hence no random numbers drawn; every module's own mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _auxiliary(host: Any, output: Any) -> Tensor | None:
    """The auxiliary loss of a mixture of experts, times its coefficient, where the config asks for one."""
    value = getattr(output, "aux_loss", None)
    if not isinstance(value, Tensor):
        return None
    for owner in (host, host.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if (weight := getattr(owner, name, None)) is not None:
                return float(weight) * value
    raise _strange("has an auxiliary loss but no coefficient for it")


def _strange(what: str) -> VerificationError:
    return VerificationError(f"this model {what}", hint=_WAY_OUT)

"""Did the model follow? A patch that nobody reads is the commonest failure of this trade, and a silent one.

A forward of two tokens shows how the model calls its rotary modules; it is stopped as soon as each has been
called, which in most models is before the first layer. Then each module is asked for positions up to the target
length, and its answer is held against the closed form. A finished table has no such answer: there it is enough
that the module which holds it turns to NaN when the table does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ropepatch.errors import VerificationError
from ropepatch.families._rotary import owner_of, owners_of
from ropepatch.surgery._series_check import PAST, example
from ropepatch.surgery.frequencies import SitePlan


@dataclass
class _Call:
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


# Two tokens reach every rotary module but those that compress a window of tokens first.
_RUNS = (2, 256)


class _AllSeen(BaseException):
    """Not an Exception, so that a model's own error handling does not swallow it."""


def verify(host: nn.Module, plans: Sequence[SitePlan]) -> None:
    """Hold what the rotary modules emit against what the plans promise.

    Raises:
        VerificationError: a module was never called, or emits something else.
    """
    for owner, items in _by_owner(host, plans).items():
        calls = _calls(host, owner, items)
        for item in items:
            call = calls[item.site.path, item.site.layer_type]
            if item.site.kind == "frequencies":
                _check_emitted(host, item, call)
            else:
                _check_read(host, item, call)


def _by_owner(host: nn.Module, items: Sequence[SitePlan]) -> dict[str, list[SitePlan]]:
    owners: dict[str, list[SitePlan]] = {}
    for item in items:
        owners.setdefault(owner_of(host, item.site.path), []).append(item)
    return owners


def _calls(host: nn.Module, owner: str, items: Sequence[SitePlan]) -> dict[tuple[str, str | None], _Call]:
    """How the model calls the modules of `items`, seen from the smallest part that runs on token ids alone."""
    if any(isinstance(weight, DTensor) for weight in host.parameters()):
        # A sharded model runs only as a whole, on all ranks, and must not be stopped on the way.
        return {(item.site.path, item.site.layer_type): _usual_call(item) for item in items}
    # A decoder wants its encoder around it: where one part does not run by itself, the next larger one is tried.
    *inner, outermost = owners_of(host, owner)
    for place in inner:
        try:
            return _record_calls(host, place, items)
        except VerificationError as error:
            if error.__cause__ is None:
                raise
    return _record_calls(host, outermost, items)


def _usual_call(item: SitePlan) -> _Call:
    labels = {"layer_type": item.site.layer_type} if item.site.layer_type else {}
    return _Call((torch.zeros(1, 2, 1), torch.zeros(1, 2, dtype=torch.long)), labels)


def _record_calls(host: nn.Module, path: str, items: Sequence[SitePlan]) -> dict[tuple[str, str | None], _Call]:
    owner = host.get_submodule(path)
    wanted = {(item.site.path, item.site.layer_type): item for item in items}
    seen: dict[tuple[str, str | None], _Call] = {}
    handles = []

    def watch(site_path: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            del module, output
            labels = [label for place, label in wanted if place == site_path]
            spoken = [value for value in (*arguments, *keywords.values()) if isinstance(value, str)]
            for label in labels:
                if label is None or label in spoken:
                    seen.setdefault((site_path, label), _Call(arguments, keywords))
            if len(seen) == len(wanted):
                raise _AllSeen

        return hook

    for site_path in {item.site.path for item in items}:
        handles.append(host.get_submodule(site_path).register_forward_hook(watch(site_path), with_kwargs=True))
    try:
        for length in _RUNS:
            run_tokens(owner, length)
    except _AllSeen:
        pass
    except Exception as error:
        if len(seen) < len(wanted):
            raise VerificationError(
                f"the model could not be run on a few tokens to see whether the patch takes effect ({error})",
                hint="pass verify=False and check the model's outputs yourself",
            ) from error
    finally:
        for handle in handles:
            handle.remove()
    _lend_calls(wanted, seen)
    missing = [item.site.where for key, item in wanted.items() if key not in seen]
    if missing:
        raise VerificationError(
            "these rotary modules were changed, but the model never calls them: " + ", ".join(missing)
        )
    return seen


def _lend_calls(wanted: dict[tuple[str, str | None], SitePlan], seen: dict[tuple[str, str | None], _Call]) -> None:
    """A module that keeps several labels may use only one of them, as long as another module uses the rest."""
    spoken = {label for _, label in seen}
    for path, label in wanted.keys() - seen.keys():
        other = next((key for key in seen if key[0] == path), None)
        if other is not None and label in spoken:
            seen[path, label] = _relabelled(seen[other], other[1], label)


def _relabelled(call: _Call, old: str | None, new: str | None) -> _Call:
    def swap(value: Any) -> Any:
        return new if isinstance(value, str) and value == old else value

    return _Call(tuple(map(swap, call.arguments)), {name: swap(value) for name, value in call.keywords.items()})


def run_tokens(owner: nn.Module, length: int) -> Any:
    """One forward on `length` token ids, 0 and 1 in turn, without gradients and without touching the random state.

    A time-series model is given a whole context of its own.
    """
    config: Any = owner.config
    device = next((tensor.device for tensor in owner.parameters() if not tensor.is_meta), torch.device("cpu"))
    ids = torch.arange(length, device=device)[None] % 2
    inputs: dict[str, Any] = {"input_ids": ids}
    if getattr(owner, "main_input_name", "") == PAST:
        inputs = dict(example(owner))
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    if "use_cache" in inspect.signature(owner.forward).parameters:
        inputs["use_cache"] = False
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # forward, not __call__: a compiled call would compile a graph for two tokens.
        return owner.forward(**inputs)


def _check_read(host: nn.Module, item: SitePlan, call: _Call) -> None:
    module, name = host.get_submodule(item.site.path), item.site.name
    table: Tensor = getattr(module, name).detach()
    kept = table.clone()
    with torch.no_grad(), torch.random.fork_rng(devices=[table.device] if table.is_cuda else []):
        table.fill_(torch.nan)
        try:
            output = module(*call.arguments, **call.keywords)
        finally:
            table.copy_(kept)
    output = output[0] if isinstance(output, tuple) else output
    if not output.isnan().any():
        raise VerificationError(f"{item.site.where} was changed, but the model does not read it")


def _check_emitted(host: nn.Module, item: SitePlan, call: _Call) -> None:
    module = host.get_submodule(item.site.path)
    last = max(item.result.target_length - 1, 1)
    probe = torch.tensor([1, last])
    arguments = tuple(_at(probe, value) for value in call.arguments)
    keywords = {name: _at(probe, value) for name, value in call.keywords.items()}
    with torch.no_grad():
        emitted = module(*arguments, **keywords)
    angles = probe.float()[:, None] * item.result.inv_freq
    if not _agrees(emitted, angles, item.result.attention_scaling):
        raise VerificationError(
            f"{item.site.where} does not emit the frequencies that were written: the model keeps them elsewhere, or "
            "computes them anew"
        )


def _at(probe: Tensor, value: Any) -> Any:
    """Position ids replaced by the probe, activations by float32, everything else as the model passed it."""
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return value.float()
    return probe.to(value).expand(*value.shape[:-1], 2) if value.dim() else value


def _agrees(emitted: Any, angles_PF: Tensor, gain: float) -> bool:
    """Whether a rotary module's output is cos and sin (or their complex form) of the angles, in any usual layout.

    P: probe positions, F: planes. Angles near a million radians differ by rounding, hence the tolerance.
    """
    if isinstance(emitted, Tensor) and emitted.is_complex():
        emitted = (emitted.real, emitted.imag)
    if not (isinstance(emitted, tuple) and len(emitted) == 2 and all(isinstance(part, Tensor) for part in emitted)):
        return False
    layouts = (lambda t: t, lambda t: torch.cat((t, t), -1), lambda t: t.repeat_interleave(2, -1))
    for first, second in (
        (angles_PF.cos() * gain, angles_PF.sin() * gain),
        (angles_PF.sin() * gain, angles_PF.cos() * gain),
    ):
        for layout in layouts:
            if all(_same(part, layout(want)) for part, want in zip(emitted, (first, second), strict=True)):
                return True
    return False


def _same(part: Tensor, want_PD: Tensor) -> bool:
    part = part.detach().float().cpu().squeeze()
    while part.dim() > 2 and part.shape[0] > 0:
        part = part[0] if part.shape[-2:] == want_PD.shape else part.flatten(0, -2)[: len(want_PD)]
    return part.shape == want_PD.shape and torch.allclose(part, want_PD, atol=2e-2)

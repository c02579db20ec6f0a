"""Seeing how a model turns its queries and keys: one token, once with its own rotation and once with none.

With a single token the softmax has one entry, so whatever is done to queries and keys, all layers see the same hidden
states. The two runs then differ by the rotation alone, and every layer shows which frequencies turn which of its
dimensions, how they are paired, or that it turns none.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ropepatch.attention.interface import WatchedCall, watching
from ropepatch.attention.rotation import Layout, cos_sin, rotate
from ropepatch.attention.scheme import Rotary
from ropepatch.errors import RopepatchError, UnsupportedModelError

# Far enough for angles of every size, within any trained length.
_POSITION = 11


@dataclass(frozen=True)
class FoundLayer:
    """One attention module as the probe found it.

    Attributes:
        path: of the module, from the host.
        heads, head_dim: of its queries.
        site: index of the rotary site that turns it; None where nothing does.
        layout: which dimensions are turned.
        reach: the last tokens that a query sees, where a window or a chunk limits them; else None.
    """

    path: str
    heads: int
    head_dim: int
    site: int | None
    layout: Layout | None
    reach: int | None

    @property
    def local(self) -> bool:
        """It sees a window or a chunk only."""
        return self.reach is not None


def run(owner: nn.Module, ids: Tensor, **inputs: Any) -> Any:
    """One forward of the model's text part, without gradients and without touching the random state."""
    names = inspect.signature(type(owner).forward).parameters
    if "use_cache" in names:
        inputs.setdefault("use_cache", False)
    device = next((tensor.device for tensor in owner.parameters() if not tensor.is_meta), torch.device("cpu"))
    inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    training = owner.training
    owner.train(False)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # Not the compiled call, which would compile a graph for a few tokens; hooks do run.
            return owner._call_impl(input_ids=ids.to(device), **inputs)
    finally:
        if training:
            owner.train(True)


def tokens(owner: nn.Module, length: int) -> Tensor:
    """Token ids that embed to something: the padding token's row may be all zeros. int64, [1, length]."""
    config: Any = owner.config
    silent: set[Any] = set()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        silent.update(value if isinstance(value, list | tuple) else [value])
    size = int(getattr(config, "vocab_size", 0) or 12)
    usable = [token for token in range(3, size) if token not in silent] or [0]
    # Spread over the vocabulary: a text of special tokens is no place to look at a real model.
    return torch.tensor([[usable[(place * 7919 + len(usable) // 2) % len(usable)] for place in range(length)]])


def record(owner: nn.Module) -> list[WatchedCall]:
    """The attention calls of one token at a position of its own.

    Raises:
        UnsupportedModelError: the model takes no positions, or its attention cannot be watched.
    """
    if "position_ids" not in inspect.signature(type(owner).forward).parameters:
        raise UnsupportedModelError("the model's forward takes no position_ids")
    calls: list[WatchedCall] = []
    with watching(calls.append):
        try:
            run(owner, tokens(owner, 1), position_ids=torch.tensor([[_POSITION]]))
        except RopepatchError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"its attention cannot be taken over ({type(error).__name__}: {error})"
            ) from error
    if not calls:
        raise UnsupportedModelError("its attention does not go through transformers' attention interface")
    return calls


def compare(
    host: nn.Module,
    turned: Sequence[WatchedCall],
    still: Sequence[WatchedCall],
    sites: Sequence[str],
    rotaries: Sequence[Rotary],
) -> list[FoundLayer]:
    """What turns each attention module.

    Args:
        turned, still: the calls with the model's rotation, and with the same gain but no rotation.
        sites: module paths of the rotary sites.
        rotaries: their frequencies.

    Raises:
        UnsupportedModelError: a module attends both ways, or is turned in a way that no frequencies explain.
    """
    paths = {id(module): path for path, module in host.named_modules()}
    layers: dict[str, FoundLayer] = {}
    if [call.module for call in turned] != [call.module for call in still]:
        raise UnsupportedModelError("its attention is not called in the same way twice")
    for with_turn, without in zip(turned, still, strict=True):
        path = paths[id(with_turn.module)]
        if not with_turn.seen.causal:
            raise UnsupportedModelError(
                f"its attention ({path}) looks both ways, and the attention seam looks back only"
            )
        # A module that keeps frequencies of its own is turned by them; the rest share what lies outside.
        inside = [number for number, site in enumerate(sites) if f"{site}.".startswith(f"{path}.")]
        candidates = {number: rotaries[number] for number in inside or range(len(rotaries))}
        found = _explain(with_turn.query, with_turn.key, without.query, without.key, candidates)
        if found is None:
            raise UnsupportedModelError(
                f"its attention ({path}) turns queries and keys in a way that its frequencies do not explain"
            )
        site, layout = found
        seen = with_turn.seen
        layers[path] = FoundLayer(
            path,
            with_turn.query.shape[1],
            with_turn.query.shape[3],
            site,
            layout,
            seen.window if seen.window is not None else seen.chunk,
        )
    return list(layers.values())


def _explain(
    q: Tensor, k: Tensor, q_still: Tensor, k_still: Tensor, rotaries: Mapping[int, Rotary]
) -> tuple[int | None, Layout | None] | None:
    tolerance = 1e-4 if q.dtype == torch.float32 else 3e-2
    if not bool(q.any()) or not bool(k.any()):
        return None
    if _apart(q, q_still) == 0 and _apart(k, k_still) == 0:
        return None, None
    position = torch.tensor([[_POSITION]], device=q.device)
    best: tuple[float, int, Layout] | None = None
    for index, rotary in rotaries.items():
        dims = 2 * rotary.inv_freq.numel()
        if dims > q.shape[-1]:
            continue
        cos, sin = cos_sin(position, Rotary(rotary.inv_freq))
        for start in {0, q.shape[-1] - dims}:
            for interleaved in (False, True):
                for backward in (False, True):
                    layout = Layout(start, dims, interleaved, backward)
                    apart = max(
                        _apart(q, rotate(q_still, cos, sin, layout)), _apart(k, rotate(k_still, cos, sin, layout))
                    )
                    if best is None or apart < best[0]:
                        best = (apart, index, layout)
    if best is not None and best[0] <= tolerance:
        return best[1], best[2]
    return None


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp(min=1e-12))

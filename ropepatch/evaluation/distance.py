"""Where heads look: how attention spreads over distances, layer by layer and head by head.

For some queries of a text the attention weights are made, a few queries at a time, and added up by distance. A model
that is patched in the attention seam shows the scores of its scheme (rotations remapped, biases, windows, sinks); any
other is run through the seam's attention function meanwhile, which computes the same as its own.

Shapes: H query heads, N keys, n buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ropepatch.api import inspect
from ropepatch.attention import interface
from ropepatch.attention.blocks import weights
from ropepatch.attention.interface import WatchedCall
from ropepatch.attention.visibility import Visibility
from ropepatch.errors import DependencyError, PromptError, UnsupportedModelError, UsageError
from ropepatch.evaluation.limits import check_length
from ropepatch.evaluation.plain import full_logits
from ropepatch.evaluation.prompt import Ids, TextEncoder
from ropepatch.families import discover, host_of

Array = npt.NDArray[np.float64]

FIRST = 4
"""The first tokens of a text, which many heads use as a sink and which are therefore counted apart."""

# Scores of so many pairs are held at a time, float32.
_PAIRS = 2**24
_WAYS = ("sdpa", "eager", "flex_attention")


@dataclass(frozen=True, eq=False)
class LayerDistance:
    """Where the heads of one attention layer look, each number a mean over the sampled queries.

    Attributes:
        path: of the attention module.
        shares: [H, n], the share of attention on keys at each bucket of distances, the first tokens left out.
        first_tokens: [H], the share on the first tokens of the text, whatever their distance.
        learned_sink: [H], the share on a learned logit that carries no value. All of these sum to 1 for each head.
        beyond_trained: [H], the share on keys at distances of the trained length or more, the first tokens left out;
            None where the trained length is unknown.
        mean_distance: [H], tokens: 2^m - 1, where m is the mean of log2(1 + distance) under the weights on all keys
            but the first tokens. NaN for a head that looks at nothing else.
    """

    path: str
    shares: Array
    first_tokens: Array
    learned_sink: Array
    beyond_trained: Array | None
    mean_distance: Array


@dataclass(frozen=True, eq=False)
class DistanceProfile:
    """Where a model looks. Distances are those of the tokens in the text, also where a patch remaps them.

    Attributes:
        title: the model type, the patch and the length, for figures.
        length: tokens of the text.
        trained_length: of the model before any patch, in tokens, or None.
        queries: the sampled positions, ascending.
        buckets: the lowest distance of each bucket: 0, 1, 2, 4, 8, ...; a bucket ends where the next begins.
        layers: in the order in which the model calls them.
    """

    title: str
    length: int
    trained_length: int | None
    queries: tuple[int, ...]
    buckets: tuple[int, ...]
    layers: tuple[LayerDistance, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: `layers` is a list with the numbers of each layer's heads in lists."""
        return {
            "title": self.title,
            "length": self.length,
            "trained_length": self.trained_length,
            "queries": list(self.queries),
            "first_tokens": FIRST,
            "buckets": list(self.buckets),
            "layers": [
                {"path": layer.path} | {name: _plain(value) for name, value in vars(layer).items() if name != "path"}
                for layer in self.layers
            ],
        }

    def to_pandas(self) -> Any:
        """A table with one row a head: `layer`, `path`, `head`, the numbers of `LayerDistance`, and `from_0`, `from_1`,
        `from_2`, `from_4`, ...: the shares by the lowest distance of the bucket.

        Raises:
            DependencyError: pandas is missing.
        """
        try:
            import pandas as pd
        except ImportError:
            raise DependencyError("tables need pandas", hint="run: pip install 'ropepatch[eval]'") from None
        rows = []
        for number, layer in enumerate(self.layers):
            for head, shares in enumerate(layer.shares):
                row: dict[str, Any] = {"layer": number, "path": layer.path, "head": head}
                for name in ("mean_distance", "first_tokens", "learned_sink", "beyond_trained"):
                    values = getattr(layer, name)
                    row[name] = float("nan") if values is None else float(values[head])
                row |= {f"from_{low}": float(share) for low, share in zip(self.buckets, shares, strict=True)}
                rows.append(row)
        return pd.DataFrame(rows)


def _plain(values: Array | None) -> Any:
    # JSON has no NaN.
    if values is None or values.ndim == 0:
        return None if values is None or np.isnan(values) else float(values)
    return [_plain(part) for part in values]


def attention_distance(
    model: nn.Module,
    tokenizer_or_ids: Any,
    *,
    text: str | None = None,
    length: int | None = None,
    queries: int = 64,
) -> DistanceProfile:
    """Measure how the attention of a model spreads over distances, in one forward over one text.

    The queries are spread evenly over the second half of the text, so that each has at least half of it to look at.
    Weights are float32, whatever the model's dtype. A softcap of the model is applied also where its own attention
    implementation leaves it out.

    Args:
        model: a decoder-only language model, patched or not. Left as it was.
        tokenizer_or_ids: the model's tokenizer, with `text`; or token ids, [tokens] or [1, tokens].
        text: what to read.
        length: tokens to read, from the start; by default all.
        queries: how many positions to look from; fewer where the text is short.

    Raises:
        UsageError: a tokenizer without a text, ids with one, or fewer than one query.
        PromptError: the text has fewer tokens than `length`, or fewer than two.
        UnsupportedModelError: the model's attention does not go through transformers' attention interface, looks both
            ways, or the text is longer than its table of positions.
    """
    ids = _ids(tokenizer_or_ids, text, length)
    if isinstance(queries, bool) or not isinstance(queries, int) or queries < 1:
        raise UsageError("there must be queries to look from", given=queries, allowed="a whole number from 1")
    host: Any = host_of(model)
    if getattr(host.config, "is_encoder_decoder", False):
        raise UnsupportedModelError("distances need a decoder-only language model", given=type(host).__name__)
    check_length(model, len(ids))
    found = inspect(model)
    rows = np.unique(np.linspace(len(ids) // 2, len(ids) - 1, queries).round().astype(np.int64))
    watcher = _Watcher(host, torch.from_numpy(rows), _edges(len(ids)), found.trained_length)
    with _evaluating(model), _through_the_seam(host), interface.watching(watcher), torch.inference_mode():
        full_logits(model, ids, keep=1)
    if not watcher.layers:
        raise UnsupportedModelError("its attention does not go through transformers' attention interface")
    return DistanceProfile(
        title=f"{found.model_type}, {found.method or 'unpatched'}, {len(ids):,} tokens",
        length=len(ids),
        trained_length=found.trained_length,
        queries=tuple(rows.tolist()),
        buckets=tuple(watcher.edges.tolist()),
        layers=tuple(watcher.layers),
    )


def _ids(tokenizer_or_ids: Any, text: str | None, length: int | None) -> Ids:
    if callable(tokenizer_or_ids):
        if text is None:
            raise UsageError("a tokenizer needs a text to read", hint="pass text=..., or token ids")
        ids = TextEncoder(tokenizer_or_ids).encode(text).ids
    else:
        if text is not None:
            raise UsageError("token ids are the text already", hint="pass the tokenizer, or leave text out")
        ids = np.asarray(tokenizer_or_ids)
        ids = ids[0] if ids.ndim == 2 and ids.shape[0] == 1 else ids
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise PromptError(
                "these are no token ids of one text",
                given=f"{ids.dtype} {list(ids.shape)}",
                allowed="whole numbers, [tokens] or [1, tokens]",
            )
    wanted = len(ids) if length is None else length
    if not 2 <= wanted <= len(ids):
        raise PromptError("the text does not have so many tokens", given=wanted, allowed=f"2..{len(ids)}")
    return ids[:wanted].astype(np.int32)


def _edges(length: int) -> Tensor:
    """The lowest distance of each bucket, int64: 0, 1, 2, 4, ..., below `length`."""
    return torch.tensor([0, *(2**power for power in range((length - 1).bit_length()))])


class _Watcher:
    """Sums up each call of the attention function as it comes.

    Attributes:
        rows: the sampled queries, int64 [t].
        edges: the lowest distance of each bucket, int64 [n].
        layers: what was seen so far.
    """

    def __init__(self, host: nn.Module, rows: Tensor, edges: Tensor, trained_length: int | None) -> None:
        self.rows, self.edges, self.trained_length = rows, edges, trained_length
        self.layers: list[LayerDistance] = []
        self._paths = {id(module): path for path, module in host.named_modules()}
        # Layers of one kind share their mask, and with it the planning.
        self._cut: dict[int, tuple[Visibility, Visibility]] = {}

    def __call__(self, call: WatchedCall) -> None:
        path = self._paths[id(call.module)]
        if not call.seen.causal:
            raise UnsupportedModelError(f"its attention ({path}) looks both ways, and distances are those to the past")
        rows = self.rows.to(call.query.device)
        seen = self._cut.setdefault(id(call.seen), (call.seen, call.seen.of_queries(rows)))[1]
        heads, keys = call.query.shape[1], call.key.shape[2]
        tally = _Tally(heads, self.edges.to(rows.device), self.trained_length, sinks=call.layer.sinks is not None)
        block_size = max(1, _PAIRS // (heads * keys))
        for block, part, on_keys in weights(call.query[:, :, rows], call.key, call.layer, seen, block_size):
            tally.add(seen.q_positions[0, block.start : block.stop], seen.k_positions[0, part], on_keys[0])
        self.layers.append(tally.result(path, len(self.rows)))


class _Tally:
    """One layer's sums over queries, float64."""

    def __init__(self, heads: int, edges: Tensor, trained_length: int | None, *, sinks: bool) -> None:
        self.edges, self.trained_length, self.sinks = edges, trained_length, sinks
        zeros = torch.zeros(heads, dtype=torch.float64, device=edges.device)
        self.shares = torch.zeros(heads, len(edges), dtype=torch.float64, device=edges.device)
        self.total, self.first, self.beyond, self.logs = zeros, zeros, zeros, zeros

    def add(self, q_positions_t: Tensor, k_positions_n: Tensor, weights_Htn: Tensor) -> None:
        """Count the weights of some queries on some keys."""
        on_keys = weights_Htn.double()
        distance = (q_positions_t[:, None] - k_positions_n).clamp(min=0)
        rest = on_keys * (k_positions_n >= FIRST)
        bucket = torch.bucketize(distance, self.edges, right=True) - 1
        self.shares.index_add_(1, bucket.flatten(), rest.flatten(1))
        self.total = self.total + on_keys.sum((1, 2))
        self.first = self.first + (on_keys - rest).sum((1, 2))
        self.logs = self.logs + (rest * torch.log2(1 + distance.double())).sum((1, 2))
        if self.trained_length is not None:
            self.beyond = self.beyond + (rest * (distance >= self.trained_length)).sum((1, 2))

    def result(self, path: str, queries: int) -> LayerDistance:
        """The means."""
        shares, first, total, beyond = (
            (x / queries).cpu().numpy() for x in (self.shares, self.first, self.total, self.beyond)
        )
        return LayerDistance(
            path=path,
            shares=shares,
            first_tokens=first,
            learned_sink=np.clip(1.0 - total, 0.0, None) if self.sinks else np.zeros_like(total),
            beyond_trained=beyond if self.trained_length is not None else None,
            mean_distance=(torch.exp2(self.logs / self.shares.sum(1)) - 1).cpu().numpy(),
        )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _through_the_seam(host: Any) -> Iterator[None]:
    """Select the seam's attention function on a model that is not patched in the seam, and put its own back after."""
    from transformers import PreTrainedConfig

    held = (getattr(module, "config", None) for module in host.modules())
    configs = [config for config in held if isinstance(config, PreTrainedConfig)]
    if any(config._attn_implementation == interface.NAME for config in configs):
        yield
        return
    _check_attention(host)
    interface.register()
    selected = {id(config): (config, config._attn_implementation) for config in configs}
    try:
        for config, own in selected.values():
            if own in _WAYS:
                # The private field: the public setter would also change the sub-configs, which are in the list.
                config._attn_implementation_internal = interface.NAME
        yield
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"its attention cannot be watched: {error.message}") from error
    finally:
        for config, own in selected.values():
            config._attn_implementation_internal = own


def _check_attention(host: Any) -> None:
    own = host.config._attn_implementation
    if own not in _WAYS:
        raise UnsupportedModelError(
            f"the model runs its attention through {own!r}, which shows nothing of its weights",
            allowed=_WAYS,
            hint="load the model with attn_implementation='sdpa'",
        )
    if any(site.kind == "slopes" for site in discover(host)):
        raise UnsupportedModelError(
            f"the ALiBi attention of {host.config.model_type} does not go through transformers' attention interface",
            hint="ropepatch.patch(model, 'alibi') first: with factor=1 it computes the same, and can be watched",
        )

"""Context parallelism: several processes share one sequence, each computes its slice, attention sees all of it.

It works through the attention interface, for models on transformers' own attention (with a patch of the frequencies
or embeddings seam, or none) and for models that are patched in the attention seam alike. Everything but attention is
done token by token, so a slice needs its neighbours there and nowhere else. The gradient of a step is the sum of the
processes' gradients.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ropepatch.attention import interface
from ropepatch.attention.part import Part
from ropepatch.attention.scheme import unrotated
from ropepatch.errors import OptionError, UnsupportedModelError, UsageError, VerificationError
from ropepatch.families._native import PER_CALL_TYPES
from ropepatch.families._unwrap import host_of
from ropepatch.training.parallel.exchange import HeadsTravel, KeysTravel
from ropepatch.training.parallel.slices import Whole, balanced_slots, contiguous_slots, whole_of

Mode = Literal["all_gather", "ulysses"]
NAME = "ropepatch_parallel"
_WAYS = ("sdpa", "eager")


class ContextParallel:
    """One process's part in a group that shares sequences.

    `attach` the model, then for every batch: `shard` it, and call the model on what comes back. A batch must be the
    same on all processes of the group.

    Args:
        rank: of this process in the group.
        size: processes of the group.
        group: of torch.distributed.
        mode: "all_gather": every process gets the keys and values of all tokens; memory for these grows with the
            whole sequence. "ulysses": every process attends for its share of the heads; `size` must divide them.

    Raises:
        OptionError: a rank or mode that does not exist.
    """

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup, mode: Mode = "all_gather") -> None:
        if mode not in ("all_gather", "ulysses"):
            raise OptionError("unknown context_mode", given=mode, allowed=("all_gather", "ulysses"))
        if not 0 <= rank < size:
            raise OptionError("no such process in a context group", given=rank, allowed=f"0..{size - 1}")
        self.rank, self.size, self.group, self.mode = rank, size, group, mode
        self._whole: Whole | None = None
        self._owner: nn.Module | None = None
        self._configs: list[tuple[Any, str]] = []
        self._handles: list[Any] = []
        self._running: list[Part] = []
        self._plain = unrotated()
        self._heads = HeadsTravel(group)

    @classmethod
    def start(cls, size: int, mode: Mode = "all_gather") -> ContextParallel:
        """Groups of `size` successive processes each; every process of the run must call it, in the same order.

        Raises:
            UsageError: torch.distributed has not been initialised.
            OptionError: `size` does not divide the number of processes.
        """
        if not (dist.is_available() and dist.is_initialized()):
            raise UsageError(
                "context parallelism needs several processes",
                given="one process",
                hint=f"launch with: torchrun --nproc_per_node {size} -m ropepatch.training RECIPE",
            )
        world, rank = dist.get_world_size(), dist.get_rank()
        if world % size:
            raise OptionError(
                "context_parallel does not divide the number of processes", given=size, allowed=f"divisors of {world}"
            )
        groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
        return cls(rank % size, size, groups[rank // size], mode)

    def slots(self, length: int) -> list[Tensor]:
        """For each process of the group, the slots of its slice in a sequence of `length`, int64 [length / size]."""
        cut = contiguous_slots if self.mode == "ulysses" else balanced_slots
        return cut(length, self.size)

    def shard(self, batch: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """This process's slice of a batch; the next call of the model must be on it.

        A length that cannot be cut evenly is padded at the right; padding is seen by nothing and has no label.

        Args:
            batch: `input_ids`, and optionally `labels` (not shifted) or `shifted_labels`, `position_ids` and
                `attention_mask` (1 and 0, or document numbers on the attention seam), each [B, L].

        Returns:
            The same entries of the slice, always with `position_ids`; `labels` become `shifted_labels`, the token that
            each token predicts, so that no slice needs its neighbour's.

        Raises:
            OptionError: entries that cannot be split.
        """
        whole = whole_of(batch, self.size if self.mode == "ulysses" else 2 * self.size)
        self._whole = whole
        return whole.slice(self.slots(whole.input_ids.shape[1])[self.rank])

    def attach(self, model: Any, *, verify: bool = True) -> None:
        """Put the exchange into a model's attention, until `detach`. Every process of the group must call it.

        A patch that is made or undone later needs a `detach` before it and an `attach` after it.

        Args:
            model: a transformers model, or anything that wraps one.
            verify: run a few tokens on one process and on all, and compare.

        Raises:
            UsageError: it is attached already.
            UnsupportedModelError: the model's attention or rotation cannot be split.
            OptionError: ulysses with heads that cannot be shared out.
            VerificationError: the model mixes tokens elsewhere than in its attention. It is then as before.
        """
        if self._owner is not None:
            raise UsageError("a model is attached already", hint="call detach() first")
        host = host_of(model)
        owner = _owner(host)
        _refuse(owner)
        count = 8 * self.size + 1
        wanted = _hidden(owner, _tokens(owner, count)) if verify else None
        self._owner = owner
        try:
            self._select(owner)
            self._handles = [
                owner.register_forward_pre_hook(self._before, with_kwargs=True),
                owner.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            ]
            if wanted is not None:
                self._verify(owner, _tokens(owner, count), wanted)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Leave the model as it was. Without a model nothing happens."""
        for handle in self._handles:
            handle.remove()
        for config, way in self._configs:
            config._attn_implementation_internal = way
        self._handles, self._configs, self._owner, self._whole = [], [], None, None

    def _select(self, owner: nn.Module) -> None:
        if interface.OWNER in owner.__dict__:
            # The attention seam asks this call's part what to exchange.
            return
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(NAME, interface.attention)
        AttentionMaskInterface.register(NAME, interface.mask)
        configs = {id(c): c for m in owner.modules() if (c := getattr(m, "config", None)) is not None}
        for config in configs.values():
            if hasattr(config, "_attn_implementation_internal"):
                self._configs.append((config, config._attn_implementation_internal))
                # The private field: the public setter would also change the sub-configs, which are here themselves.
                config._attn_implementation_internal = NAME

    # -- around a call of the model

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        given = interface.arguments(module, args, kwargs)
        whole = self._whole
        if whole is None or not self._is_mine(whole, given):
            raise UsageError(
                "a model that shares its sequences with other processes was called on something else than a slice",
                hint="call it on what shard(batch) returned last, or detach() first",
            )
        if given.get("past_key_values") is not None:
            raise UsageError("a sequence that is shared by several processes cannot have a cache")
        stated = whole.stated and given.get("position_ids") is not None
        part = self._part(whole, stated=stated, seam=interface.OWNER in module.__dict__)
        interface.begin_part(part)
        self._running.append(part)
        return args, {**kwargs, "use_cache": False}

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        del module, args, kwargs, output
        if self._running:
            interface.end_part(self._running.pop())

    def _is_mine(self, whole: Whole, given: Mapping[str, Any]) -> bool:
        mine = whole.slice(self.slots(whole.input_ids.shape[1])[self.rank])
        # Some models take no positions.
        got = {name: given[name] for name in ("input_ids", "position_ids") if isinstance(given.get(name), Tensor)}
        return bool(got) and all(
            value.shape == mine[name].shape and bool((value == mine[name].to(value.device)).all())
            for name, value in got.items()
        )

    def _part(self, whole: Whole, *, stated: bool, seam: bool) -> Part:
        length = whole.input_ids.shape[1]
        slots = self.slots(length)
        mask = whole.attention_mask
        ulysses = self.mode == "ulysses"
        return Part(
            length=length,
            # Outside the seam the model rotates by itself, and attention counts in slots.
            position_ids=whole.position_ids if seam and stated else None,
            attention_mask=mask if mask is None or seam else mask.bool(),
            documents=whole.documents,
            queries=None if ulysses else slots[self.rank],
            exchange=self._heads if ulysses else KeysTravel(self.group, slots),
            scheme=None if seam else self._plain,
        )

    # -- is it the same model?

    def _verify(self, owner: nn.Module, tokens: Tensor, wanted: Tensor) -> None:
        part = self.shard({"input_ids": tokens})
        try:
            got = _hidden(owner, part.pop("input_ids"), **part)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"the model's attention cannot be split over processes: {error.message}",
                given=error.given,
                hint="set train.context_parallel to 1",
            ) from error
        assert self._whole is not None
        mine = self.slots(self._whole.input_ids.shape[1])[self.rank]
        real = mine < wanted.shape[1]
        self._whole = None
        apart = (got[:, real] - wanted[:, mine[real]]).abs().max() / wanted.abs().max().clamp(min=1e-12)
        # One verdict for all, so that none waits for another that has given up.
        worst = apart.nan_to_num(nan=torch.inf).to(_device(owner))
        dist.all_reduce(worst, dist.ReduceOp.MAX, group=self.group)
        exact = next(owner.parameters()).dtype in (torch.float32, torch.float64)
        exact = exact and not torch.is_autocast_enabled(_device(owner).type)
        tolerance = 1e-4 if exact else 5e-2
        if not float(worst) <= tolerance:
            raise VerificationError(
                "split over processes, this model does not give its own outputs: it mixes tokens elsewhere than in its "
                "attention, or in an attention that does not go through transformers' interface",
                given=f"relative difference {float(worst):.2g}",
                allowed=f"up to {tolerance:g}",
                hint="set train.context_parallel to 1",
            )


def _owner(host: Any) -> nn.Module:
    """The module whose call runs all the layers: the one that the attention seam watches, else the text decoder."""
    for module in host.modules():
        if interface.OWNER in module.__dict__:
            watched: nn.Module = module
            return watched
    decoder: nn.Module = host.get_decoder()
    return decoder


def _refuse(owner: nn.Module) -> None:
    config: Any = owner.config
    way = config._attn_implementation
    if interface.OWNER not in owner.__dict__ and way not in _WAYS:
        raise UnsupportedModelError(
            f"the model runs its attention through {way!r}, which cannot be split over processes",
            allowed=_WAYS,
            hint="load the model with attn_implementation='sdpa'",
        )
    for path, module in owner.named_modules():
        types = getattr(module, "rope_type", None)
        found = set(types.values()) if isinstance(types, dict) else {types}
        if not found.isdisjoint(PER_CALL_TYPES):
            raise UnsupportedModelError(
                f"{path} chooses its frequencies by the longest position of a call, and every process would choose "
                "others for its slice",
                given=sorted(map(str, found)),
                hint="patch the model with a method of ropepatch, on_scaled='replace'",
            )


def _device(module: nn.Module) -> torch.device:
    """Where a model's weights are."""
    return next(module.parameters()).device


def _tokens(owner: nn.Module, count: int) -> Tensor:
    """Token ids that are in every vocabulary and differ from their neighbours, [1, count]."""
    config: Any = owner.config
    vocabulary = int(getattr(config.get_text_config(), "vocab_size", 0) or 32)
    return (torch.arange(count, device=_device(owner))[None] * 7 + 3) % vocabulary


@torch.no_grad()
def _hidden(owner: nn.Module, input_ids: Tensor, **more: Tensor) -> Tensor:
    """The last hidden states, float32, CPU, [1, T, width], without dropout."""
    training = [module for module in owner.modules() if module.training]
    owner.eval()
    try:
        if "position_ids" in inspect.signature(type(owner).forward).parameters:
            more.setdefault("position_ids", torch.arange(input_ids.shape[1], device=input_ids.device)[None])
        else:
            more.pop("position_ids", None)
        output = owner(input_ids=input_ids, **more, use_cache=False)
    finally:
        for module in training:
            # Not train(): it would put the children in training too.
            module.training = True
    hidden: Tensor = output[0]
    return hidden.detach().float().cpu()

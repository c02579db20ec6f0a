"""Where transformers meets the seam: the attention function, the mask function, and the hooks around a model's call.

All three are registered or attached under one name. What a layer computes rides on the attention module itself, so
nothing here knows a model.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ropepatch import compat
from ropepatch.attention import blocks, chunked, flex
from ropepatch.attention.kept import drop_middle, kept_slots
from ropepatch.attention.layer import Layer
from ropepatch.attention.memo import MOST_QUERIES, CacheNotes
from ropepatch.attention.part import Part
from ropepatch.attention.positions import Places, locate, masked_documents
from ropepatch.attention.scheme import unrotated
from ropepatch.attention.visibility import Visibility
from ropepatch.errors import CacheError, UnsupportedModelError

NAME = "ropepatch"
SEAM = "ropepatch_seam"
LEARNED = "ropepatch_bias"
OWNER = "ropepatch_owner"
KERNEL = "ropepatch_kernel"


def register() -> None:
    """Make the name known to transformers; nothing changes for models that do not ask for it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


# -- what a call of the model says


@dataclass
class Call:
    """The arguments of the model's call that is running; those of the whole sequence where it holds a part of one."""

    position_ids: Tensor | None
    attention_mask: Any
    notes: CacheNotes | None
    cache: Any = None
    places: Places = field(default_factory=Places)
    part: Part | None = None


class _Running(threading.local):
    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.heard: Callable[[WatchedCall], None] | None = None


_RUNNING = _Running()


@dataclass
class Owner:
    """What the seam keeps on the module whose call it watches.

    Attributes:
        token: of the patch; a cache filled under one patch is of no use under another.
        keep: (first, last) slots that caches need to hold, or None.
        alive: caches that were filled under this patch.
    """

    token: str
    keep: tuple[int, int] | None = None
    alive: Any = field(default_factory=weakref.WeakSet, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"token": self.token, "keep": self.keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.token, self.keep, self.alive = state["token"], state["keep"], weakref.WeakSet()

    def retire(self) -> None:
        """Make caches that are still alive refuse further use: their keys are not rotated."""
        for cache in list(self.alive):
            cache.update = _retired


def _retired(*_: Any, **__: Any) -> Any:
    raise CacheError(
        "this cache was filled under a patch that has been undone: its keys are not rotated",
        hint="start with a new cache",
    )


@torch.compiler.disable
def before_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Forward pre-hook of the model that owns the rotary modules."""
    # First of all: the hook after the call takes it off again, however the call ends.
    call = Call(None, None, None)
    _RUNNING.calls.append(call)
    owner: Owner = module.__dict__[OWNER]
    config: Any = module.config
    if config._attn_implementation != NAME:
        raise UnsupportedModelError(
            "the attention implementation of a patched model was changed, which takes its positions away",
            given=config._attn_implementation,
            hint="call ropepatch.unpatch(model) first, or leave the attention implementation alone",
        )
    given = arguments(module, args, kwargs)
    if given.get("output_attentions") or getattr(config, "output_attentions", False):
        raise UnsupportedModelError(
            "a model patched in the attention seam never makes its attention weights, so it cannot give them out",
            hint="leave output_attentions out",
        )
    cache = given.get("past_key_values", given.get("cache_params"))
    call.position_ids, call.attention_mask, call.cache = given.get("position_ids"), given.get("attention_mask"), cache
    call.notes = _notes_of(cache, owner)
    seen = _seen(call.attention_mask, call, given)
    if seen is call.attention_mask:
        return None
    if "attention_mask" in kwargs:
        return args, {**kwargs, "attention_mask": seen}
    place = _names(module).index("attention_mask")
    return (*args[:place], seen, *args[place + 1 :]), kwargs


@torch.compiler.disable
def after_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the same module; called also when the forward failed, with no output."""
    del args, kwargs
    call = _RUNNING.calls.pop()
    if output is None or call.notes is None or call.part is not None:
        return
    owner: Owner = module.__dict__[OWNER]
    cache = call.cache
    if cache is None:
        cache = getattr(output, "past_key_values", None)
    if cache is None and isinstance(output, tuple):
        cache = next((part for part in output if hasattr(part, "get_mask_sizes")), None)
    if cache is None or not hasattr(cache, "get_seq_length"):
        return
    notes, places = call.notes, call.places
    notes.attach(cache, owner.alive)
    if owner.keep is not None:
        drop_middle(cache, places, *owner.keep)
    if places.stated and places.positions is not None:
        notes.note(cache, places.positions[:, : _length(cache)])


def begin_part(part: Part) -> None:
    """Let the call of the model that begins now be one on a part of a sequence.

    Where the model has seams its own call has begun already; `end_part` ends the call of one that has none.
    """
    if part.scheme is not None:
        _RUNNING.calls.append(Call(part.position_ids, part.attention_mask, None, part=part))
        return
    call = _RUNNING.calls[-1]
    call.position_ids, call.attention_mask, call.part = part.position_ids, part.attention_mask, part


def end_part(part: Part) -> None:
    """The end of what `begin_part` has begun."""
    if part.scheme is not None:
        _RUNNING.calls.pop()


def _names(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's call by their names."""
    return {**dict(zip(_names(module), args, strict=False)), **kwargs} if args else kwargs


def _notes_of(cache: Any, owner: Owner) -> CacheNotes:
    if cache is None or not hasattr(cache, "get_seq_length"):
        # The call may make a cache of its own.
        return CacheNotes(owner.token)
    notes: CacheNotes | None = getattr(cache, "ropepatch_notes", None)
    if notes is None:
        if _length(cache) > 0:
            raise CacheError(
                "this cache was filled before the model was patched: its keys are rotated already",
                hint="start with a new cache",
            )
        notes = CacheNotes(owner.token)
    if _length(cache) == 0:
        # Reset, or never filled.
        notes.renew(owner.token)
    elif notes.token != owner.token:
        raise CacheError("this cache was filled under another patch", hint="start with a new cache")
    notes.attach(cache, owner.alive)
    notes.check(cache)
    notes.kept = kept_slots(cache)
    return notes


def _length(cache: Any) -> int:
    return int(cache.get_seq_length()) if cache is not None else 0


def _seen(outside: Any, call: Call, given: dict[str, Any]) -> Any:
    """A mask that goes past the mask function, with the positions of this call; any other as it is."""
    if isinstance(outside, dict):
        return {name: _seen(part, call, given) for name, part in outside.items()}
    if isinstance(outside, Visibility):
        # Made before the call (`generate` does so for static caches), when nothing was known of its positions.
        return mask(**outside.made_from) if outside.made_from is not None else outside
    if not isinstance(outside, Tensor) or outside.dim() == 2:
        return outside
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if outside.dim() != 4 or not isinstance(tokens, Tensor) or outside.shape[2] != tokens.shape[1]:
        raise UnsupportedModelError(
            "an attention mask of a shape that the attention seam does not know",
            given=list(outside.shape),
            allowed="[batch, tokens] or [batch or 1, heads or 1, queries, keys]",
        )
    if outside.dtype != torch.bool and not outside.is_floating_point():
        raise UnsupportedModelError(
            "a 4-D attention mask of a dtype that the attention seam does not know",
            given=outside.dtype,
            allowed="bool (True may see) or floating point (added to the scores)",
        )
    return _around(outside, call, past=_length(call.cache), batch=tokens.shape[0])


# -- the mask function


@torch.compiler.disable
def mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Any = None,
    device: Any = None,
    **more: Any,
) -> Visibility:
    """transformers' mask function: vectors instead of a matrix. Arguments as for its own mask functions."""
    if isinstance(attention_mask, Visibility):
        return attention_mask
    device = device if device is not None else getattr(attention_mask, "device", torch.device("cpu"))
    rule = compat.mask_rule(mask_function)
    call = _RUNNING.calls[-1] if _RUNNING.calls else None
    part = call.part if call is not None else None
    if part is not None:
        # transformers has seen a part only: of the whole, what it says of sizes, padding and documents is not true.
        q_length = kv_length = part.length
        attention_mask, rule = part.attention_mask, replace(rule, documents=part.documents)
        if rule.other or not rule.causal:
            raise UnsupportedModelError(
                "the model's attention mask is neither causal, a sliding window, chunks nor packed documents, so a "
                "sequence cannot be split over processes",
                hint="set train.context_parallel to 1",
            )
    # A static cache counts in a tensor that it goes on writing to.
    start = int(q_offset)
    stop = start + q_length
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": start,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "device": device,
        **more,
    }
    notes = call.notes if call is not None else None
    kept = notes.kept if notes is not None else None
    q_slots = torch.arange(start, stop, device=device)
    # Layers of a sliding window state an offset once they have let go of anything.
    if kept is not None and kv_offset == 0 and kv_length == kept.shape[0] + q_length:
        k_slots, total = torch.cat((kept.to(device), q_slots)), stop
    else:
        k_slots, total = torch.arange(kv_offset, kv_offset + kv_length, device=device), max(stop, kv_offset + kv_length)
    extra = None
    if rule.other:
        from transformers.masking_utils import sdpa_mask

        # An overlay that this seam does not know: transformers' own matrix says who sees whom.
        extra = sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
        if extra is not None and rule.causal:
            _refuse_ahead(extra, q_slots, k_slots)
    documents = None
    if rule.documents is not None:
        documents = rule.documents.to(device)
    elif attention_mask is not None:
        # transformers has made it boolean; the caller's own may number documents.
        stated = call.attention_mask if call is not None else None
        if not isinstance(stated, Tensor) or stated.shape != attention_mask.shape:
            stated = attention_mask
        longer = call is None or bool(getattr(call.cache, "is_compileable", False))
        documents = masked_documents(stated.to(device), batch=batch_size, stop=stop, total=total, longer=longer)
    places = locate(
        start=start,
        rows=q_length,
        total=total,
        batch=batch_size,
        given=call.position_ids if call is not None else None,
        known=notes.positions if notes is not None else None,
        documents=documents,
        by_reset=attention_mask is None,
        device=device,
    )
    if call is not None:
        call.places = places
    positions, documents = places.positions, places.documents
    seen = Visibility(
        q_positions=positions[:, start:stop] if positions is not None else q_slots[None],
        k_positions=positions[:, k_slots] if positions is not None else k_slots[None],
        q_slots=q_slots,
        k_slots=k_slots,
        q_documents=documents[:, start:stop] if documents is not None else None,
        k_documents=documents[:, k_slots] if documents is not None else None,
        window=rule.window,
        chunk=rule.chunk,
        extra=extra,
        causal=rule.causal,
        cache=notes,
        made_from=arguments if call is None else None,
        part=part,
    )
    return seen if part is None or part.queries is None else seen.of_queries(part.queries.to(device))


def _around(outside: Tensor, call: Call, past: int, batch: int) -> Visibility:
    """A finished [b, 1 or heads, T, N] mask with the positions of its rows and columns."""
    rows, columns = outside.shape[2], outside.shape[3]
    if columns < past + rows:
        raise UnsupportedModelError(
            "a mask with fewer columns than there are keys",
            given=list(outside.shape),
            allowed=f"at least {past + rows} columns",
        )
    device = outside.device
    places = call.places = locate(
        start=past,
        rows=rows,
        total=columns,
        batch=batch,
        given=call.position_ids,
        known=call.notes.positions if call.notes is not None else None,
        documents=None,
        by_reset=False,
        device=device,
    )
    slots = torch.arange(columns, device=device)
    positions = places.positions if places.positions is not None else slots[None]
    own = slice(past, past + rows)
    _refuse_ahead(outside, slots[own], slots)
    return Visibility(positions[:, own], positions, slots[own], slots, extra=outside, causal=True, cache=call.notes)


def _refuse_ahead(extra: Tensor, q_slots: Tensor, k_slots: Tensor) -> None:
    """A scheme speaks of earlier keys only: a mask that opens later ones has no meaning under it."""
    ahead = k_slots > q_slots[:, None]
    open_ = extra if extra.dtype == torch.bool else extra > torch.finfo(extra.dtype).min / 2
    if bool((open_ & ahead).any()):
        raise UnsupportedModelError(
            "a mask that lets tokens see later ones cannot go through the attention seam",
            hint="use a method of the frequencies seam",
        )


# -- the attention function


@torch.compiler.disable
def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function. Shapes: query [B, H, T, D], key [B, K, N, D], value [B, K, N, V].

    Returns:
        [B, T, H, V] and None for the weights, which are never made.
    """
    del is_causal  # The mask tells.
    for name in ("position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(f"the attention seam does not know what to do with {name!r}")
    if not isinstance(attention_mask, Visibility):
        raise UnsupportedModelError(
            "an attention layer of a patched model got a mask from elsewhere, so its positions are unknown",
            given=type(attention_mask).__name__ if attention_mask is None else list(attention_mask.shape),
        )
    seen, heard = attention_mask, _RUNNING.heard
    part = seen.part
    layer = Layer(
        scheme=part.scheme if part is not None and part.scheme is not None else unrotated(),
        scaling=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout if module.training else 0.0,
    )
    seam = module.__dict__.get(SEAM)
    number = None
    if seam is not None:
        layer = replace(layer, scheme=seam.scheme, rotary=seam.rotary, layout=seam.layout)
        layer = replace(layer, learned=getattr(module, LEARNED, None))
        number = seam.number
    elif heard is None and (part is None or part.scheme is None):
        raise UnsupportedModelError("an attention layer that the patch has not seen", given=type(module).__name__)
    if heard is not None:
        heard(WatchedCall(module, query.detach(), key.detach(), layer, seen))
    query, key, value = _as_autocast(query, key, value)
    # Scores and their statistics are float32 whatever autocast would make of the products.
    with _without_autocast(query.device):
        if part is not None:
            out = part.exchange(attend, query, key, value, layer, seen)
        else:
            kernel = module.__dict__.get(KERNEL, attend)
            out = kernel(query, key, value, layer, seen, number=number, layer_index=getattr(module, "layer_idx", None))
    return out.transpose(1, 2).contiguous(), None


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast all in its dtype, as torch's own attention has them: a rotation has made some of them float32."""
    kind = tensors[0].device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: Layer,
    seen: Visibility,
    *,
    number: int | None = None,
    layer_index: int | None = None,
) -> Tensor:
    """[B, H, T, V] by the cheapest kernel that can express the layer."""
    if seen.k_slots.shape[0] != key.shape[2] or seen.q_slots.shape[0] != query.shape[2]:
        raise UnsupportedModelError(
            "the mask does not fit the queries and keys",
            given=f"mask {list(seen.shape)}, queries {list(query.shape)}, keys {list(key.shape)}",
        )
    if seen.extra is not None and not (
        seen.extra.shape[0] in (1, query.shape[0]) and seen.extra.shape[1] in (1, query.shape[1])
    ):
        raise UnsupportedModelError(
            "a mask of another number of rows or heads",
            given=list(seen.extra.shape),
            allowed=f"[{query.shape[0]} or 1, {query.shape[1]} or 1, queries, keys]",
        )
    if flex.available(query.device) and flex.expresses(layer, seen):
        fused = flex.attend(query, key, value, layer, seen)
        if fused is not None:
            return fused
    bias = layer.scheme.bias
    general = (
        layer.softcap is not None
        or layer.dropout > 0
        or (bias is not None and bias.slopes is None)
        or (seen.extra is not None and (seen.extra.dtype != torch.bool or seen.extra.shape[1] > 1))
    )
    if general:
        return blocks.attend(query, key, value, layer, seen)
    memo = None
    if number is not None and seen.cache is not None and query.shape[2] <= MOST_QUERIES and not torch.is_grad_enabled():
        memo = seen.cache.memo(number, layer_index, key, seen)
    return chunked.attend(query, key, value, layer, seen, memo)


# -- looking at how a model calls its attention


@dataclass(frozen=True)
class WatchedCall:
    """One call of the attention function: the module, what it got, what it computes, and its mask."""

    module: nn.Module
    query: Tensor
    key: Tensor
    layer: Layer
    seen: Visibility


@contextmanager
def watching(heard: Callable[[WatchedCall], None]) -> Iterator[None]:
    """Tell `heard` of each call of the attention function in this thread, before it attends.

    Layers without a seam attend plainly meanwhile, instead of being refused.
    """
    before, _RUNNING.heard = _RUNNING.heard, heard
    try:
        yield
    finally:
        _RUNNING.heard = before

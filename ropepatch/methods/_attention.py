"""What a method file of the attention seam needs: the layer it is built for, option bases, and its registration."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from ropepatch.attention.scheme import Rotary, Scheme
from ropepatch.errors import OptionError
from ropepatch.methods._base import METHODS, MethodOptions, RotaryGeometry
from ropepatch.methods._tables import TableRule


@dataclass(frozen=True)
class LayerGeometry:
    """The attention layer that a scheme is built for.

    Attributes:
        length: trained length in tokens (L in the papers).
        heads: query heads.
        head_dim: size of a head.
        rotary: the rotary site of the layer (base frequencies included), None where the layer rotates nothing.
        gain: factor on cos and sin that the layer's own rotation has.
        both_ways: tokens see later ones too, as in encoders.
    """

    length: int
    heads: int
    head_dim: int
    rotary: RotaryGeometry | None = None
    gain: float = 1.0
    both_ways: bool = False


class SchemeOptions(MethodOptions):
    """Options that every method of the attention seam has."""

    logn: bool = Field(
        default=False,
        description="also multiply the scores of the query at i by max(1, ln(i + 1) / ln(trained length))",
    )


Build = Callable[[LayerGeometry, Any], Scheme]


@dataclass(frozen=True)
class AttentionMethod:
    """A registered method of the `attention` seam.

    Attributes:
        build: the pure function from a layer and the options to a scheme.
        target: (layer, options) to the length in tokens that the setting reaches, or None for "no limit of its own".
        learned: (layer, options) to a module that holds the learned part of the bias, one for each layer; its
            forward takes (q_positions [B, T], k_positions [B, N]) and returns [B, heads, T, N] float32. None: nothing
            is learned.
        finetune: what a user should know before using it untuned, or "".
        becomes: the mechanism that it puts in the place of the model's own, or None.
        rewrites: it computes frequencies of its own, so a native scaling or a base needs an explicit choice.
        table: what it makes of a position table; None: it has no such form.
    """

    name: str
    aliases: tuple[str, ...]
    options: type[MethodOptions]
    build: Build
    paper: str
    summary: str
    target: Callable[[LayerGeometry, Any], int | None]
    learned: Callable[[LayerGeometry, Any], nn.Module] | None = None
    finetune: str = ""
    becomes: str | None = None
    rewrites: bool = False
    rope_type: str | None = None
    mechanisms: tuple[str, ...] = ("rotary",)
    table: TableRule | None = None
    seam: ClassVar[str] = "attention"


def attention_method(
    name: str,
    *,
    options: type[SchemeOptions],
    paper: str,
    summary: str,
    target: Callable[[LayerGeometry, Any], int | None] | None = None,
    aliases: tuple[str, ...] = (),
    learned: Callable[[LayerGeometry, Any], nn.Module] | None = None,
    finetune: str = "",
    becomes: str | None = None,
    rewrites: bool = False,
    rope_type: str | None = None,
    mechanisms: tuple[str, ...] = ("rotary",),
    table: TableRule | None = None,
) -> Callable[[Build], Build]:
    """Register the decorated function as a method of the `attention` seam; arguments as in `AttentionMethod`."""

    def register(build: Build) -> Build:
        method = AttentionMethod(
            name,
            aliases,
            options,
            _with_logn(build),
            paper,
            summary,
            target or _no_limit,
            learned,
            finetune,
            becomes,
            rewrites,
            rope_type,
            mechanisms,
            table,
        )
        METHODS.register(name, aliases=aliases)(method)
        return build

    return register


def _no_limit(layer: LayerGeometry, options: Any) -> None:
    del layer, options


def _with_logn(build: Build) -> Build:
    def scaled(layer: LayerGeometry, options: Any) -> Scheme:
        scheme = build(layer, options)
        if options.logn and layer.both_ways:
            raise OptionError("logn goes by how much a query sees, which in an encoder is not told by its position")
        return replace(scheme, scale=logn_scale(layer.length)) if options.logn and scheme.scale is None else scheme

    return scaled


def logn_scale(length: int) -> Callable[[Tensor], Tensor]:
    """max(1, ln(i + 1) / ln(length)), float32: the attention of a longer context stays as sharp as the trained one's.

    Source: Su Jianlin, kexue.fm/archives/8823; Qwen uses it.

    Raises:
        OptionError: a trained length below 2.
    """
    if length < 2:
        raise OptionError("log-n scaling divides by the logarithm of the trained length", given=length, allowed=">= 2")
    log_length = math.log(length)
    return lambda positions: ((positions + 1).clamp(min=1).float().log() / log_length).clamp(min=1.0)


def own_rotary(layer: LayerGeometry) -> Rotary:
    """The layer's own frequencies and gain.

    Raises:
        OptionError: the layer rotates nothing.
    """
    if layer.rotary is None:
        raise OptionError("the layer has no rotary frequencies to start from")
    return Rotary(layer.rotary.inv_freq, layer.gain)


def floor_div(positions: Tensor, size: int) -> Tensor:
    """positions // size, also below zero."""
    return torch.div(positions, size, rounding_mode="floor")

"""What a method file needs: the option types, the geometry it computes from, and its registration.

A method is one function from a `RotaryGeometry` and its options to `Frequencies`. The maths is pure: CPU
tensors in, CPU tensors out, float32 at both ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ropepatch.errors import OptionError
from ropepatch.registry import Registry

if TYPE_CHECKING:
    from ropepatch.methods._tables import TableRule


@dataclass(frozen=True)
class RotaryGeometry:
    """Where one rotary site stands before a method is applied.

    Attributes:
        inv_freq: base inverse frequencies in radians per token, float32, CPU, shape [rotary_dim / 2].
            They are read from the model, so they need not be exactly rope_theta^(-2i/rotary_dim).
        rope_theta: base of the geometric series, above 1.
        rotary_dim: number of rotated dimensions of a head (d in the papers); even.
        head_dim: size of a whole head; rotary_dim < head_dim with partial rotary.
        original_length: trained length in tokens (L in the papers).

    Raises:
        OptionError: an odd rotary_dim, frequencies of another number, or numbers that no rotary site can have.
    """

    inv_freq: Tensor
    rope_theta: float
    rotary_dim: int
    head_dim: int
    original_length: int

    def __post_init__(self) -> None:
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise OptionError(
                "rotary dimensions are rotated in pairs", given=self.rotary_dim, allowed="an even number, at least 2"
            )
        if self.rotary_dim > self.head_dim:
            raise OptionError("more rotated dimensions than the head has", given=(self.rotary_dim, self.head_dim))
        if self.inv_freq.dtype != torch.float32 or tuple(self.inv_freq.shape) != (self.rotary_dim // 2,):
            raise OptionError(
                "inv_freq does not fit rotary_dim",
                given=f"{self.inv_freq.dtype} {list(self.inv_freq.shape)}",
                allowed=f"torch.float32 [{self.rotary_dim // 2}]",
            )
        if not bool(torch.isfinite(self.inv_freq).all()) or bool((self.inv_freq < 0).any()):
            raise OptionError("inverse frequencies must be finite and not negative", given=self.inv_freq.tolist())
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 1):
            raise OptionError("rope_theta must be finite and above 1", given=self.rope_theta)
        if self.original_length < 1:
            raise OptionError("the trained length must be positive", given=self.original_length, allowed=">= 1 token")


@dataclass(frozen=True)
class Frequencies:
    """What a method makes of a site.

    Attributes:
        inv_freq: new inverse frequencies, float32, CPU, shape [rotary_dim / 2].
        target_length: the length in tokens that the setting aims at.
        attention_scaling: gain on cos and on sin; attention logits scale by its square.
        softmax_gain: factor on the softmax scale of models whose attention modules carry YaRN's `mscale_all_dim`
            (DeepSeek's latent attention); other models ignore it, as transformers does.
        rope_parameters: how transformers spells the same thing (without `rope_theta` unless it changes), or
            None when it has no word of its own; the surgery then writes the frequencies as `longrope` factors.
    """

    inv_freq: Tensor
    target_length: int
    attention_scaling: float = 1.0
    softmax_gain: float = 1.0
    rope_parameters: dict[str, Any] | None = None


class MethodOptions(BaseModel):
    """Base of every option schema: unknown names are refused, values are checked, instances are frozen."""

    # strict: "4" and True are no numbers. Whole numbers still pass as floats.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


# Far beyond any use, and small enough that no length or base derived from a factor overflows.
MAX_FACTOR = 1e6
Factor = Annotated[float, Field(ge=1.0, le=MAX_FACTOR, description="target length / trained length")]


class FactorOptions(MethodOptions):
    """Options of a method that needs nothing but the factor."""

    factor: Factor


@dataclass(frozen=True)
class FrequencyMethod:
    """A registered method of the `frequencies` seam. `compute` is the pure function; `table` is what it makes of a
    position table, None where it has no such form."""

    name: str
    aliases: tuple[str, ...]
    options: type[MethodOptions]
    compute: Callable[[RotaryGeometry, Any], Frequencies]
    paper: str
    summary: str
    rope_type: str | None
    mechanisms: tuple[str, ...] = ("rotary",)
    table: TableRule | None = None
    seam: ClassVar[str] = "frequencies"


# Methods of every seam; the attention seam has a class of its own, in `_attention`.
METHODS: Registry[Any] = Registry("method", package="ropepatch.methods")


def frequency_method(
    name: str,
    *,
    options: type[MethodOptions],
    paper: str,
    summary: str,
    aliases: tuple[str, ...] = (),
    rope_type: str | None = None,
    mechanisms: tuple[str, ...] = ("rotary",),
    table: TableRule | None = None,
) -> Callable[[Callable[[RotaryGeometry, Any], Frequencies]], Callable[[RotaryGeometry, Any], Frequencies]]:
    """Register the decorated function as a method of the `frequencies` seam.

    Args:
        name: the word that users write.
        options: the schema of its options.
        paper: where the formula comes from ("arXiv 2309.00071").
        summary: one line for `ropepatch methods`.
        aliases: other words for the same.
        rope_type: transformers' own word, when it has one.
        mechanisms: what it can change.
        table: what it makes of a position table.
    """

    def register(compute: Callable[[RotaryGeometry, Any], Frequencies]) -> Callable[[RotaryGeometry, Any], Frequencies]:
        method = FrequencyMethod(name, aliases, options, compute, paper, summary, rope_type, mechanisms, table)
        METHODS.register(name, aliases=aliases)(method)
        return compute

    return register


def scaled_length(geometry: RotaryGeometry, factor: float) -> int:
    """`factor` times the trained length, in whole tokens."""
    return round(geometry.original_length * factor)


def implied_length(geometry: RotaryGeometry, log_factor: float) -> int:
    """The trained length times e^log_factor, in whole tokens, for options that imply a factor.

    Raises:
        OptionError: the factor would be absurd.
    """
    if log_factor > math.log(MAX_FACTOR):
        raise OptionError(
            "these options imply an absurd target length",
            given=f"e^{log_factor:.4g} trained lengths",
            allowed=f"up to {MAX_FACTOR:g}",
            hint="pass factor as well, which then states the target length",
        )
    return round(geometry.original_length * math.exp(log_factor))


def rebased(geometry: RotaryGeometry, rope_theta: float, stretch: Tensor) -> Tensor:
    """The frequencies of another base, float32, CPU, [rotary_dim / 2].

    Where the site's are the plain series of its rope_theta, these are the plain series of the new one, to the last bit
    as transformers computes it, so that a config with this base says the same. Elsewhere each is divided by `stretch`
    (float64, [rotary_dim / 2]) and rounded once.
    """
    if periods(geometry).dtype == torch.float64:
        return (geometry.inv_freq.double() / stretch).float()
    return 1.0 / plain_periods(geometry, rope_theta)


def periods(geometry: RotaryGeometry) -> Tensor:
    """1 / f_i, the tokens that each plane takes for one radian, shape [rotary_dim / 2].

    float32 rope_theta^(2i/d) where its reciprocal is the site's frequency in every plane to the last bit. That is the
    series transformers starts from, so a method that keeps to this dtype can round wherever transformers rounds.
    At any other site float64, whose reciprocal in float32 is the site's frequency to the last bit.
    """
    series = plain_periods(geometry)
    return series if torch.equal(1.0 / series, geometry.inv_freq) else 1.0 / geometry.inv_freq.double()


def plain_periods(geometry: RotaryGeometry, rope_theta: float | None = None) -> Tensor:
    """rope_theta^(2i/d), float32, CPU, shape [rotary_dim / 2]: the series that transformers starts from."""
    exponents = torch.arange(0, geometry.rotary_dim, 2, dtype=torch.float32) / geometry.rotary_dim
    return (geometry.rope_theta if rope_theta is None else rope_theta) ** exponents


def divided(period: Tensor, divisors: Sequence[float]) -> Tensor:
    """Frequencies of planes whose periods, shape [rotary_dim / 2], are multiplied by `divisors`; float32."""
    return (1 / (torch.tensor(divisors, dtype=period.dtype) * period)).float()

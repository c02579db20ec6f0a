"""FIRE: a small network of the distance, measured as a share of how far the query stands from the start."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor, nn

from ropepatch.attention.scheme import Scheme, unrotated
from ropepatch.errors import OptionError, UnsupportedModelError
from ropepatch.methods._attention import LayerGeometry, attention_method
from ropepatch.methods._bias import FINETUNE, SEED, LearnedBias, distances, without_autocast
from ropepatch.methods._swap import SwapOptions, swap_rule

# The published code starts at c = 0.1 and L = 512, for models trained on 2,048 tokens.
INITIAL_C = 0.1
INITIAL_THRESHOLD = 1 / 4


class FireOptions(SwapOptions):
    """Options of `fire`."""

    width: int = Field(default=32, ge=1, le=4096, description="hidden units of the network")
    threshold: float | None = Field(
        default=None,
        gt=0,
        description="tokens: queries before it measure distances against it instead of their own position; where "
        "learning starts, at most the trained length; by default a quarter of the trained length",
    )


class Fire(nn.Module):
    """MLP(psi(i - j) / psi(max(i, threshold))), psi(x) = log(c x + 1), one output a head.

    c = exp(log_c), and the threshold is its initial value x exp(log_multiplier), so both stay positive. The network
    has one hidden layer of rectified units; its weights start as torch.nn.Linear's do, the same in every layer of a
    model. They are plain tensors, for adapters and quantisers that collect every Linear must not find them.

    Args:
        heads: outputs.
        width: hidden units.
        threshold: its initial value in tokens.

    Attributes:
        log_c, log_multiplier: parameters, [].
        hidden_weight, hidden_bias: parameters, [width].
        out_weight, out_bias: parameters, [heads, width] and [heads]. All are float32 when made.
    """

    def __init__(self, heads: int, width: int, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.log_c = nn.Parameter(torch.tensor(math.log(INITIAL_C), dtype=torch.float32))
        self.log_multiplier = nn.Parameter(torch.tensor(0.0, dtype=torch.float32))
        generator = torch.Generator().manual_seed(SEED)
        self.hidden_weight = nn.Parameter(_uniform((width,), 1, generator))
        self.hidden_bias = nn.Parameter(_uniform((width,), 1, generator))
        self.out_weight = nn.Parameter(_uniform((heads, width), width, generator))
        self.out_bias = nn.Parameter(_uniform((heads,), width, generator))

    def forward(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """float32 [B, heads, T, N] from int64 [B, T] and [B, N]; the [B, width, T, N] in between is the peak."""
        with without_autocast(q_positions.device):
            share = normalised(
                # Pairs with j > i are invisible; the logarithm must be finite for them all the same.
                distances(q_positions, k_positions).clamp(min=0).float(),
                q_positions.float(),
                self.log_c.float().exp(),
                self.threshold * self.log_multiplier.float().exp(),
            )
            return network(
                share,
                self.hidden_weight.float(),
                self.hidden_bias.float(),
                self.out_weight.float(),
                self.out_bias.float(),
            )


def normalised(distance_BTN: Tensor, positions_BT: Tensor, c: Tensor, threshold: Tensor) -> Tensor:
    """psi(distance) / psi(max(position, threshold)), in [0, 1], [B, T, N]."""
    longest = torch.log1p(c * torch.maximum(positions_BT, threshold))
    return torch.log1p(c * distance_BTN) / longest[:, :, None]


def network(share_BTN: Tensor, weight_W: Tensor, bias_W: Tensor, out_weight_HW: Tensor, out_bias_H: Tensor) -> Tensor:
    """out_weight relu(weight share + bias) + out_bias, [B, H, T, N]."""
    # In place: these are the largest tensors of the method.
    hidden_BWTN = (weight_W[:, None, None] * share_BTN[:, None]).add_(bias_W[:, None, None]).relu_()
    return torch.einsum("hw,bwtn->bhtn", out_weight_HW, hidden_BWTN) + out_bias_H[:, None, None]


def _uniform(shape: tuple[int, ...], inputs: int, generator: torch.Generator) -> Tensor:
    draw = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return (2 * draw - 1) / math.sqrt(inputs)


def _threshold(layer: LayerGeometry, options: FireOptions) -> float:
    if options.threshold is None:
        return max(1.0, layer.length * INITIAL_THRESHOLD)
    if options.threshold > layer.length:
        raise OptionError(
            "the threshold of fire lies beyond the trained length, where no query would train the interpolation",
            given=options.threshold,
            allowed=f"at most {layer.length} tokens",
            hint="leave threshold out to start at a quarter of the trained length",
        )
    return options.threshold


@attention_method(
    "fire",
    options=FireOptions,
    paper="arXiv 2310.04418",
    summary="no rotation; a learned function of log distance over log position is added to the scores",
    learned=lambda layer, options: Fire(layer.heads, options.width, _threshold(layer, options)),
    finetune=FINETUNE,
    becomes="relative_bias",
    mechanisms=("rotary", "alibi", "learned", "sinusoidal"),
    table=swap_rule("factor"),
)
def fire(layer: LayerGeometry, options: FireOptions) -> Scheme:
    """bias_h(i, j) = MLP_h(psi(i - j) / psi(max(i, threshold))), computed by the learned part.

    The normaliser is the query's own position, so it does not depend on how long a call is.

    Raises:
        OptionError: a threshold above the trained length.
        UnsupportedModelError: an encoder.
    """
    if layer.both_ways:
        raise UnsupportedModelError(
            "fire measures a distance as a share of the query's position, and in an encoder tokens also look ahead",
            hint="'kerple' and 't5_bias' learn functions of the distance alone",
        )
    _threshold(layer, options)
    return unrotated(LearnedBias())

"""Rotary positions under linear attention, written two ways: in linear and in quadratic time.

    out_m = sum over n of <R_m phi(q_m), R_n phi(k_n)> v_n  /  sum over n of <phi(q_m), phi(k_n)>

The rotation turns the feature maps of the numerator and not the normaliser, whose terms stay positive; the weights are
then no probabilities: they may be negative, and need not add up to 1. Reference maths, for those who build such models.
Source: RoFormer, arXiv 2104.09864, section 3.3, equation 19; phi(x) = elu(x) + 1 by arXiv 2006.16236.

Shapes: * any leading dimensions, T queries, N keys, D a head's dimensions, d the rotated ones, V those of a value.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ropepatch.errors import OptionError
from ropepatch.methods._rotation import Layout, angles, rotate

FeatureMap = Callable[[Tensor], Tensor]


def positive_features(x: Tensor) -> Tensor:
    """elu(x) + 1, above 0 everywhere."""
    return F.elu(x) + 1


def rotary_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    *,
    causal: bool = True,
    features: FeatureMap = positive_features,
    layout: Layout = "half",
) -> Tensor:
    """Linear attention with rotary positions 0, 1, ..., in O(N) time; memory O(N D V) when causal, O(D V) when not.

    Args:
        q: queries, [*, T, D]; causal attention needs T = N.
        k: keys, [*, N, D].
        v: values, [*, N, V].
        inv_freq: radians per token, [d / 2].
        causal: the query at m sees keys 0 .. m only.
        features: phi, to positive numbers of the same shape.
        layout: which dimensions form a plane.

    Returns:
        [*, T, V] in v's dtype; computed in at least float32.

    Raises:
        OptionError: shapes that do not fit, or whatever `rotate` refuses.
    """
    phi_q, phi_k, turned_q, turned_k, values = _prepared(q, k, v, inv_freq, causal, features, layout)
    products = turned_k.unsqueeze(-1) * values.unsqueeze(-2) if causal else turned_k.transpose(-1, -2) @ values
    if causal:
        top = (turned_q.unsqueeze(-2) @ products.cumsum(-3)).squeeze(-2)
        bottom = (phi_q * phi_k.cumsum(-2)).sum(-1, keepdim=True)
    else:
        top = turned_q @ products
        bottom = (phi_q * phi_k.sum(-2, keepdim=True)).sum(-1, keepdim=True)
    return (top / bottom).to(v.dtype)


def rotary_linear_attention_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    *,
    causal: bool = True,
    features: FeatureMap = positive_features,
    layout: Layout = "half",
) -> Tensor:
    """The same by the matrix of all pairs, in O(T N) time and memory; arguments, result and errors as there."""
    phi_q, phi_k, turned_q, turned_k, values = _prepared(q, k, v, inv_freq, causal, features, layout)
    weights, normaliser = turned_q @ turned_k.transpose(-1, -2), phi_q @ phi_k.transpose(-1, -2)
    if causal:
        weights, normaliser = weights.tril(), normaliser.tril()
    return (weights @ values / normaliser.sum(-1, keepdim=True)).to(v.dtype)


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, inv_freq: Tensor, causal: bool, features: FeatureMap, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if k.shape[-2] != v.shape[-2] or q.shape[-1] != k.shape[-1]:
        raise OptionError("queries, keys and values do not fit", given=[list(x.shape) for x in (q, k, v)])
    if causal and q.shape[-2] != k.shape[-2]:
        raise OptionError("causal attention needs as many queries as keys", given=(q.shape[-2], k.shape[-2]))
    dtype = torch.promote_types(v.dtype, torch.float32)
    phi_q, phi_k = features(q.to(dtype)), features(k.to(dtype))
    turned_q, turned_k = (
        rotate(
            phi,
            angles(torch.arange(phi.shape[-2], device=phi.device), inv_freq.to(phi.device)).to(dtype),
            layout=layout,
            rotary_dim=2 * inv_freq.numel(),
        )
        for phi in (phi_q, phi_k)
    )
    return phi_q, phi_k, turned_q, turned_k, v.to(dtype)

"""Longer buckets for far distances: near ones keep their buckets, the logarithmic ones reach further."""

from __future__ import annotations

from ropepatch.methods._base import FactorOptions
from ropepatch.methods._buckets import Buckets, bucket_method


@bucket_method(
    "log_buckets",
    options=FactorOptions,
    paper="arXiv 1910.10683, its max_distance",
    summary="the distance from which all share the last bucket, times the factor; near buckets as they are",
)
def log_buckets(options: FactorOptions) -> Buckets:
    """max_distance x s in the logarithmic part of the buckets; the exact buckets of near distances do not change."""
    return Buckets(stretch=options.factor)

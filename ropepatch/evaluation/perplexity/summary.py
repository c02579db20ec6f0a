"""From documents to a summary: perplexity, bits per byte, loss by position, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ropepatch.evaluation.summary import run_title, trained_length

Row = Mapping[str, Any]


def loss_interval(nll: Sequence[float], tokens: Sequence[int]) -> tuple[float, float] | None:
    """95 % interval of the mean loss per token, documents taken as the sample.

    The mean is a ratio of two sums over documents; its variance is that of the linearised ratio (delta method, W. G.
    Cochran, Sampling Techniques, 1977, chapter 6), the quantile Student's with one degree of freedom less than there
    are documents.

    Args:
        nll: of each document, nats.
        tokens: of each document.

    Returns:
        (low, high) in nats per token; None for fewer than two documents.
    """
    n = len(nll)
    if n < 2:
        return None
    from scipy.stats import t

    sums, counts = np.asarray(nll, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    mean = sums.sum() / counts.sum()
    deviation = math.sqrt(n / (n - 1) * float(((sums - mean * counts) ** 2).sum())) / counts.sum()
    half = float(t.ppf(0.975, n - 1)) * deviation
    return float(mean - half), float(mean + half)


def perplexity_of(loss: float | None) -> float | None:
    """exp of a loss in nats; None for None, and beyond the largest number: the interval of two or three documents, or
    a model that is wholly broken."""
    return None if loss is None or loss > 700 else math.exp(loss)


def summarise(rows: Sequence[Row], configuration: Mapping[str, Any], *, title: str | None = None) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        rows: one for each document: `answer` (its name), `nll` (nats, summed), `tokens_scored`, `bytes`, `correct`
            (share of tokens that were the most likely ones), `by_position`, and what the form adds.
        configuration: what was asked.
        title: what to call the run; default by its patch.

    Returns:
        Plain data. `perplexity` is exp of the mean loss over all tokens of all documents; `ci_low` and `ci_high` are
        its 95 % interval over documents, None with a single one; `by_position` are buckets of the token's place in
        the model's input; `by_length` the perplexity at each context length; `documents` one entry each.
    """
    rows = sorted(rows, key=lambda row: row["trial"])
    nll, tokens = [row["nll"] for row in rows], [row["tokens_scored"] for row in rows]
    by_position = _together(rows, "by_position", ("start", "end"))
    summary = {
        "task": configuration.get("task"),
        "title": run_title(configuration) if title is None else title,
        "trained_length": trained_length(configuration),
        "trials": len(rows),
        **{name: configuration.get(name) for name in ("form", "window", "stride", "max_tokens", "bos", "bos_token")},
        **_mean(nll, tokens),
        "interval": _interval_words(len(rows)),
        "bits_per_byte": sum(nll) / math.log(2) / sum(row["bytes"] for row in rows),
        "tokens_scored": sum(tokens),
        "bytes_scored": sum(row["bytes"] for row in rows),
        "accuracy": sum(row["correct"] * row["tokens_scored"] for row in rows) / sum(tokens),
        "by_position": by_position,
        "documents": [_document(row, by_position) for row in rows],
        "cells": [],
        "by_length": _by_length(rows, configuration),
        "effective_length": None,
        "effective_length_relative": None,
    }
    if configuration.get("short_context") is not None:
        summary["long_short"] = _long_short(rows, configuration["short_context"])
    return summary


def _mean(nll: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    loss = sum(nll) / sum(tokens)
    low, high = (perplexity_of(bound) for bound in loss_interval(nll, tokens) or (None, None))
    return {"loss": loss, "perplexity": perplexity_of(loss), "ci_low": low, "ci_high": high}


def _interval_words(documents: int) -> str:
    if documents < 2:
        return "none: an interval over documents takes at least two"
    return f"95 %, over {documents} documents (linearised ratio, Student's t)"


def _together(rows: Iterable[Row], name: str, key: tuple[str, ...]) -> list[dict[str, Any]]:
    """Entries of all documents that have the same key, in its order."""
    groups: dict[tuple[int, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        for entry in row[name]:
            groups.setdefault(tuple(entry[part] for part in key), []).append(entry)
    return [
        {
            **dict(zip(key, place, strict=True)),
            "n": len(group),
            "tokens": sum(entry["tokens"] for entry in group),
            **_mean([entry["nll"] for entry in group], [entry["tokens"] for entry in group]),
        }
        for place, group in sorted(groups.items())
    ]


def _document(row: Row, by_position: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    loss = row["nll"] / row["tokens_scored"]
    own = {entry["start"]: entry["nll"] / entry["tokens"] for entry in row["by_position"]}
    return {
        "name": row["answer"],
        "tokens": row["tokens_scored"],
        "loss": loss,
        "perplexity": perplexity_of(loss),
        "bits_per_byte": row["nll"] / math.log(2) / row["bytes"],
        "loss_by_position": [own.get(bucket["start"]) for bucket in by_position],
    }


def _by_length(rows: Sequence[Row], configuration: Mapping[str, Any]) -> list[dict[str, Any]]:
    if configuration.get("form") == "single_pass":
        return _together(rows, "by_context", ("length",))
    nll, tokens = [row["nll"] for row in rows], [row["tokens_scored"] for row in rows]
    return [{"length": configuration.get("window"), "n": len(rows), "tokens": sum(tokens), **_mean(nll, tokens)}]


def _long_short(rows: Sequence[Row], context: int) -> dict[str, Any]:
    parts = [row["long_short"] for row in rows]
    tokens, key = sum(part["tokens"] for part in parts), sum(part["key_tokens"] for part in parts)
    return {
        "short_context": context,
        "tokens": tokens,
        "mean_gain": sum(part["gain"] for part in parts) / tokens if tokens else None,
        "key_tokens": key,
        "key_perplexity": perplexity_of(sum(part["key_nll"] for part in parts) / key) if key else None,
    }

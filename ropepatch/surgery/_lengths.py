"""Which lengths a config states, and under what name."""

from __future__ import annotations

from typing import Any

from ropepatch.errors import OptionError

# In the order of trust. n_positions and others are also reached through transformers' attribute_map.
LENGTH_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "max_source_positions",
)
# Beside these, what states the rows of one of several position tables.
TABLE_LENGTH_NAMES = (
    *LENGTH_NAMES,
    "max_target_positions",
    "max_encoder_position_embeddings",
    "max_decoder_position_embeddings",
)


def length_name(config: Any) -> str | None:
    """The attribute under which a config states its maximal length, or None."""
    return next((name for name in LENGTH_NAMES if isinstance(getattr(config, name, None), int)), None)


def stated_length(config: Any) -> int | None:
    """The maximal length that a config states, in tokens, or None."""
    name = length_name(config)
    length = getattr(config, name) if name else None
    return length if isinstance(length, int) and length > 0 else None


def trained_length(config: Any, scaling: dict[str, Any] | None, on_scaled: str | None) -> int:
    """The length that a method starts from, in tokens.

    A checkpoint with a native scaling was pretrained at its `original_max_position_embeddings`; when the patch
    multiplies that scaling, the length it reaches with it is what the patch starts from.

    Raises:
        OptionError: the config does not say.
    """
    stated = stated_length(config)
    if scaling:
        original: int | None = scaling.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        factor = float(scaling.get("factor") or 1.0)
        if original and on_scaled == "multiply":
            return max(stated or 0, round(original * factor))
        if original:
            return int(original)
        if stated and on_scaled == "replace":
            raise OptionError(
                "the checkpoint's native scaling hides its trained length",
                hint="pass original_length=... (tokens seen in pretraining)",
            )
    if stated is None:
        raise OptionError("the config does not state a trained length", hint="pass original_length=... (tokens)")
    return stated

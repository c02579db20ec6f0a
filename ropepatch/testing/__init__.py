"""Tiny random models of every transformers text model, for tests and the support matrix."""

from __future__ import annotations

from ropepatch.testing.tiny import forward_logits, model_types, tiny_config, tiny_inputs, tiny_model

__all__ = ["forward_logits", "model_types", "tiny_config", "tiny_inputs", "tiny_model"]

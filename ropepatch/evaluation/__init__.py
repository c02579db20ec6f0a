"""Evaluation: how far a model reaches, measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ropepatch.evaluation.result import EvaluationResult as EvaluationResult
    from ropepatch.evaluation.runner import evaluate as evaluate

__all__ = ["EvaluationResult", "evaluate"]


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from ropepatch.evaluation.runner import evaluate

        return evaluate
    if name == "EvaluationResult":
        from ropepatch.evaluation.result import EvaluationResult

        return EvaluationResult
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

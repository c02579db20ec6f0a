"""Evaluation: how far a model reaches, measured."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ropepatch.evaluation.distance import DistanceProfile as DistanceProfile
    from ropepatch.evaluation.distance import attention_distance as attention_distance
    from ropepatch.evaluation.matrix import MatrixResult as MatrixResult
    from ropepatch.evaluation.matrix import evaluate_matrix as evaluate_matrix
    from ropepatch.evaluation.result import EvaluationResult as EvaluationResult
    from ropepatch.evaluation.runner import evaluate as evaluate
    from ropepatch.evaluation.served import ServedModel as ServedModel

_HOMES = {
    "DistanceProfile": "distance",
    "EvaluationResult": "result",
    "MatrixResult": "matrix",
    "ServedModel": "served",
    "attention_distance": "distance",
    "evaluate": "runner",
    "evaluate_matrix": "matrix",
}

__all__ = [
    "DistanceProfile",
    "EvaluationResult",
    "MatrixResult",
    "ServedModel",
    "attention_distance",
    "evaluate",
    "evaluate_matrix",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

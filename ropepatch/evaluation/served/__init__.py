"""Suites of prompts on a model behind an OpenAI-compatible endpoint: `ServedModel` stands where a model would."""

from __future__ import annotations

from ropepatch.evaluation.served.job import ServedJob as ServedJob
from ropepatch.evaluation.served.job import served_job as served_job
from ropepatch.evaluation.served.model import ServedModel as ServedModel

__all__ = ["ServedJob", "ServedModel", "served_job"]

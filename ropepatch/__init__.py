"""ropepatch: change how far a Hugging Face transformer reaches, in one line, and measure what it did.

    import ropepatch

    model = ropepatch.patch(model, "yarn", factor=4)
    print(ropepatch.inspect(model))
    ropepatch.unpatch(model)

Names are loaded on first use (PEP 562), so `import ropepatch` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ropepatch.compat import check_versions

if TYPE_CHECKING:
    from ropepatch.api import MethodInfo as MethodInfo
    from ropepatch.api import inspect as inspect
    from ropepatch.api import methods as methods
    from ropepatch.api import patch as patch
    from ropepatch.api import patched as patched
    from ropepatch.api import record_of as record_of
    from ropepatch.api import unpatch as unpatch
    from ropepatch.errors import AlreadyPatchedError as AlreadyPatchedError
    from ropepatch.errors import AlreadyScaledError as AlreadyScaledError
    from ropepatch.errors import CacheError as CacheError
    from ropepatch.errors import DependencyError as DependencyError
    from ropepatch.errors import EndpointError as EndpointError
    from ropepatch.errors import ModelLoadError as ModelLoadError
    from ropepatch.errors import NotPatchedError as NotPatchedError
    from ropepatch.errors import OptionError as OptionError
    from ropepatch.errors import OutputConflictError as OutputConflictError
    from ropepatch.errors import OutputError as OutputError
    from ropepatch.errors import PromptError as PromptError
    from ropepatch.errors import RecordError as RecordError
    from ropepatch.errors import RegistryError as RegistryError
    from ropepatch.errors import RopepatchError as RopepatchError
    from ropepatch.errors import UnknownNameError as UnknownNameError
    from ropepatch.errors import UnsupportedModelError as UnsupportedModelError
    from ropepatch.errors import UsageError as UsageError
    from ropepatch.errors import VerificationError as VerificationError
    from ropepatch.evaluation import EvaluationResult as EvaluationResult
    from ropepatch.evaluation import ServedModel as ServedModel
    from ropepatch.evaluation import evaluate as evaluate
    from ropepatch.evaluation import evaluate_matrix as evaluate_matrix
    from ropepatch.evaluation.compare import compare as compare
    from ropepatch.evaluation.overview import overview as overview
    from ropepatch.exporting import Exported as Exported
    from ropepatch.exporting import export as export
    from ropepatch.inspection import Inspection as Inspection
    from ropepatch.loading import load_model as load_model
    from ropepatch.saving import from_pretrained as from_pretrained
    from ropepatch.saving import save_pretrained as save_pretrained

__version__ = "0.1.0"

# Public name -> the module that defines it. `methods` is not here: see _MethodsPackage.
_HOMES = {
    "AlreadyPatchedError": "ropepatch.errors",
    "AlreadyScaledError": "ropepatch.errors",
    "CacheError": "ropepatch.errors",
    "DependencyError": "ropepatch.errors",
    "EndpointError": "ropepatch.errors",
    "EvaluationResult": "ropepatch.evaluation",
    "Exported": "ropepatch.exporting",
    "Inspection": "ropepatch.inspection",
    "MethodInfo": "ropepatch.api",
    "ModelLoadError": "ropepatch.errors",
    "NotPatchedError": "ropepatch.errors",
    "OptionError": "ropepatch.errors",
    "OutputConflictError": "ropepatch.errors",
    "OutputError": "ropepatch.errors",
    "PromptError": "ropepatch.errors",
    "RecordError": "ropepatch.errors",
    "RegistryError": "ropepatch.errors",
    "RopepatchError": "ropepatch.errors",
    "ServedModel": "ropepatch.evaluation",
    "UnknownNameError": "ropepatch.errors",
    "UnsupportedModelError": "ropepatch.errors",
    "UsageError": "ropepatch.errors",
    "VerificationError": "ropepatch.errors",
    "compare": "ropepatch.evaluation.compare",
    "evaluate": "ropepatch.evaluation",
    "evaluate_matrix": "ropepatch.evaluation",
    "export": "ropepatch.exporting",
    "from_pretrained": "ropepatch.saving",
    "inspect": "ropepatch.api",
    "load_model": "ropepatch.loading",
    "overview": "ropepatch.evaluation.overview",
    "patch": "ropepatch.api",
    "patched": "ropepatch.api",
    "record_of": "ropepatch.api",
    "save_pretrained": "ropepatch.saving",
    "unpatch": "ropepatch.api",
}

__all__ = [
    "AlreadyPatchedError",
    "AlreadyScaledError",
    "CacheError",
    "DependencyError",
    "EndpointError",
    "EvaluationResult",
    "Exported",
    "Inspection",
    "MethodInfo",
    "ModelLoadError",
    "NotPatchedError",
    "OptionError",
    "OutputConflictError",
    "OutputError",
    "PromptError",
    "RecordError",
    "RegistryError",
    "RopepatchError",
    "ServedModel",
    "UnknownNameError",
    "UnsupportedModelError",
    "UsageError",
    "VerificationError",
    "__version__",
    "compare",
    "evaluate",
    "evaluate_matrix",
    "export",
    "from_pretrained",
    "inspect",
    "load_model",
    "methods",
    "overview",
    "patch",
    "patched",
    "record_of",
    "save_pretrained",
    "unpatch",
]


class _MethodsPackage(ModuleType):
    """`ropepatch.methods` is a package of method files and, by contract, a function that lists them: both work."""

    def __call__(self) -> tuple[MethodInfo, ...]:
        from ropepatch.api import methods

        return methods()


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


check_versions()
importlib.import_module("ropepatch.methods").__class__ = _MethodsPackage

"""The public names, what importing loads, and the direction in which the folders import each other."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import ropepatch
from ropepatch.errors import RopepatchError

PACKAGE = Path(ropepatch.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "transformers", "numpy", "pydantic", "matplotlib")

# A part of the package may import parts of a lower rank, and itself. "" is the package's own __init__.
RANKS = {
    "errors": 0,
    "registry": 1,
    "_data": 2,
    "compat": 2,
    "files": 2,
    "inspection": 2,
    "record": 2,
    "sidecar": 2,
    "attention": 3,
    "families": 4,
    "methods": 4,
    "surgery": 5,
    "api": 6,
    "": 7,
    "demo_model": 8,
    "loading": 11,
    "_card": 3,
    "saving": 10,
    "exporting": 11,
    "gguf": 10,
    "sources": 9,
    "testing": 11,
    "plotting": 8,
    "evaluation": 12,
    "training": 13,
    "cli": 14,
    "__main__": 15,
}
# compat names ropepatch's own version, and the root's lazy table names every home.
EXCEPTIONS = {("compat", "")}

# What a method file may import besides the standard library; one method may build on another.
METHOD_IMPORTS = (
    "torch",
    "pydantic",
    "ropepatch.errors",
    "ropepatch.registry",
    "ropepatch.attention.scheme",
    "ropepatch.methods.",
)

# Calls that change a model. `setattr` and `delattr` with any target count.
MUTATORS = {
    "add_module",
    "copy_",
    "delattr",
    "register_buffer",
    "register_module",
    "register_parameter",
    "set_submodule",
    "setattr",
}
READ_ONLY = ("attention", "cli", "evaluation", "families", "methods", "plotting")


def part_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, at any depth, as a dotted name; `from a import b` gives "a.b"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_part(name: str) -> str | None:
    """The part of ropepatch that a dotted name lies in; None for another package."""
    head, *rest = name.split(".")
    if head != "ropepatch":
        return None
    return rest[0] if rest and rest[0] in RANKS else ""


def loaded_by(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nimport json\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_public_names_are_sorted_and_unique() -> None:
    assert ropepatch.__all__ == sorted(set(ropepatch.__all__))


def test_every_public_name_resolves() -> None:
    assert set(ropepatch.__all__) <= set(dir(ropepatch))
    for name in ropepatch.__all__:
        assert getattr(ropepatch, name) is not None


def test_every_error_class_is_public() -> None:
    from ropepatch import errors

    classes = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, RopepatchError)
    }
    assert classes
    assert classes <= set(ropepatch.__all__)


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'pach'"):
        ropepatch.pach  # noqa: B018


def test_methods_is_both_the_package_and_the_function() -> None:
    from ropepatch.methods import linear

    assert isinstance(ropepatch.methods, ModuleType)
    assert ropepatch.methods.linear is linear
    names = [info.name for info in ropepatch.methods()]
    assert "linear" in names
    assert names == sorted(names)


@pytest.mark.parametrize(
    "statement",
    [
        "import ropepatch",
        "import ropepatch.cli.app",
        "from ropepatch.cli.app import command\ncommand(['--help'], standalone_mode=False)",
        "from ropepatch.cli.app import command\ncommand(['--version'], standalone_mode=False)",
        "import ropepatch\nropepatch.UsageError",
    ],
)
def test_light_entry_points_load_nothing_heavy(statement: str) -> None:
    modules = loaded_by(statement)
    assert "ropepatch" in modules
    assert not modules.intersection(HEAVY)


def test_help_imports_no_verb() -> None:
    from ropepatch.cli.app import VERBS

    modules = loaded_by("from ropepatch.cli.app import command\ncommand(['--help'], standalone_mode=False)")
    assert not modules.intersection(f"ropepatch.cli.{verb}" for verb in VERBS)


def test_the_walk_sees_the_whole_package() -> None:
    seen = {path.relative_to(PACKAGE).as_posix() for path in FILES}
    assert {"__init__.py", "methods/_base.py", "surgery/frequencies.py", "cli/app.py"} <= seen
    assert {part_of(path) for path in FILES} <= set(RANKS), "a new part of the package needs a rank"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_import_direction(path: Path) -> None:
    part = part_of(path)
    if part == "":
        return
    wrong = []
    for name in imported(path):
        target = imported_part(name)
        if target is None or target == part or (part, target) in EXCEPTIONS:
            continue
        if RANKS[target] >= RANKS[part]:
            wrong.append(name)
    assert not wrong, f"{part} may not import {wrong}"


def test_the_direction_test_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("def late():\n    from ropepatch.cli import app\n    import ropepatch.api as api\n")
    assert [imported_part(name) for name in imported(file)] == ["cli", "api"]
    assert RANKS["cli"] > RANKS["methods"]


def test_methods_import_torch_and_their_base_only() -> None:
    files = [path for path in FILES if part_of(path) == "methods"]
    assert len(files) > 2
    for path in files:
        for name in imported(path):
            top = name.split(".")[0]
            allowed = top in sys.stdlib_module_names or name.startswith(METHOD_IMPORTS)
            assert allowed, f"{path.name} imports {name}"


def test_only_surgery_mutates() -> None:
    seen = 0
    for path in FILES:
        if part_of(path) not in READ_ONLY:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                seen += 1
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                assert name not in MUTATORS, f"{path.relative_to(PACKAGE)}:{node.lineno} calls {name}"
    assert seen > 100

"""The package's metadata, its supported range, and the data that travels in the wheel."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import ropepatch
from ropepatch import _data, compat
from ropepatch._data import data_names, find_data
from ropepatch.errors import DependencyError, UnknownNameError, UsageError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in found.items()}


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", item).group().lower() for item in requirements}  # type: ignore[union-attr]


def test_version_is_a_release_that_the_changelog_knows() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", ropepatch.__version__)
    assert ropepatch.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_supported_ranges_are_those_of_the_package_metadata() -> None:
    stated = {re.match(r"[\w-]+", item).group(): item for item in PROJECT["project"]["dependencies"]}  # type: ignore[union-attr]
    for package, (lowest, ceiling) in compat.SUPPORTED.items():
        wanted = f"{package}>={lowest}" + (f",<{ceiling}" if ceiling else "")
        assert stated[package] == wanted


def test_constraints_pin_every_direct_dependency_without_local_tags() -> None:
    project = PROJECT["project"]
    wanted = requirement_names(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        if extra != "all":
            wanted |= requirement_names(requirements)
    assert len(wanted) > 15
    assert wanted <= set(pins())
    assert not any("+" in version for version in pins().values())


def test_constraints_lie_in_the_supported_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda package: pins()[package])
    compat.check_versions()


@pytest.mark.parametrize(
    ("package", "installed"),
    [
        ("transformers", "4.57.6"),
        ("transformers", "5.5.4"),
        ("transformers", "5.24.0"),
        ("transformers", "5.24.0.dev0"),
        ("transformers", "6.0"),
        ("torch", "2.5.1+cu121"),
    ],
)
def test_a_version_outside_the_range_is_refused(package: str, installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: {**pins(), package: installed}[name])
    with pytest.raises(DependencyError) as caught:
        compat.check_versions()
    message = str(caught.value)
    lowest = compat.SUPPORTED[package][0]
    assert f"{package} {installed}" in message
    assert f"pip install '{package}>={lowest}" in message


@pytest.mark.parametrize("bound", range(2))
def test_the_ends_of_the_range(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lowest, ceiling = compat.SUPPORTED["transformers"]
    assert ceiling is not None
    major, minor = ceiling.split(".")
    inside = (lowest, f"{major}.{int(minor) - 1}.9")[bound]
    monkeypatch.setattr(metadata, "version", lambda name: {**pins(), "transformers": inside}[name])
    compat.check_versions()


def test_a_missing_dependency_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "torch":
            raise metadata.PackageNotFoundError(package)
        return pins()[package]

    monkeypatch.setattr(metadata, "version", version)
    with pytest.raises(DependencyError, match="package torch is not installed"):
        compat.check_versions()


def test_versions_name_what_a_result_depends_on() -> None:
    assert compat.versions() == {
        "ropepatch": ropepatch.__version__,
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
    }


def test_the_wheel_ships_recipes_suites_and_the_typing_marker() -> None:
    shipped = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert shipped == {
        "recipes": "ropepatch/_data/recipes",
        "eval/suites": "ropepatch/_data/eval",
        "eval/matrices": "ropepatch/_data/matrices",
    }
    for source in shipped:
        assert any((ROOT / source).iterdir()), f"{source} is empty: a clean clone would not have it"
    assert (ROOT / "ropepatch" / "py.typed").is_file()


def test_a_checkout_finds_its_own_suites() -> None:
    names = data_names("eval")
    assert names
    for name in names:
        assert find_data("eval", name).is_file()
        assert find_data("eval", f"{name}.yaml") == find_data("eval", name)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The layout of an installed wheel: data beside the package, no pyproject.toml above it."""
    package = tmp_path / "site-packages" / "ropepatch" / "_data"
    (package / "recipes" / "lora").mkdir(parents=True)
    (package / "recipes" / "pose.yaml").write_text("a: 1", encoding="utf-8")
    (package / "recipes" / "lora" / "yarn.yml").write_text("a: 2", encoding="utf-8")
    (package / "recipes" / "README.md").write_text("no recipe", encoding="utf-8")
    # Another package's folder of that name, which must not count.
    (tmp_path / "site-packages" / "eval" / "suites").mkdir(parents=True)
    (tmp_path / "site-packages" / "eval" / "suites" / "alien.yaml").write_text("a: 3", encoding="utf-8")
    monkeypatch.setattr(_data, "__file__", str(package / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    return package


def test_an_installed_wheel_finds_data_by_name(installed: Path) -> None:
    assert data_names("recipes") == ("lora/yarn", "pose")
    assert find_data("recipes", "pose") == installed / "recipes" / "pose.yaml"
    assert find_data("recipes", "lora/yarn") == installed / "recipes" / "lora" / "yarn.yml"


def test_an_explicit_path_comes_first(installed: Path, tmp_path: Path) -> None:
    mine = tmp_path / "pose.yaml"
    mine.write_text("a: 4", encoding="utf-8")
    assert find_data("recipes", "pose.yaml") == Path("pose.yaml")
    assert find_data("recipes", str(mine)) == mine
    assert find_data("recipes", "pose") == installed / "recipes" / "pose.yaml"


def test_an_output_folder_of_that_name_does_not_hide_the_suite(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "pose").mkdir()
    assert find_data("recipes", "pose") == installed / "recipes" / "pose.yaml"


@pytest.mark.usefixtures("installed")
def test_an_unknown_name_suggests() -> None:
    with pytest.raises(UnknownNameError, match=r"[Uu]nknown recipe 'posse'.*Did you mean 'pose'"):
        find_data("recipes", "posse")
    with pytest.raises(UnknownNameError):
        find_data("eval", "alien")


@pytest.mark.usefixtures("installed")
def test_a_missing_path_says_so() -> None:
    with pytest.raises(UsageError, match="absent.yaml"):
        find_data("recipes", "somewhere/absent.yaml")


def test_the_readme_lists_the_methods_of_the_registry() -> None:
    spec = importlib.util.spec_from_file_location("readme_methods", ROOT / "scripts" / "readme_methods.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert script.table().count("\n") > 5
    assert text == script.with_table(text), "run: python scripts/readme_methods.py --write"


def test_the_readme_states_the_supported_range() -> None:
    lowest, ceiling = compat.SUPPORTED["transformers"]
    assert ceiling is not None
    newest = f"5.{int(ceiling.split('.')[1]) - 1}"
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    torch_lowest = compat.SUPPORTED["torch"][0]
    assert f"transformers {lowest.removesuffix('.0')} to {newest} and torch {torch_lowest} or newer" in text

"""The worked examples of the documents are real: methods register and pass their own tests, and what is shown runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(label: str) -> str:
    found = re.search(rf"<!-- {label} -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert found, f"no example called {label}"
    return found.group(1)


@pytest.mark.parametrize(
    ("name", "method", "test", "passed"),
    [
        ("hard_parts", "method", "test", 5),
        ("far_nope", "attention method", "attention test", 6),
    ],
)
def test_the_shown_method_works_as_shown(tmp_path: Path, name: str, method: str, test: str, passed: int) -> None:
    """The file is dropped into the methods package (by its search path), and found by registration alone."""
    extra = tmp_path / "methods"
    extra.mkdir()
    (extra / f"{name}.py").write_text(example(method), encoding="utf-8")
    (tmp_path / f"test_{name}.py").write_text(example(test), encoding="utf-8")
    (tmp_path / "conftest.py").write_text(
        f"import ropepatch.methods\nropepatch.methods.__path__.append({str(extra)!r})\n", encoding="utf-8"
    )
    (tmp_path / "test_found.py").write_text(
        f"import ropepatch\ndef test_found():\n    assert {name!r} in [info.name for info in ropepatch.methods()]\n",
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{passed} passed" in done.stdout


def test_the_shown_family_is_the_one_in_the_package() -> None:
    assert example("family") == (ROOT / "ropepatch" / "families" / "roformer.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("page", "label", "parts"), [("docs/attention.md", "example", 4), ("README.md", "attention", 1)]
)
def test_the_examples_of_the_attention_seam_run(page: str, label: str, parts: int) -> None:
    """In the order of the page, on one tiny model."""
    import torch

    import ropepatch
    from ropepatch.testing import tiny_model

    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"<!-- {label} -->\n```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(found) == parts
    ids = torch.randint(10, 100, (1, 150), generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = {"model": tiny_model("llama"), "ids": ids, "ropepatch": ropepatch}
    for part in found:
        exec(compile(part, page, "exec"), names)
    assert bool(torch.isfinite(names["loss"]))
    if "packed" in names:
        torch.testing.assert_close(names["by_reset"], names["by_number"], rtol=0, atol=1e-4)
        # Before the jump nothing is different from one document; after it everything is.
        torch.testing.assert_close(names["jumped"][:, :60], names["logits"][:, :60], rtol=0, atol=1e-4)
        assert not torch.allclose(names["jumped"][:, 60:], names["logits"][:, 60:], atol=1e-3)

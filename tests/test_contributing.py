"""The worked examples of CONTRIBUTING.md are real: the method registers and passes its own test, the family is ours."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(label: str) -> str:
    found = re.search(rf"<!-- {label} -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert found, f"no example called {label}"
    return found.group(1)


def test_the_shown_method_works_as_shown(tmp_path: Path) -> None:
    """The file is dropped into the methods package (by its search path), and found by registration alone."""
    extra = tmp_path / "methods"
    extra.mkdir()
    (extra / "hard_parts.py").write_text(example("method"), encoding="utf-8")
    (tmp_path / "test_hard_parts.py").write_text(example("test"), encoding="utf-8")
    (tmp_path / "conftest.py").write_text(
        f"import ropepatch.methods\nropepatch.methods.__path__.append({str(extra)!r})\n", encoding="utf-8"
    )
    (tmp_path / "test_found.py").write_text(
        "import ropepatch\ndef test_found():\n    assert 'hard_parts' in [info.name for info in ropepatch.methods()]\n",
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
    assert "5 passed" in done.stdout


def test_the_shown_family_is_the_one_in_the_package() -> None:
    assert example("family") == (ROOT / "ropepatch" / "families" / "roformer.py").read_text(encoding="utf-8")

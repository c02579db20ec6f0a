"""Suite files: found by name and path, overridden, and every error at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from ropepatch.errors import OptionError, RecordError, UnknownNameError, UsageError
from ropepatch.evaluation.suites import load_suite, suite_names


def test_the_shipped_passkey_suite() -> None:
    suite = load_suite("passkey")
    assert suite.task == "passkey"
    assert (suite.digits, suite.seed, suite.chat_template, suite.text) == (5, 0, False, None)
    assert suite.lengths == tuple(sorted(suite.lengths))
    names = ["copy", "far_context", "key_value", "needle", "passkey", "perplexity", "ruler"]
    assert suite_names() == names
    assert [load_suite(name).task for name in names] == names


def test_overrides_replace_and_none_does_not() -> None:
    suite = load_suite("passkey", {"lengths": [512, 128, 512], "depths": [1, 0], "trials": 3, "seed": None})
    assert suite.lengths == (128, 512)
    assert suite.depths == (0.0, 1.0)
    assert (suite.trials, suite.seed) == (3, 0)


def test_a_suite_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("task: passkey\nlengths: [200]\ndepths: [0.5]\ntrials: 1\ndigits: 7\n")
    assert load_suite(path).digits == 7
    with pytest.raises(UsageError, match="No evaluation suite file"):
        load_suite(tmp_path / "other.yaml")


def test_every_error_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("task: passkey\nlengths: [0]\ndepths: [1.5]\ntrials: 0\nlenghts: 3\n")
    with pytest.raises(OptionError) as caught:
        load_suite(path)
    for word in ("lengths", "depths", "trials", "lenghts"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [{"lengths": []}, {"depths": []}, {"lengths": [-5]}, {"depths": [float("nan")]}, {"trials": 1.5}, {"digits": 0}],
)
def test_bad_settings(setting: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=next(iter(setting))):
        load_suite("passkey", setting)


def test_unknown_name_suggests() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'passkey'"):
        load_suite("passky")


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "a: [", "\x00"])
def test_unreadable_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RecordError):
        load_suite(path)

"""The curve of a training run, read back from the figure's own parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ropepatch.cli.app import app
from ropepatch.errors import UsageError
from ropepatch.plotting import training_curve

pytest.importorskip("matplotlib", reason="figures need matplotlib")


def log(count: int, rate: bool = True) -> list[dict[str, Any]]:
    extra = {"learning_rate": 0.5} if rate else {}
    return [{"step": step, "loss": 10.0 - step / 100, **extra} for step in range(1, count + 1)]


def test_a_short_run_is_drawn_as_it_is_with_its_learning_rate() -> None:
    panel, rates = training_curve([log(5)]).axes
    (line,) = panel.lines
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
    assert list(line.get_ydata()) == pytest.approx([9.99, 9.98, 9.97, 9.96, 9.95])
    assert list(rates.lines[0].get_ydata()) == [0.5] * 5


def test_a_long_run_has_a_running_mean_over_its_steps() -> None:
    steps, mean = training_curve([log(200)]).axes[0].lines
    assert list(steps.get_ydata()) == [line["loss"] for line in log(200)]
    # Four steps: a fiftieth of them.
    losses = [line["loss"] for line in log(200)]
    assert mean.get_ydata()[0] == losses[0]
    assert mean.get_ydata()[100] == pytest.approx(sum(losses[97:101]) / 4)


def test_several_runs_are_named_and_share_a_panel() -> None:
    figure = training_curve([log(3), log(4)], titles=["one", "other"])
    assert [line.get_label() for line in figure.axes[0].lines] == ["one", "other"]
    assert len(figure.axes) == 1


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no training step"):
        training_curve([[]])
    with pytest.raises(UsageError, match="title for each run"):
        training_curve([log(2)], titles=["a", "b"])
    with pytest.raises(UsageError, match=r"\.png or \.svg"):
        training_curve([log(2)], path=tmp_path / "x.pdf")


def test_the_verb_draws_folders_of_train(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lines = [json.dumps(line) for line in log(3)]
    # The last line was cut short by a crash.
    (tmp_path / "run" / "log.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
    done = CliRunner().invoke(app, ["plot", "training", str(tmp_path / "run"), "--output", str(tmp_path / "x.svg")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "x.svg").stat().st_size > 1000
    empty = CliRunner().invoke(app, ["plot", "training", str(tmp_path), "--output", str(tmp_path / "y.svg")])
    assert empty.exit_code == 1 and "no training log" in empty.output

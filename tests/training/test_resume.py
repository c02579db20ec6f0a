"""A run that is killed, and the same call again: the same adapter to the last bit."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from training_runs import adapter, finished, losses, one_thread, recipe, same

from ropepatch.errors import OutputConflictError, OutputError
from ropepatch.training.checkpoints import Checkpoints
from ropepatch.training.log import LOG
from ropepatch.training.recipe import Recipe
from ropepatch.training.run import train

STEPS = 6

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Collecting what pytest and the libraries hold takes longer than a step.
    gc.freeze()
    with one_thread():
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def asked(tiny_model_folder: Path) -> Recipe:
    """With dropout, so that the state of the random generators counts."""
    lora = {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.2, "train_norms": True}
    return recipe(tiny_model_folder, lora=lora, train__max_steps=STEPS)


@pytest.fixture(scope="module")
def unbroken(asked: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with one_thread():
        return train(asked, tmp_path_factory.mktemp("unbroken") / "run", progress=False).output


def in_child(work: Callable[[], object]) -> int:
    """The process number of a fork that does the work and ends."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        work()
        status = 0
    finally:
        os._exit(status)


def steps_logged(output: Path) -> int:
    log = output / LOG
    return log.read_bytes().count(b"\n") if log.exists() else 0


def test_killed_at_a_random_step(asked: Recipe, unbroken: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    step = random.Random().randint(1, STEPS - 1)
    child = in_child(lambda: train(asked, output, progress=False))
    deadline = time.monotonic() + 120
    while steps_logged(output) < step and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"it was done before it was killed, at step {step}"
    assert not finished(output)
    result = train(asked, output, progress=False)
    assert result.resumed_from in (None, 2, 4, 6)
    assert same(adapter(output), adapter(unbroken)), f"killed at step {step}"
    assert losses(output) == losses(unbroken)
    assert finished(output)


def test_killed_while_a_checkpoint_is_written(
    asked: Recipe, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    finish = Checkpoints._finish

    def die(checkpoints: Checkpoints, part: Path, place: Path) -> None:
        if place.name == "step-4":
            os.kill(os.getpid(), signal.SIGKILL)
        finish(checkpoints, part, place)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_finish", die)
        _, status = os.waitpid(in_child(lambda: train(asked, output, progress=False)), 0)
    assert os.WIFSIGNALED(status)
    # And the one before is torn as well as can be: the first is begun again.
    (output / "checkpoints" / "step-2" / "optimizer.pt").write_bytes(b"torn")
    assert train(asked, output, progress=False).resumed_from is None
    assert same(adapter(output), adapter(unbroken))


def test_a_torn_checkpoint_is_passed_over_and_said(
    asked: Recipe, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        # The disk is full when the last checkpoint is written.
        finish = Checkpoints._finish
        patch.setattr(
            Checkpoints, "_finish", lambda own, part, place: (fail if "6" in place.name else finish)(own, part, place)
        )
        with pytest.raises(OutputError, match="No space left"):
            train(asked, output, progress=False)
    (output / "checkpoints" / "step-4" / "trained.safetensors").write_bytes(b"torn")
    capsys.readouterr()
    assert train(asked, output, progress=False).resumed_from == 2
    said = capsys.readouterr().err
    assert "step-4 is damaged and is passed over" in said and "going on from step 2 of 6" in said
    assert same(adapter(output), adapter(unbroken))


def test_a_finished_run_trains_nothing(
    asked: Recipe, unbroken: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ropepatch.training import loading

    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("a model was loaded"))
    result = train(asked, unbroken, progress=False)
    assert (result.steps, result.resumed_from) == (STEPS, None)
    assert "is finished: nothing to train" in capsys.readouterr().err


def test_killed_after_training_only_the_rest_is_done(asked: Recipe, unbroken: Path, tmp_path: Path) -> None:
    import shutil

    output = tmp_path / "run"
    shutil.copytree(unbroken, output)
    record = json.loads((output / "run.json").read_text())
    (output / "run.json").write_text(json.dumps({**record, "finished": False}))
    (output / "report.md").unlink()
    shutil.rmtree(output / "checkpoints")
    assert train(asked, output, progress=False).report.is_file()
    assert finished(output)


def test_another_recipe_is_refused_by_its_settings(asked: Recipe, unbroken: Path, tiny_model_folder: Path) -> None:
    other = recipe(
        tiny_model_folder,
        lora={"r": 8, "lora_alpha": 8.0, "lora_dropout": 0.2, "train_norms": True},
        train__max_steps=7,
    )
    with pytest.raises(OutputConflictError, match=r"lora\.r is 4 there and 8 here; train\.max_steps is 6 there and 7"):
        train(other, unbroken, progress=False)
    with pytest.raises(OutputConflictError, match="holds a run already"):
        train(asked, unbroken, resume=False, progress=False)


def test_what_does_not_change_the_result_may_differ(asked: Recipe, unbroken: Path) -> None:
    words = asked.model_copy(update={"description": "Said in other words."})
    assert train(words, unbroken, progress=False).steps == STEPS


def test_files_of_others_are_refused(asked: Recipe, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    with pytest.raises(OutputConflictError, match=r"holds adapter but no run\.json"):
        train(asked, tmp_path, progress=False)


def test_two_processes_in_one_folder_are_refused(asked: Recipe, tmp_path: Path) -> None:
    from ropepatch.training.folder import TrainingFolder

    refused = pytest.raises(OutputError, match="(?i)another process is training")
    with TrainingFolder.open(tmp_path / "run", asked, {}), refused:
        train(asked, tmp_path / "run", progress=False)

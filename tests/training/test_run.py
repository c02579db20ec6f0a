"""A recipe from one end to the other, and the loop against a plain one."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import WINDOW, adapter, losses, one_thread, recipe, same

import ropepatch
from ropepatch.errors import OptionError, PromptError, RopepatchError, VerificationError
from ropepatch.training.recipe import Recipe
from ropepatch.training.run import rehearse, train

# Rows with few labels beside rows with many: a mean of means would be another loss.
UNEVEN = [{"kind": "synthetic", "task": "passkey", "answer_only": few} for few in (True, False)]


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    gc.freeze()
    with one_thread():
        yield
    gc.unfreeze()


def test_from_a_recipe_to_a_report(tiny_model_folder: Path, tmp_path: Path) -> None:
    asked = recipe(
        tiny_model_folder,
        lora={"r": 4, "train_norms": True, "train_embeddings": True, "merge": True},
        eval={"runs": [{"suite": "passkey", "settings": {"lengths": [256], "depths": [0.5], "trials": 1}}]},
    )
    result = train(asked, tmp_path / "run", progress=False)
    found = losses(tmp_path / "run")
    assert result.steps == len(found) == 4
    assert found[-1] < found[0]
    for name in ("recipe.yaml", "loss.png", "report.html", "adapter/ropepatch.json", "merged/ropepatch.json"):
        assert (tmp_path / "run" / name).is_file(), name
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step-2", "step-4"]
    report = result.report.read_text()
    for stage in ("unpatched/passkey", "before/passkey: yarn", "after/passkey: yarn"):
        assert stage in report
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("data:image/png") == 2 and "train.learning_rate" in page
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["finished"] and record["patch"]["method"] == "yarn" and record["trained"]["steps"] == 4
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert line["tokens"] == 4 * 2 * WINDOW
    assert {"learning_rate", "grad_norm", "tokens_per_s", "peak_memory_mib", "seconds"} <= line.keys()
    # Both folders are models that anybody loads.
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        adapted = ropepatch.from_pretrained(result.model)(ids).logits
        merged = ropepatch.from_pretrained(result.merged)(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)


def test_the_loop_is_plain_gradient_descent(tiny_model_folder: Path, tmp_path: Path) -> None:
    """All weights, against a loop of a few lines with torch's own optimizer on transformers' own loss."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ropepatch.training.data import build

    asked = recipe(
        tiny_model_folder,
        lora=None,
        train={
            "max_steps": 3,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.5,
            "weight_decay": 0.1,
            "precision": "float32",
            "gradient_checkpointing": False,
        },
        data={
            "length": WINDOW,
            "cache": str(tmp_path / "tokens"),
            "sources": UNEVEN,
        },
    )
    train(asked, tmp_path / "run", progress=False)

    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).train()
    ropepatch.patch(model, "yarn", factor=4)
    rows = build(asked, AutoTokenizer.from_pretrained(tiny_model_folder))
    vectors = [p for p in model.parameters() if p.ndim == 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        betas=(0.9, 0.95),
    )
    wanted = []
    for step in range(3):
        batch = [rows[index] for index in range(4 * step, 4 * step + 4)]
        ids = torch.tensor([row["input_ids"] for row in batch])
        labels = torch.tensor([row["labels"] for row in batch])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        wanted.append(loss.item())
    torch.testing.assert_close(losses(tmp_path / "run"), wanted, rtol=1e-5, atol=0)
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), rtol=0, atol=2e-5)


def test_the_micro_batch_changes_rounding_only(tiny_model_folder: Path, tmp_path: Path) -> None:
    common = {"train__batch_size": 4, "train__max_steps": 2, "data__sources": UNEVEN}
    train(recipe(tiny_model_folder, **common), tmp_path / "one", progress=False)
    train(recipe(tiny_model_folder, **common, train__micro_batch_size=4), tmp_path / "more", progress=False)
    torch.testing.assert_close(losses(tmp_path / "more"), losses(tmp_path / "one"), rtol=1e-5, atol=0)


VARIANTS: dict[str, dict[str, Any]] = {
    "no patch": {"patch": None},
    "learned bias": {"patch": {"method": "kerple"}, "lora": {"r": 4, "merge": True}},
    "attention seam": {"patch": {"method": "self_extend", "options": {"factor": 4}}},
    "skipped positions": {"train__positions": {"kind": "pose"}},
    "isolated documents": {"data__isolate_documents": True},
    "shifted groups": {"train__shifted_groups": {"group": 32}},
    "scratch": {"model": {"name": "scratch:"}, "lora": None, "patch": None},
    "half precision": {
        "model": {"name": "", "dtype": "bfloat16"},
        "train__precision": "bf16",
        "lora": {"r": 4, "train_norms": True, "train_embeddings": True, "merge": True},
    },
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_recipes_combine(name: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    changes = {"train__max_steps": 1, **VARIANTS[name]}
    if "model" in changes:
        changes["model"] = {**changes["model"], "name": changes["model"]["name"] + str(tiny_model_folder)}
    # Saving and loading again is part of every run: it would not end otherwise.
    result = train(recipe(tiny_model_folder, **changes), tmp_path / "run", progress=False)
    assert result.steps == 1 and result.report.is_file()


def test_stages_change_window_and_options_and_resume_in_the_middle(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def staged(**changes: Any) -> Recipe:
        stages = [
            {"steps": 3, "length": WINDOW, "options": {"rope_theta": 2e4}},
            {"steps": 3, "length": WINDOW + 16, "options": {"rope_theta": 1.6e5}},
        ]
        return recipe(
            tiny_model_folder,
            patch={"method": "abf", "options": {"rope_theta": 2e4}},
            data__length=WINDOW + 16,
            train__max_steps=None,
            train__stages=stages,
            train__save_every=2,
            **changes,
        )

    train(staged(), tmp_path / "whole", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert [line["tokens"] for line in lines[2::3]] == [6 * WINDOW, 12 * WINDOW + 6 * 16]
    saved = json.loads((tmp_path / "whole" / "adapter" / "ropepatch.json").read_text())
    assert saved["patch"]["options"]["rope_theta"] == 1.6e5

    from ropepatch.training.trainer import RecipeTrainer

    step = RecipeTrainer.training_step

    def interrupted(trainer: Any, *args: Any, **more: Any) -> Any:
        if trainer.state.global_step == 5:
            raise KeyboardInterrupt
        return step(trainer, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(RecipeTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(staged(), tmp_path / "broken", progress=False)
    assert train(staged(), tmp_path / "broken", progress=False).resumed_from == 4
    assert same(adapter(tmp_path / "broken"), adapter(tmp_path / "whole"))


def test_a_loss_that_stalls_stops_the_run(tiny_model_folder: Path, tmp_path: Path) -> None:
    rule = {"window": 2, "patience": 2, "min_delta": 0.5}
    asked = recipe(tiny_model_folder, train__max_steps=30, train__learning_rate=1e-9, train__early_stop=rule)
    assert train(asked, tmp_path / "run", progress=False).steps == 6
    assert "stopped early" in (tmp_path / "run" / "report.md").read_text()


def test_a_loss_that_diverges_is_an_error(tiny_model_folder: Path, tmp_path: Path) -> None:
    asked = recipe(
        tiny_model_folder, train__learning_rate=1e30, train__max_grad_norm=None, train__optim="sgd", train__max_steps=6
    )
    with pytest.raises(VerificationError, match=r"training has diverged.*learning_rate"):
        train(asked, tmp_path / "run", progress=False)


def test_what_cannot_be_is_refused_before_anything_is_trained(tiny_model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with pytest.raises(PromptError, match="(?i)too short"):
        train(recipe(tiny_model_folder, data__length=16), output, progress=False)
    with pytest.raises(OptionError, match=r"model\.dtype=bfloat16 and train\.precision=float32"):
        train(
            recipe(tiny_model_folder, model={"name": str(tiny_model_folder), "dtype": "bfloat16"}),
            output,
            progress=False,
        )


def test_a_rehearsal_keeps_nothing(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in tiny_model_folder.parent.rglob("*") if "tokens" not in path.parts)
    rehearse(recipe(tiny_model_folder, train__positions={"kind": "pose"}))
    with pytest.raises(RopepatchError, match="q_prj"):
        rehearse(recipe(tiny_model_folder, lora={"target_modules": ["q_prj"]}))
    assert os.listdir(tmp_path) == []
    assert sorted(path for path in tiny_model_folder.parent.rglob("*") if "tokens" not in path.parts) == before


def test_a_tracker_gets_the_loss_of_every_step(tiny_model_folder: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the package tensorboard"
    )
    output = tmp_path / "run"
    train(recipe(tiny_model_folder, train__report_to=["tensorboard"]), output, progress=False)
    (folder,) = {file.parent for file in output.rglob("events.out.tfevents.*")}
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(output), rel=1e-6)


def launched(
    processes: int, asked: Recipe, output: Path, *, accelerate: str | None = None
) -> subprocess.CompletedProcess[str]:
    """`python -m ropepatch.training` under torchrun, or under one of our accelerate files, on CPU processes."""
    from ropepatch.training.reading import dump

    file = output.parent / f"{output.name}.yaml"
    file.write_text(dump(asked))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    if accelerate is not None:
        place = Path(__file__).parents[2] / "recipes" / "accelerate" / accelerate
        words = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(place)]
        words += ["--num_processes", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*words, "-m", "ropepatch.training", str(file), "--output", str(output)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("data parallel", {"train__processes": 2}),
        ("sharded", {"train__sharding": "fsdp2"}),
        ("all gather", {"train__context_parallel": 2}),
        ("seam", {"train__context_parallel": 2, "patch": {"method": "self_extend", "options": {"factor": 4}}}),
    ],
)
def test_two_processes_train_as_one(
    name: str, changes: dict[str, Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    common = {"train__batch_size": 4, "lora": {"r": 4, "train_norms": True}}
    alone = {key: value for key, value in changes.items() if not key.startswith("train__")}
    train(recipe(tiny_model_folder, **common, **alone), tmp_path / "one", progress=False)
    done = launched(2, recipe(tiny_model_folder, **common, **changes), tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=0)
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_accelerates_file_alone_asks_for_sharding(tiny_model_folder: Path, tmp_path: Path) -> None:
    asked = recipe(tiny_model_folder)
    assert asked.train.sharding is None
    train(asked, tmp_path / "one", progress=False)
    done = launched(2, asked, tmp_path / "two", accelerate="fsdp2.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "sharding: fsdp2" in (tmp_path / "two" / "recipe.yaml").read_text()
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=0)
    # Asked for in words, no sharding is not what this file gives.
    refused = launched(2, recipe(tiny_model_folder, train__sharding="none"), tmp_path / "no", accelerate="fsdp2.yaml")
    assert refused.returncode != 0
    assert "asks for fsdp2 and the recipe for train.sharding=none" in " ".join(refused.stderr.split())

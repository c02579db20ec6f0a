"""Settings that do not go together: each is refused with both names, all at once; each alone is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from ropepatch.errors import DependencyError, OptionError
from ropepatch.training.checks import _UNUSABLE_SCHEDULES, check, check_machine, lacking
from ropepatch.training.reading import load_recipe
from ropepatch.training.recipe import Recipe

Make = Callable[..., Recipe]

WHOLE = """
model: {name: some/model}
data: {length: 128, sources: [{kind: files, path: stdlib}]}
train: {max_steps: 10}
"""
STAGES = "train.stages=[{steps: 4, length: 64}, {steps: 6, length: 128}]"
YARN = ("patch.method=yarn", "patch.options.factor=4")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    path = tmp_path / "mine.yaml"
    path.write_text(WHOLE)

    def load(*overrides: str) -> Recipe:
        return load_recipe(path, overrides)

    return load


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (STAGES,),
        (STAGES, "train.max_steps=null"),
        YARN,
        (*YARN, "train.positions.kind=pose"),
        ("train.positions={kind: random, target_length: 128}",),
        (*YARN, "train.stages=[{steps: 10, length: 128, options: {factor: 8, beta_fast: null}}]"),
        ("patch.method=rerope", "patch.base={method: ntk, factor: 2}", "patch.layers=[0]"),
        ("model.quantization=nf4",),
        ("lora=null", "model.dtype=bfloat16"),
        ("train.shifted_groups.group=64",),
        ("train.context_parallel=2", "train.context_mode=ulysses"),
        ("train.context_parallel=2", "train.sharding=fsdp2"),
        ("data.long_tokens=64", "data.long_times=2"),
        ("eval.runs=[{suite: passkey, settings: {trials: 1}}, {suite: perplexity}]",),
        ("train.optim=adafactor", "train.lr_scheduler_type=linear", "train.report_to=[tensorboard]"),
    ],
)
def test_what_goes_together_is_taken(make: Make, overrides: tuple[str, ...]) -> None:
    check(make(*overrides))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model.quantization=nf4", "lora=null"), "model.quantization freezes the weights, and lora is null"),
        (("model.quantization=nf4", "lora.merge=true"), "model.quantization and lora.merge"),
        (("model.quantization=nf4", "train.sharding=fsdp2"), "model.quantization and train.sharding=fsdp2"),
        (("model.name=scratch:x", "model.quantization=int8", "lora=null"), "scratch: has random ones"),
        (("model.name=scratch:x",), "model.name is scratch:, and lora is set"),
        (("model.name=demo:smollm2", "model.revision=main"), "model.revision belongs to a hub id"),
        (("lora=null", "model.dtype=float16"), "model.dtype=float16 and lora null"),
        (("model.dtype=bfloat16", "train.precision=float32"), "model.dtype=bfloat16 and train.precision=float32"),
        (("lora.target_modules=[]",), "lora.target_modules is empty"),
        (("patch.method=yarm",), "patch.method: Unknown method 'yarm'"),
        (("patch.method=yarn",), "factor is missing"),
        ((*YARN, "patch.options.fctor=4"), "unknown option 'fctor', did you mean 'factor'"),
        ((*YARN, "patch.layers=[0]"), "patch.layers belongs to methods of the attention seam"),
        ((*YARN, "patch.base=ntk"), "patch.base belongs to methods of the attention seam"),
        ((*YARN, "train.stages=[{steps: 10, length: 128, options: {factor: 0}}]"), "train.stages.0.options"),
        (("train.stages=[{steps: 10, length: 128, options: {factor: 2}}]",), "options of a patch, and patch is null"),
        (
            ("patch.method=kerple", "train.stages=[{steps: 10, length: 128, options: {form: power}}]"),
            "patch.method=kerple learns parameters of its own",
        ),
        (("data.long_tokens=64",), "data.long_tokens and data.long_times"),
        (("data.long_times=2",), "data.long_tokens and data.long_times"),
        (("data.long_tokens=64", "data.long_times=2", "data.min_tokens=65"), "is below data.min_tokens=65"),
        (
            (
                "data.sources=[{kind: dataset, name: x, streaming: true}]",
                "data.long_tokens=64",
                "data.long_times=2",
            ),
            "data.long_tokens and data.sources.0.streaming",
        ),
        (("train.max_steps=null",), "neither train.max_steps nor train.stages"),
        (("train.stages=[]",), "train.stages is empty"),
        (("train.max_steps=9", STAGES), "train.max_steps=9, and the steps of train.stages sum to 10"),
        (("data.length=64", STAGES), "data.length=64, and the longest of train.stages is 128"),
        (("train.positions.kind=pose",), "train.positions has no target_length, and there is no patch"),
        (("train.positions={kind: pose, target_length: 127}",), "target_length=127 is below the window of 128"),
        (
            ("train.positions={kind: pose, target_length: 512, chunks: 129}",),
            "chunks=129 is more than the window's 128",
        ),
        (("train.positions={kind: random, target_length: 512, chunks: 2}",), "chunks belongs to kind pose"),
        (("train.shifted_groups.group=48",), "group=48 does not divide the window of 128"),
        (("train.shifted_groups.group=1",), "make it even"),
        (("train.shifted_groups.group=128", STAGES), "group=128 does not divide the window of 64"),
        (
            ("train.shifted_groups.group=64", "train.context_parallel=2"),
            "train.shifted_groups and train.context_parallel",
        ),
        (("train.context_parallel=2", "train.sharding=zero3"), "train.context_parallel and train.sharding=zero3"),
        (
            (
                "patch.method=self_extend",
                "patch.options={factor: 2}",
                "train.sharding=fsdp2",
                "train.stages=[{steps: 10, length: 128, options: {factor: 4}}]",
            ),
            "train.stages with options and train.sharding=fsdp2",
        ),
        (("train.context_mode=ulysses",), "train.context_mode=ulysses"),
        (("train.offload_activations=true", "train.gradient_checkpointing=false"), "train.offload_activations"),
        (("train.batch_size=6", "train.micro_batch_size=4"), "train.batch_size=6 is no multiple"),
        (("train.processes=3",), "micro_batch_size=1 x 3 data-parallel processes: take a multiple of 3"),
        (("train.processes=3", "train.context_parallel=2"), "3 processes cannot form groups"),
        (("train.optim=adamw_torhc",), "unknown name 'adamw_torhc', did you mean 'adamw_torch'"),
        (("train.lr_scheduler_type=cosin",), "unknown name 'cosin', did you mean 'cosine'"),
        (("train.lr_scheduler_type=reduce_lr_on_plateau",), "it follows an evaluation loss"),
        (("train.report_to=[wandbb]",), "unknown name 'wandbb', did you mean 'wandb'"),
        (("eval.runs=[{suite: paskey}]",), "eval.runs.0: Unknown evaluation suite 'paskey'"),
        (("eval.runs=[{suite: passkey, settings: {digit: 3}}]",), "passkey has no such setting"),
        (
            ("eval={runs: [{suite: passkey}], unpatched: false, before: false, after: false}",),
            "unpatched, before and after are all false",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(make: Make, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        check(make(*overrides))
    assert said in str(caught.value)
    assert "problems" not in str(caught.value), "one mistake is one problem"


def test_all_are_told_at_once(make: Make) -> None:
    with pytest.raises(OptionError) as caught:
        check(make("model.quantization=nf4", "lora=null", "patch.method=yarm", "train.optim=x", "train.batch_size=7"))
    message = str(caught.value)
    assert "3 problems" in message
    assert all(said in message for said in ("model.quantization", "'yarm'", "train.optim"))


def test_the_processes_that_are_there_count(make: Make) -> None:
    recipe = make("train.batch_size=4", "train.context_parallel=2")
    check(recipe, processes=8)
    with pytest.raises(OptionError, match="take a multiple of 8"):
        check(recipe, processes=16)


def test_the_unusable_schedules_are_those_that_need_more_than_steps() -> None:
    def builds(name: SchedulerType) -> bool:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        try:
            schedule = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=10)
            schedule.step()
        except (TypeError, ValueError):  # settings that are missing; step() without a metric
            return False
        return True

    assert {entry.value for entry in SchedulerType if not builds(entry)} <= set(_UNUSABLE_SCHEDULES)


def test_what_a_machine_lacks_is_told_with_the_way_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make(
        "train.loss=liger",
        "model.dtype=float16",
        "train.offload_activations=true",
        "model.quantization=nf4",
        "train.report_to=[wandb]",
    )
    check(recipe)  # the settings as such are sound
    monkeypatch.setattr("ropepatch.training.checks.find_spec", lambda name: None)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", list)
    found = "\n".join(lacking(recipe))
    for said in (
        "bitsandbytes: pip install bitsandbytes",
        "float16 cannot be trained on a CPU",
        "offload_activations needs an accelerator",
        "needs the package liger-kernel",
        "needs CUDA: set train.loss=auto",
        "wandb is not installed",
    ):
        assert said in found
    with pytest.raises(DependencyError, match="This machine cannot run the recipe"):
        check_machine(recipe)


def test_a_plain_recipe_lacks_nothing(make: Make) -> None:
    assert lacking(make()) == []
    check_machine(make())

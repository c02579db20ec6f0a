"""Settings of a recipe that do not go together, and what a recipe needs that this machine lacks.

Both are told before a model is loaded, all at once. Each line names the settings and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ropepatch.errors import DependencyError, RopepatchError
from ropepatch.training._problems import guess
from ropepatch.training.reading import refusal
from ropepatch.training.recipe import HubSource, Recipe, Stage

# Schedules of transformers that this loop cannot drive, and why.
_UNUSABLE_SCHEDULES = {
    "reduce_lr_on_plateau": "it follows an evaluation loss, and no evaluation runs between steps",
    "greedy": "it follows an evaluation loss, and no evaluation runs between steps",
    "cosine_with_min_lr": "it needs settings of its own",
    "cosine_warmup_with_min_lr": "it needs settings of its own",
    "warmup_stable_decay": "it needs settings of its own",
}
_PACKAGES = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}


def check(recipe: Recipe, *, processes: int | None = None) -> None:
    """Refuse settings that do not go together, on whatever machine.

    Args:
        recipe: as read.
        processes: that take part in the run; `train.processes` where None, and where that is None too, nothing that
            depends on their number is checked.

    Raises:
        OptionError: names every combination, both settings of each and the way out.
    """
    problems = [
        *_model(recipe),
        *_lora(recipe),
        *_patch(recipe),
        *_data(recipe),
        *_length(recipe),
        *_positions(recipe),
        *_shifted_groups(recipe),
        *_processes(recipe, processes if processes is not None else recipe.train.processes),
        *_names(recipe),
        *_eval(recipe),
    ]
    if problems:
        raise refusal("the recipe's settings do not go together", problems)


def check_machine(recipe: Recipe) -> None:
    """Refuse a recipe that needs what this machine has not.

    Raises:
        DependencyError: names everything that `lacking` finds.
    """
    if found := lacking(recipe):
        raise DependencyError("this machine cannot run the recipe: " + "; ".join(found))


def lacking(recipe: Recipe) -> list[str]:
    """What the recipe needs and this machine has not, a line each, with the way out."""
    import torch

    train, found = recipe.train, []
    cuda, accelerator = torch.cuda.is_available(), torch.accelerator.is_available()
    if recipe.model.quantization is not None and find_spec("bitsandbytes") is None:
        found.append(
            f"model.quantization={recipe.model.quantization} needs the package bitsandbytes: pip install bitsandbytes"
        )
    if recipe.model.dtype == "float16" and not accelerator:
        found.append("model.dtype=float16 cannot be trained on a CPU: take bfloat16 or float32")
    if train.offload_activations and not accelerator:
        found.append("train.offload_activations needs an accelerator: what it would offload is on the CPU already")
    if package := _PACKAGES.get(train.loss):
        if find_spec(package) is None:
            found.append(
                f"train.loss={train.loss} needs the package {package.replace('_', '-')}: install it, or set "
                "train.loss=auto"
            )
        if not cuda:
            found.append(f"train.loss={train.loss} needs CUDA: set train.loss=auto")
    from transformers.integrations import get_available_reporting_integrations

    there = get_available_reporting_integrations()
    found += [
        f"train.report_to: {name} is not installed: pip install {name}, or leave it out"
        for name in train.report_to
        if name in _trackers() and name not in there
    ]
    return found


def _model(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if model.quantization is not None:
        if model.name.startswith("scratch:"):
            yield "model.quantization is of trained weights, and scratch: has random ones: leave it out"
        elif recipe.lora is None:
            yield "model.quantization freezes the weights, and lora is null: set lora, or leave quantization out"
        elif recipe.lora.merge:
            yield "model.quantization and lora.merge: quantized weights take no merge; merge into the full model later"
        if recipe.train.sharded:
            yield f"model.quantization and train.sharding={recipe.train.sharding}: shard full weights, or quantize"
    if model.dtype in ("float16", "bfloat16") and recipe.train.precision == "float32":
        yield f"model.dtype={model.dtype} and train.precision=float32: store float32 weights, or set precision to bf16"
    if model.name.startswith("scratch:") and recipe.lora is not None:
        yield "model.name is scratch:, and lora is set: adapters need a base that others can load; set lora to null"
    if model.dtype == "float16" and recipe.lora is None:
        yield "model.dtype=float16 and lora null: float16 weights lose small updates; take float32 or bfloat16"
    if model.revision is not None and _is_local(model.name):
        yield f"model.revision belongs to a hub id, and model.name is {model.name!r}: leave it out"


def _lora(recipe: Recipe) -> Iterator[str]:
    if recipe.lora is not None and not recipe.lora.target_modules:
        yield "lora.target_modules is empty: name modules, take attention or all-linear, or set lora to null"


def _patch(recipe: Recipe) -> Iterator[str]:
    patch, stages = recipe.patch, recipe.train.stages or []
    if patch is None:
        for number, stage in enumerate(stages):
            if stage.options is not None:
                yield f"train.stages.{number}.options are options of a patch, and patch is null: give patch.method"
        return
    from ropepatch.methods._base import METHODS
    from ropepatch.methods._options import parse_options

    try:
        method = METHODS.get(patch.method)
    except RopepatchError as error:
        yield f"patch.method: {_text(error)}"
        return
    for place, options in _options(patch.options, stages):
        try:
            parse_options(method, options)
        except RopepatchError as error:
            yield f"{place}: {_text(error)}"
    if method.seam == "attention" and recipe.train.sharded and any(stage.options for stage in stages):
        yield (
            f"train.stages with options and train.sharding={recipe.train.sharding}: a sharded model cannot be patched "
            "again on the attention seam; give each stage a run of its own"
        )
    if getattr(method, "learned", None) is not None and any(stage.options for stage in stages):
        yield (
            f"patch.method={patch.method} learns parameters of its own, and other options in train.stages would throw "
            "them away: leave them out"
        )
    if method.seam != "attention":
        for name in ("layers", "base"):
            if getattr(patch, name) is not None:
                yield f"patch.{name} belongs to methods of the attention seam, and {patch.method} is none: leave it out"


def _options(own: dict[str, Any], stages: Sequence[Stage]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The options that come into force, with their place. A stage's stand in place of the patch's; null drops one."""
    if not stages or any(stage.options is None for stage in stages):
        yield "patch.options", own
    for number, stage in enumerate(stages):
        if stage.options is not None:
            merged = {**own, **stage.options}
            yield f"train.stages.{number}.options", {name: x for name, x in merged.items() if x is not None}


def _data(recipe: Recipe) -> Iterator[str]:
    data = recipe.data
    if (data.long_tokens is None) != (data.long_times == 1):
        yield "data.long_tokens and data.long_times (2 or more) work together: give both or neither"
    if data.long_tokens is not None:
        for number, source in enumerate(data.sources):
            if isinstance(source, HubSource) and source.streaming:
                yield (
                    f"data.long_tokens and data.sources.{number}.streaming: a stream is read once, in its order; set "
                    "streaming to false, or leave long_tokens out"
                )
    if data.long_tokens is not None and data.long_tokens < data.min_tokens:
        yield (
            f"data.long_tokens={data.long_tokens} is below data.min_tokens={data.min_tokens}: every document would be "
            "long; raise it"
        )


def _length(recipe: Recipe) -> Iterator[str]:
    train = recipe.train
    if not train.stages:
        if train.stages is not None:
            yield "train.stages is empty: give stages, or leave it out"
        if train.max_steps is None:
            yield "neither train.max_steps nor train.stages says how long to train: give one"
        return
    steps = sum(stage.steps for stage in train.stages)
    if train.max_steps is not None and train.max_steps != steps:
        yield f"train.max_steps={train.max_steps}, and the steps of train.stages sum to {steps}: leave max_steps out"
    longest = max(stage.length for stage in train.stages)
    if recipe.data.length != longest:
        yield f"data.length={recipe.data.length}, and the longest of train.stages is {longest}: make them equal"


def _lengths(recipe: Recipe) -> list[int]:
    """The window of every stage, in tokens."""
    return [stage.length for stage in recipe.train.stages or []] or [recipe.data.length]


def _positions(recipe: Recipe) -> Iterator[str]:
    positions = recipe.train.positions
    if positions is None:
        return
    longest, shortest = max(_lengths(recipe)), min(_lengths(recipe))
    if positions.target_length is None:
        if recipe.patch is None:
            yield "train.positions has no target_length, and there is no patch to take it from: give one of the two"
    elif positions.target_length < longest:
        yield (
            f"train.positions.target_length={positions.target_length} is below the window of {longest} tokens "
            "(data.length): raise it"
        )
    if positions.kind == "random" and "chunks" in positions.model_fields_set:
        yield "train.positions.chunks belongs to kind pose, and kind is random: leave it out"
    elif positions.chunks > shortest:
        yield f"train.positions.chunks={positions.chunks} is more than the window's {shortest} tokens: lower it"


def _shifted_groups(recipe: Recipe) -> Iterator[str]:
    shifted = recipe.train.shifted_groups
    if shifted is None:
        return
    if shifted.group % 2:
        yield f"train.shifted_groups.group={shifted.group} is shifted by half of itself: make it even"
    for length in sorted(set(_lengths(recipe))):
        if length % shifted.group:
            yield (
                f"train.shifted_groups.group={shifted.group} does not divide the window of {length} tokens "
                "(data.length): choose a divisor"
            )
    if recipe.train.context_parallel > 1:
        yield "train.shifted_groups and train.context_parallel: a shared sequence has no shifted groups; choose one"


def _processes(recipe: Recipe, processes: int | None) -> Iterator[str]:
    train = recipe.train
    shared = train.context_parallel
    if shared > 1:
        if train.sharding == "zero3":
            yield "train.context_parallel and train.sharding=zero3 are not combined: choose one, or fsdp2"
    elif "context_mode" in train.model_fields_set and train.context_mode != "all_gather":
        yield f"train.context_mode={train.context_mode} is how processes share a sequence: raise train.context_parallel"
    if train.offload_activations and not train.gradient_checkpointing:
        yield "train.offload_activations moves what gradient_checkpointing keeps: set train.gradient_checkpointing=true"
    if processes is not None and processes % shared:
        yield f"{processes} processes cannot form groups of train.context_parallel={shared}: take a multiple of it"
        return
    groups = 1 if processes is None else processes // shared
    if train.batch_size % (train.micro_batch_size * groups):
        yield (
            f"train.batch_size={train.batch_size} is no multiple of train.micro_batch_size={train.micro_batch_size}"
            + (f" x {groups} data-parallel processes" if groups > 1 else "")
            + f": take a multiple of {train.micro_batch_size * groups}"
        )


def _names(recipe: Recipe) -> Iterator[str]:
    """Names that transformers gives meaning to."""
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    train = recipe.train
    yield from _unknown("train.optim", train.optim, [entry.value for entry in OptimizerNames])
    schedules = [entry.value for entry in SchedulerType]
    if train.lr_scheduler_type in _UNUSABLE_SCHEDULES:
        usable = ", ".join(name for name in schedules if name not in _UNUSABLE_SCHEDULES)
        reason = _UNUSABLE_SCHEDULES[train.lr_scheduler_type]
        yield f"train.lr_scheduler_type={train.lr_scheduler_type} cannot be used: {reason}; allowed: {usable}"
    else:
        usable_names = [name for name in schedules if name not in _UNUSABLE_SCHEDULES]
        yield from _unknown("train.lr_scheduler_type", train.lr_scheduler_type, usable_names)
    for name in train.report_to:
        yield from _unknown("train.report_to", name, _trackers())


def _trackers() -> list[str]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return sorted(INTEGRATION_TO_CALLBACK)


def _unknown(place: str, given: str, names: list[str]) -> Iterator[str]:
    if given not in names:
        yield f"{place}: unknown name {given!r}{guess(given, names)} (allowed: {', '.join(names)})"


def _eval(recipe: Recipe) -> Iterator[str]:
    from ropepatch.evaluation.suites import load_suite

    section = recipe.eval
    for number, run in enumerate(section.runs):
        try:
            load_suite(run.suite, run.settings)
        except RopepatchError as error:
            yield f"eval.runs.{number}: {_text(error)}"
    if section.runs and not (section.before or section.after or section.unpatched):
        yield "eval.runs is given, and unpatched, before and after are all false: set one, or leave runs out"


def _is_local(name: str) -> bool:
    return name.startswith(("demo:", "scratch:")) or Path(name).expanduser().exists()


def _text(error: RopepatchError) -> str:
    return str(error).removesuffix(".")

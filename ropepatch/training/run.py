"""`train`: from a recipe to an adapted model, evaluated before and after, whatever interrupts it on the way."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ropepatch.errors import DependencyError, ModelLoadError
from ropepatch.evaluation.progress import say
from ropepatch.training.checks import check, check_machine
from ropepatch.training.folder import CHECKPOINTS, TrainingFolder
from ropepatch.training.launch import Launch, as_launched, find_launch
from ropepatch.training.recipe import Recipe

# A rehearsal is about what fails, not about how long windows are.
_REHEARSED_WINDOW = 1024


@dataclass(frozen=True)
class TrainingResult:
    """What `train` returns.

    Attributes:
        output: the run's folder.
        model: the folder with what was trained: `adapter/`, or `model/` where all weights were.
        steps: optimizer steps that were run in all; fewer than asked after an early stop.
        resumed_from: the step that this call went on from; None where it began, or had nothing to train.
        merged: the folder with the adapter merged into its base, or None.
        report: `report.md`.
    """

    output: Path
    model: Path
    steps: int
    resumed_from: int | None
    merged: Path | None
    report: Path


def train(recipe: Recipe, output: Path, *, resume: bool = True, progress: bool = True) -> TrainingResult:
    """Train as a recipe says: patch, adapters, data, loop, saved and verified model, evaluations, report.

    The same call again goes on where it was interrupted, to the same result; a run that is finished trains nothing.
    Started by torchrun or accelerate launch, the processes share the work, and all return.

    Args:
        recipe: what to do.
        output: the run's folder; made if missing.
        resume: False refuses a folder that holds a run.
        progress: show a bar on stderr.

    Raises:
        OptionError, UsageError, PromptError: what is asked cannot be; nothing has been trained.
        OutputConflictError: the folder belongs to a run of another recipe, or holds other files.
        OutputError: it cannot be written (checkpoints that are there stay whole), or another process has it open.
        ModelLoadError: the model or its tokenizer cannot be loaded.
        VerificationError: the loss diverged, or what was saved is not what was trained.
    """
    _require_packages()
    output = Path(output)
    recipe = as_launched(recipe)
    launch = find_launch(recipe)
    check(recipe, processes=launch.ranks.world_size)
    check_machine(recipe)
    with _opened(recipe, output, launch, resume) as folder:
        return _Run(recipe, output, launch, folder, progress and launch.is_first).run()


def rehearse(recipe: Recipe) -> None:
    """Do all of a recipe up to and with its first step, with a tiny random model of the same architecture.

    The tokenizer is the real one where it can be had, else a stand-in; windows are cut to 1,024 tokens; quantization,
    fused kernels, sharding and several processes are left out. Nothing is kept but tokenised data, in its cache.

    Raises:
        RopepatchError: what would fail, before anything is trained.
    """
    from ropepatch.training import adapters, loading
    from ropepatch.training.rehearsal import shortened, stand_in
    from ropepatch.training.stages import Schedule, apply_patch

    _require_packages()
    check(recipe)
    with tempfile.TemporaryDirectory() as place:
        try:
            tokenizer, cache = loading.load_tokenizer(recipe.model), None
        except ModelLoadError:
            tokenizer, cache = stand_in(), place
        small = shortened(recipe, _REHEARSED_WINDOW, cache=cache)
        model = loading.shrunk(small, len(tokenizer))
        if small.patch is not None:
            apply_patch(model, small.patch, Schedule.of(small).legs[-1].options or {})
        model = adapters.adapt(model, small)
        run = _Run(small, Path(place), Launch(), None, progress=False, keeps=False)
        run.fit(model, run.rows(tokenizer), None)


@dataclass(frozen=True)
class _Trained:
    """What was trained, in numbers: steps, logits of a probe, and the trained parameters by name."""

    steps: int
    logits: Any
    weights: dict[str, Any]


class _Run:
    """One run on its way."""

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        launch: Launch,
        folder: TrainingFolder | None,
        progress: bool,
        *,
        keeps: bool = True,
    ) -> None:
        from ropepatch.training.checkpoints import Checkpoints
        from ropepatch.training.stages import Schedule

        self.recipe, self.output, self.launch, self.folder, self.progress = recipe, output, launch, folder, progress
        self.schedule = Schedule.of(recipe)
        self.checkpoints = Checkpoints(output / CHECKPOINTS, recipe.train.keep, launch)
        # A rehearsal keeps nothing.
        self.keeps = keeps
        self.resumed_from: int | None = None
        # Of the patch, as they are in force in the model that is trained.
        self._options: dict[str, Any] | None = None

    def run(self) -> TrainingResult:
        from ropepatch.training import loading

        record = self._record()
        if record["finished"]:
            self._say(f"the run in {self.output} is finished: nothing to train")
            return self._result(record)
        tokenizer = loading.load_tokenizer(self.recipe.model)
        if record["trained"] is None:
            self._train(tokenizer)
        self._conclude(tokenizer)
        return self._result(self._record())

    # -- training

    def _train(self, tokenizer: Any) -> None:
        from ropepatch.training import reloading

        trained = self._trained(tokenizer)
        # The model has gone by now: a base is loaded once at a time.
        _free()
        self.launch.on_first(
            lambda: reloading.verify(
                reloading.reload(self.recipe, self.output), self.recipe, trained.logits, trained.weights
            )
        )
        self._update(trained={"steps": trained.steps, "stopped_early": trained.steps < self.schedule.steps})

    def _trained(self, tokenizer: Any) -> _Trained:
        """Train, save, and return what the saved model is to be held against."""
        from ropepatch.training import reloading
        from ropepatch.training.parallel import sharded
        from ropepatch.training.trainer import trained

        checkpoint = self._newest()
        # Before anything that takes long: data are wrong more often than models.
        rows = self.rows(tokenizer)
        model = self._prepared(tokenizer)
        steps = self.fit(model, rows, checkpoint)
        if sharded.is_sharded(model):
            # A sharded model cannot be put together again: its trained weights go into a fresh one.
            values = sharded.gathered(trained(model))
            del model
            _free()
            model = self._prepared(tokenizer)
            sharded.fill(trained(model), values)
        logits = reloading.probe(model, self.recipe)
        # Adapters are small. Whole models are held against their logits alone.
        few = trained(model) if self.recipe.lora is not None else {}
        weights = {name: value.detach().cpu().clone() for name, value in few.items()}
        self.launch.on_first(lambda: _none(reloading.save(model, tokenizer, self.recipe, self.output)))
        return _Trained(steps, logits, weights)

    def _newest(self) -> Path | None:
        """The checkpoint to go on from; damaged ones are told and passed over."""

        def find() -> Path | None:
            found, problems = self.checkpoints.newest()
            for problem in problems:
                self._say(problem)
            return found

        checkpoint = self.launch.on_first(find)
        if checkpoint is not None:
            self.resumed_from = self.checkpoints.step_of(checkpoint)
            self._say(f"going on from step {self.resumed_from} of {self.schedule.steps}")
        return checkpoint

    def _prepared(self, tokenizer: Any) -> Any:
        """The model as training begins: measured, patched, measured again, with adapters."""
        import ropepatch
        from ropepatch.training import adapters, loading
        from ropepatch.training.stages import apply_patch

        model = loading.load_base(self.recipe)
        self._measure(model, tokenizer, "unpatched")
        if self.recipe.patch is not None:
            # As it will be after training: the last stage's options.
            apply_patch(model, self.recipe.patch, self.schedule.legs[-1].options or {})
            self._update(patch=ropepatch.record_of(model))
        self._measure(model, tokenizer, "before")
        return adapters.adapt(model, self.recipe)

    def fit(self, model: Any, rows: Any, checkpoint: Path | None) -> int:
        """Run the steps that are left.

        Args:
            model: with its adapters.
            rows: from `rows`.
            checkpoint: to go on from.

        Returns:
            The steps that are done in all.
        """
        from ropepatch.training import loading
        from ropepatch.training.log import LOG, Log
        from ropepatch.training.loss import check as check_loss
        from ropepatch.training.loss import choose_backend
        from ropepatch.training.parallel import sharded
        from ropepatch.training.positions import Collator, training_attention
        from ropepatch.training.rows import Share
        from ropepatch.training.trainer import RecipeTrainer, load_trained

        recipe, launch = self.recipe, self.launch
        first = 0 if checkpoint is None else self.checkpoints.step_of(checkpoint)
        total = self.schedule.steps
        train = recipe.train
        share = Share(total, train.batch_size, train.micro_batch_size, launch.group, launch.groups)
        use_cache = model.config.use_cache
        with ExitStack() as stack:
            # Trained weights are float32 whatever the base is: only autocast brings them together.
            with loading.autocast(model, recipe):
                targets = self._targets(model, first)
                numbered = stack.enter_context(training_attention(model, recipe))
                backend = choose_backend(train.loss, model)
                check_loss(model, backend=backend)
                context = self._context(model, stack)
            stack.enter_context(_checkpointed(model, recipe))
            if train.sharding == "fsdp2":
                sharded.shard(model)
            if checkpoint is not None and self._is_done(checkpoint, first):
                load_trained(model, checkpoint)
                return first
            log = Log(self.output / LOG, first) if launch.is_first and self.keeps else None
            tell = stack.enter_context(_bar(total, first, self.progress))
            trainer = RecipeTrainer(
                model,
                recipe,
                rows,
                Collator(recipe, targets, numbered=numbered),
                share,
                backend=backend,
                folder=self.output,
                launch=launch,
                checkpoints=self.checkpoints if self.keeps else None,
                log=log,
                context=context,
                first_step=first,
                on_step=lambda step: self._enter(model, step, context),
                on_line=tell,
            )
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            done = trainer.state.global_step
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)
        model.config.use_cache = use_cache
        model.eval()
        return done

    def _is_done(self, checkpoint: Path, step: int) -> bool:
        """Whether nothing is left to train: the last step, or one at which the loss had stalled."""
        from ropepatch.files import read_object
        from ropepatch.training.early_stop import has_stalled
        from ropepatch.training.trainer import STATE

        if step >= self.schedule.steps:
            return True
        rule = self.recipe.train.early_stop
        lines = [line for line in read_object(checkpoint / STATE)["log_history"] if "loss" in line]
        return rule is not None and has_stalled(lines, rule)

    def rows(self, tokenizer: Any) -> Any:
        """What is trained on; the first process tokenises, and the others read what it kept."""
        from ropepatch.training import data

        if self.launch.ranks.world_size > 1:
            self.launch.on_first(lambda: _none(data.build(self.recipe, tokenizer)))
        return data.build(self.recipe, tokenizer)

    def _targets(self, model: Any, first: int) -> list[int | None]:
        """The target length of each stage, in tokens. Leaves the model with the options of step `first`."""
        import ropepatch
        from ropepatch.training.stages import repatch

        patch = self.recipe.patch
        if patch is None:
            return [None] * len(self.schedule.legs)
        targets = []
        for leg in self.schedule.legs:
            repatch(model, patch, leg.options or {})
            targets.append((ropepatch.record_of(model) or {}).get("target_length"))
        self._options = self.schedule.options_at(first)
        repatch(model, patch, self._options or {})
        return targets

    def _context(self, model: Any, stack: ExitStack) -> Any:
        from ropepatch.training.parallel.context import ContextParallel

        train = self.recipe.train
        if train.context_parallel == 1:
            return None
        context = ContextParallel.start(train.context_parallel, train.context_mode)
        context.attach(model)
        stack.callback(context.detach)
        return context

    def _enter(self, model: Any, step: int, context: Any) -> None:
        """Put the options of a step's stage in force, where they are not."""
        from ropepatch.training import loading
        from ropepatch.training.stages import repatch

        patch, options = self.recipe.patch, self.schedule.options_at(step)
        if patch is None or options == self._options:
            return
        if context is not None:
            context.detach()
        with loading.autocast(model, self.recipe):
            repatch(model, patch, options or {})
            if context is not None:
                context.attach(model)
        self._options = options

    # -- after training

    def _conclude(self, tokenizer: Any) -> None:
        from ropepatch.training import report

        recipe = self.recipe
        merging = recipe.lora is not None and recipe.lora.merge and not self._record()["merged"]
        # One answer for all: what they see of the folder may differ.
        measured = self.launch.on_first(lambda: report.is_measured(recipe, self.output, "after"))
        if merging or not measured:
            self._use_saved(tokenizer, merging=merging)
            _free()
        self.launch.on_first(lambda: _none(report.write_report(recipe, self.output, self._folder.record)))
        self._update(finished=True)

    def _use_saved(self, tokenizer: Any, *, merging: bool) -> None:
        from ropepatch.training import reloading

        model = reloading.reload(self.recipe, self.output)
        self._measure(model, tokenizer, "after")
        if merging:
            self.launch.on_first(lambda: _none(reloading.merge(model, tokenizer, self.recipe, self.output)))
            self._update(merged=True)

    def _measure(self, model: Any, tokenizer: Any, stage: str) -> None:
        from ropepatch.training import report

        recipe, output = self.recipe, self.output
        if not self.launch.on_first(lambda: report.is_measured(recipe, output, stage)):
            self._say(f"measuring the model: {stage}")
            report.measure(model, tokenizer, recipe, output, stage, progress=self.progress)

    # -- the folder

    def _record(self) -> dict[str, Any]:
        return self.launch.on_first(lambda: self._folder.record)

    def _update(self, **entries: Any) -> None:
        self.launch.on_first(lambda: self._folder.update(**entries))

    @property
    def _folder(self) -> TrainingFolder:
        assert self.folder is not None
        return self.folder

    def _result(self, record: dict[str, Any]) -> TrainingResult:
        from ropepatch.training.folder import MERGED, REPORT
        from ropepatch.training.reloading import trained_folder

        return TrainingResult(
            output=self.output,
            model=trained_folder(self.recipe, self.output),
            steps=record["trained"]["steps"],
            resumed_from=self.resumed_from,
            merged=self.output / MERGED if self.recipe.lora is not None and self.recipe.lora.merge else None,
            report=self.output / REPORT,
        )

    def _say(self, text: str) -> None:
        if self.launch.is_first:
            say(text)


@contextmanager
def _opened(recipe: Recipe, output: Path, launch: Launch, resume: bool) -> Iterator[TrainingFolder | None]:
    """The run's folder, opened by the first process; the others get None, and its error where it has one."""
    held: list[TrainingFolder] = []
    launch.on_first(lambda: held.append(TrainingFolder.open(output, recipe, launch.to_dict(), resume=resume)))
    with held[0] if held else nullcontext() as folder:
        yield folder


@contextmanager
def _checkpointed(model: Any, recipe: Recipe) -> Iterator[None]:
    """Activation checkpointing, as the recipe asks, for the length of a with block."""
    from ropepatch.families import host_of
    from ropepatch.training.memory import trimmed

    if not recipe.train.gradient_checkpointing:
        yield
        return
    host: Any = host_of(model)
    words = {"use_reentrant": False}
    # Remove the second branch when the lowest supported transformers has `activation_checkpointing_enable`.
    if hasattr(host, "activation_checkpointing_enable"):
        host.activation_checkpointing_enable(
            activation_checkpointing_kwargs=words, offload=recipe.train.offload_activations
        )
    elif recipe.train.offload_activations:
        raise DependencyError(
            "train.offload_activations needs a newer transformers", hint="pip install -U transformers"
        )
    else:
        host.gradient_checkpointing_enable(gradient_checkpointing_kwargs=words)
    try:
        with trimmed(host):
            yield
    finally:
        getattr(host, "activation_checkpointing_disable", host.gradient_checkpointing_disable)()


def _bar(steps: int, done: int, show: bool) -> Any:
    from ropepatch.training.progress import training_bar

    return training_bar(steps, done, show)


def _require_packages() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("accelerate", "datasets", "peft", "matplotlib") if find_spec(name) is None]
    if missing:
        raise DependencyError(f"training needs {', '.join(missing)}", hint="run: pip install 'ropepatch[train,eval]'")


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _none(_: object) -> None:
    """Nothing, for work whose result the other processes do not need."""

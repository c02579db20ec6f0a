"""transformers' Trainer with our rows, our loss, our checkpoints and our log.

The Trainer keeps what it does well: optimizers and schedules by name, accumulation, clipping, wrapping for several
processes, and trackers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ropepatch.errors import RecordError, VerificationError
from ropepatch.training.checkpoints import Checkpoints
from ropepatch.training.early_stop import has_stalled
from ropepatch.training.launch import Launch, check_accelerator
from ropepatch.training.loading import computes_in_bfloat16
from ropepatch.training.log import Log
from ropepatch.training.loss import causal_loss
from ropepatch.training.parallel import sharded
from ropepatch.training.parallel.context import ContextParallel
from ropepatch.training.recipe import Recipe
from ropepatch.training.rows import Share, loader

WEIGHTS = "trained.safetensors"
STATE = "trainer_state.json"
_OPTIMIZER, _SCHEDULER = "optimizer.pt", "scheduler.pt"

Collate = Callable[[Any], dict[str, Tensor]]


class RecipeTrainer(Trainer):
    """Trains a prepared model as a recipe says.

    Args:
        model: patched, with its adapters.
        recipe: its train section is read.
        rows: from `ropepatch.training.data.build`.
        collate: makes a batch of rows.
        share: which rows are this process's.
        backend: of the loss, as `choose_backend` gave it.
        launch: the processes.
        checkpoints: where to write them; None writes none.
        log: where to write lines; None in other processes than the first.
        context: shares sequences with other processes; attached by the caller.
        first_step: how many steps are done.
        on_step: called before each step with its number, from 0.
        on_line: called with each line of the log.
    """

    # The loss is a share of the whole step's: nothing is divided again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        rows: Dataset[Any],
        collate: Collate,
        share: Share,
        *,
        backend: str,
        folder: Path,
        launch: Launch,
        checkpoints: Checkpoints | None = None,
        log: Log | None = None,
        context: ContextParallel | None = None,
        first_step: int = 0,
        on_step: Callable[[int], None] | None = None,
        on_line: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._recipe, self._rows, self._collate, self._share = recipe, rows, collate, share
        self._backend, self._launch, self._checkpoints, self._log = backend, launch, checkpoints, log
        self._context, self._first_step = context, first_step
        arguments = _arguments(recipe, share, folder, launch, saving=checkpoints is not None)
        super().__init__(model=model, args=arguments)
        # Older releases divide by the number of forwards unless the model takes keywords.
        self.model_accepts_loss_kwargs = True
        check_accelerator(recipe, self.accelerator)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Steps(on_step))
        self.add_callback(_Lines(self, on_line))

    # -- rows

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Not prepared by accelerate, which would share out the rows once more."""
        return loader(self._rows, self._share, self._collate, first_step=self._first_step)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The forwards of one step, and the labels of the whole step, over all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        if not batches:
            return [], None
        labels = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        read = sum(batch["input_ids"].numel() for batch in batches)
        counts = torch.tensor([labels, read], device=device)
        if self._launch.ranks.world_size > 1:
            # Processes that share a sequence have counted the same rows.
            counts = self.accelerator.reduce(counts, "sum") // self._launch.context
        if self._log is not None:
            self._log.count(int(counts[1]))
        return batches, counts[0]

    # -- loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This forward's share of the step's loss, times the processes, over which gradients are averaged."""
        assert not return_outputs
        batch = inputs if self._context is None else self._context.shard(inputs)
        with self.accelerator.autocast():
            loss = causal_loss(
                model, batch, tokens=num_items_in_batch, chunk=self._recipe.train.loss_chunk, backend=self._backend
            )
        return loss * self._launch.ranks.world_size

    # -- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        del model, trial
        assert self._checkpoints is not None
        with self._checkpoints.writing(self.state.global_step) as folder:
            if self.is_deepspeed_enabled:
                self.save_model(str(folder), _internal_call=True)
            else:
                # All processes gather, where each has a share.
                values = sharded.gathered(trained(self.model))
                if self._launch.is_first:
                    _save_weights(values, folder / WEIGHTS)
            self._save_optimizer_and_scheduler(str(folder))
            self._save_scaler(str(folder))
            self._save_rng_state(str(folder))
            if self._launch.is_first:
                self.state.save_to_json(str(folder / STATE))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not sharded.is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = sharded.gathered_optimizer(self.optimizer)
        if self._launch.is_first:
            torch.save(state, Path(output_dir, _OPTIMIZER))
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, _SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not sharded.is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        sharded.fill_optimizer(self.optimizer, torch.load(Path(checkpoint, _OPTIMIZER), weights_only=True))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, _SCHEDULER), weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model, Path(resume_from_checkpoint))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; tied ones once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained(model: nn.Module, checkpoint: Path) -> None:
    """Give the trained parameters of a model the values of a checkpoint.

    Raises:
        RecordError: it holds other parameters.
    """
    from safetensors.torch import load_file

    values, places = load_file(checkpoint / WEIGHTS), trained(model)
    if values.keys() != places.keys():
        other = sorted(values.keys() ^ places.keys())
        raise RecordError(f"the checkpoint {checkpoint} holds other parameters than are trained", given=other[:3])
    sharded.fill(places, values)


def _save_weights(values: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in values.items()}, file)


def _arguments(recipe: Recipe, share: Share, folder: Path, launch: Launch, *, saving: bool) -> TrainingArguments:
    train = recipe.train
    cpu = not torch.accelerator.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=share.steps,
        per_device_train_batch_size=share.micro_batch_size,
        gradient_accumulation_steps=share.accumulation,
        learning_rate=train.learning_rate,
        optim=train.optim,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm or 0.0,
        seed=train.seed,
        bf16=computes_in_bfloat16(recipe),
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and launch.ranks.world_size > 1 else None,
        ddp_find_unused_parameters=False,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        save_strategy="steps" if saving else "no",
        save_steps=train.save_every,
        report_to=train.report_to or "none",
        run_name=folder.name,
        ignore_data_skip=True,  # the sampler begins at the right row by itself
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        disable_tqdm=True,
    )
    # One process drives one device: the Trainer would split batches over all that it sees.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _Steps(TrainerCallback):
    """Tells of each step before it begins."""

    def __init__(self, on_step: Callable[[int], None] | None) -> None:
        self.on_step = on_step

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if self.on_step is not None:
            self.on_step(state.global_step)


class _Lines(TrainerCallback):
    """Writes the log, stops a run whose loss stalls, and refuses one whose loss is no number."""

    def __init__(self, trainer: RecipeTrainer, on_line: Callable[[dict[str, Any]], None] | None) -> None:
        self.trainer, self.on_line = trainer, on_line

    def on_log(self, _args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" not in logs:
            return
        step = state.global_step
        if not math.isfinite(logs["loss"]):
            raise VerificationError(
                f"the loss of step {step} is {logs['loss']}: training has diverged",
                hint="lower train.learning_rate, or raise train.warmup_steps; earlier checkpoints are intact",
            )
        values = {name: float(logs[name]) for name in ("loss", "learning_rate", "grad_norm") if name in logs}
        if self.trainer._log is not None:
            line = self.trainer._log.append(step, values)
            if self.on_line is not None:
                self.on_line(line)
        rule = self.trainer._recipe.train.early_stop
        lines = [line for line in state.log_history if "loss" in line]
        if rule is not None and has_stalled(lines, rule):
            control.should_training_stop = control.should_save = True

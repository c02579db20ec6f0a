"""What the launch gave, held against what it was asked for: a run that asked for N processes and got one is refused.

accelerate loses what it was asked for in silence on a CPU: `--num_processes 2` starts one process, and a configuration
for FSDP runs as plain DDP.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ropepatch.errors import RopepatchError, UsageError
from ropepatch.evaluation.sharding import Ranks, find_ranks
from ropepatch.training.recipe import Recipe

T = TypeVar("T")

# What accelerate calls a launch that it shards itself. With fsdp2 it starts the processes; `parallel.sharded` shards.
_SHARDED_BY = {"zero3": "DEEPSPEED"}
_SHARDING = ("FSDP", "DEEPSPEED")
_ASKED_BY = {"fsdp2": "ACCELERATE_USE_FSDP", "zero3": "ACCELERATE_USE_DEEPSPEED"}
_CONTEXT_WORDS = ("PARALLELISM_CONFIG_CP_SIZE", "PARALLELISM_CONFIG_SP_SIZE", "PARALLELISM_CONFIG_TP_SIZE")


@dataclass(frozen=True)
class Launch:
    """The processes of a run.

    Attributes:
        ranks: this process's number, and how many there are.
        context: processes that share one sequence; neighbours by number.
    """

    ranks: Ranks = field(default_factory=Ranks)
    context: int = 1

    @property
    def is_first(self) -> bool:
        return self.ranks.is_first

    @property
    def group(self) -> int:
        """Number of this process's data-parallel group."""
        return self.ranks.rank // self.context

    @property
    def groups(self) -> int:
        return self.ranks.world_size // self.context

    def on_first(self, work: Callable[[], T]) -> T:
        """What process 0 gets from `work`; an error of the package is raised in all processes. All must call it."""
        value: Any = None
        refused: RopepatchError | None = None
        if self.is_first:
            try:
                value = work()
            except RopepatchError as error:
                if self.ranks.world_size == 1:
                    raise
                refused = error
        value, refused = self.ranks.from_first((value, refused))
        if refused is not None:
            raise refused
        result: T = value
        return result

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `run.json`."""
        return {"processes": self.ranks.world_size, "context_parallel": self.context}


def as_launched(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> Recipe:
    """The recipe with `train.sharding` as accelerate's launcher was asked for it, where the recipe leaves it open."""
    if recipe.train.sharding is not None:
        return recipe
    asked = (sharding for sharding, name in _ASKED_BY.items() if _says_yes(environment.get(name)))
    train = recipe.train.model_copy(update={"sharding": next(asked, "none")})
    return recipe.model_copy(update={"train": train})


def find_launch(recipe: Recipe, environment: Mapping[str, str] = os.environ) -> Launch:
    """Join the other processes of the launch, and hold what is there against the recipe and the launcher's words.

    Raises:
        UsageError: the launch was asked for several processes and started one; the recipe asks for another number, or
            for sharding that the launch does not give, or the reverse; or `train.context_parallel` does not divide it.
        DependencyError: several processes, and accelerate is not installed.
    """
    train = as_launched(recipe, environment).train
    for sharding, name in _ASKED_BY.items():
        if _says_yes(environment.get(name)) and train.sharding != sharding:
            raise UsageError(
                f"the launch asks for {sharding} and the recipe for train.sharding={train.sharding}",
                hint=f"set train.sharding={sharding}, or launch without it",
            )
    if train.sharding == "fsdp2":
        # On accelerators accelerate would shard as well, and on a CPU it would do nothing instead.
        os.environ.pop(_ASKED_BY["fsdp2"], None)
    for name in _CONTEXT_WORDS:
        if int(environment.get(name) or 1) > 1:
            raise UsageError(
                f"the launch asks for a parallelism of accelerate's own ({name.removeprefix('PARALLELISM_CONFIG_')})",
                given=environment[name],
                hint="take it out of the configuration; sequences are shared by train.context_parallel",
            )
    ranks = find_ranks(environment)
    there = ranks.world_size
    if train.processes is not None and train.processes != there:
        raise UsageError(
            "the recipe asks for another number of processes than the launch started",
            given=there,
            allowed=str(train.processes),
            hint=f"launch with: torchrun --nproc_per_node {train.processes} -m ropepatch.training RECIPE",
        )
    if there % train.context_parallel:
        raise UsageError(
            "train.context_parallel must divide the number of processes",
            given=train.context_parallel,
            allowed=f"a divisor of {there}",
            hint=f"launch with: torchrun --nproc_per_node {train.context_parallel} -m ropepatch.training RECIPE",
        )
    if train.sharded and there == 1:
        raise UsageError(
            f"train.sharding={train.sharding} needs several processes, and the launch started one",
            hint=f"launch with: accelerate launch --config_file recipes/accelerate/{train.sharding}.yaml "
            "-m ropepatch.training RECIPE",
        )
    return Launch(ranks, train.context_parallel)


def check_accelerator(recipe: Recipe, accelerator: Any) -> None:
    """Hold what accelerate made of the launch against `train.sharding`.

    Raises:
        UsageError: it shards another way than the recipe says, or not at all.
    """
    found = accelerator.state.distributed_type.name
    wanted = _SHARDED_BY.get(recipe.train.sharding or "none")
    if found != wanted if wanted is not None else found in _SHARDING:
        raise UsageError(
            f"the recipe asks for train.sharding={recipe.train.sharding}, and the launch gives another way",
            given=found,
            hint="launch with recipes/accelerate/zero3.yaml for zero3, fsdp2.yaml for fsdp2, ddp.yaml or cpu.yaml for "
            "none",
        )


def _says_yes(word: str | None) -> bool:
    return (word or "").lower() in ("1", "true", "yes", "on")

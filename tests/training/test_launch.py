"""What the launch gave, held against what was asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from training_runs import recipe

from ropepatch.errors import UsageError
from ropepatch.evaluation.sharding import Ranks
from ropepatch.training.launch import Launch, as_launched, check_accelerator, find_launch

HERE = Path("model")


def test_one_process_is_one_group() -> None:
    launch = find_launch(recipe(HERE), {})
    assert (launch.group, launch.groups, launch.is_first) == (0, 1, True)
    assert launch.on_first(lambda: 7) == 7


def test_neighbours_share_a_sequence() -> None:
    launches = [Launch(Ranks(rank, 6), context=2) for rank in range(6)]
    assert [launch.group for launch in launches] == [0, 0, 1, 1, 2, 2]
    assert {launch.groups for launch in launches} == {3}


def test_a_launch_of_several_that_started_one_is_refused() -> None:
    # What accelerate leaves behind when it is asked for two processes on a CPU.
    lone = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500", "MASTER_ADDR": "127.0.0.1"}
    with pytest.raises(UsageError, match="(?i)several processes but started one"):
        find_launch(recipe(HERE), lone)


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        ({"train__processes": 2}, {}, "another number of processes.*torchrun --nproc_per_node 2"),
        ({"train__context_parallel": 2}, {}, r"context_parallel must divide.*torchrun --nproc_per_node 2"),
        ({"train__sharding": "fsdp2"}, {}, r"needs several processes.*fsdp2\.yaml"),
        (
            {"train__sharding": "none"},
            {"ACCELERATE_USE_FSDP": "true"},
            r"asks for fsdp2 and the recipe for train\.sharding=none",
        ),
        ({"train__sharding": "none"}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "asks for zero3"),
        # Left open, it is what the launch asks for, and held against what is there.
        ({}, {"ACCELERATE_USE_FSDP": "true"}, r"sharding=fsdp2 needs several processes.*fsdp2\.yaml"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, r"sharding=zero3 needs several processes"),
        ({"train__sharding": "zero3"}, {"ACCELERATE_USE_FSDP": "1"}, "asks for fsdp2"),
        ({}, {"PARALLELISM_CONFIG_CP_SIZE": "2"}, r"CP_SIZE.*train\.context_parallel"),
    ],
)
def test_what_was_asked_and_is_not_there_is_refused(
    settings: dict[str, Any], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=f"(?i){message}"):
        find_launch(recipe(HERE, **settings), environment)


@pytest.mark.parametrize(
    ("given", "environment", "wanted"),
    [
        (None, {}, "none"),
        (None, {"ACCELERATE_USE_FSDP": "true"}, "fsdp2"),
        (None, {"ACCELERATE_USE_DEEPSPEED": "1", "ACCELERATE_USE_FSDP": "false"}, "zero3"),
        ("none", {"ACCELERATE_USE_FSDP": "true"}, "none"),
        ("fsdp2", {}, "fsdp2"),
    ],
)
def test_sharding_that_the_recipe_leaves_open_is_the_launchs(
    given: str | None, environment: dict[str, str], wanted: str
) -> None:
    asked = recipe(HERE, train__sharding=given)
    assert as_launched(asked, environment).train.sharding == wanted
    assert asked.train.sharding == given


def accelerator(name: str, version: int | None = None) -> Any:
    plugin = SimpleNamespace(fsdp_version=version) if version else None
    return SimpleNamespace(state=SimpleNamespace(distributed_type=SimpleNamespace(name=name), fsdp_plugin=plugin))


@pytest.mark.parametrize(
    ("sharding", "found", "version", "fine"),
    [
        ("none", "MULTI_CPU", None, True),
        ("none", "NO", None, True),
        # accelerate starts the processes and shards nothing: ropepatch does.
        ("fsdp2", "MULTI_CPU", None, True),
        ("fsdp2", "FSDP", 2, False),
        ("zero3", "DEEPSPEED", None, True),
        ("zero3", "MULTI_GPU", None, False),
        ("none", "FSDP", 2, False),
    ],
)
def test_sharding_is_what_the_recipe_says(sharding: str, found: str, version: int | None, fine: bool) -> None:
    asked = recipe(HERE, train__sharding=sharding)
    if fine:
        check_accelerator(asked, accelerator(found, version))
    else:
        with pytest.raises(UsageError, match="another way"):
            check_accelerator(asked, accelerator(found, version))

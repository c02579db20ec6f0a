"""The shipped accelerate configurations: accelerate reads them, and they start what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
TYPES = {"cpu": "MULTI_GPU", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED", "context_parallel": "MULTI_GPU"}

# One write a line: the processes share a pipe.
WHO = """
import sys
import torch
from accelerate import PartialState
state = PartialState(cpu=not torch.cuda.is_available())
sys.stdout.write(f"process {state.process_index} of {state.num_processes}\\n")
"""


def test_all_of_them_are_here() -> None:
    assert {file.stem for file in FILES} == set(TYPES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_it(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.distributed_type == TYPES[file.stem]
    assert config.num_processes >= 2
    assert not config.use_cpu, "accelerate would start one process"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_launch_line_is_in_its_header(file: Path) -> None:
    header = re.sub(r" \\\n# +", " ", file.read_text(encoding="utf-8"))
    assert f"#   accelerate launch --config_file recipes/accelerate/{file.name} -m ropepatch.training RECIPE" in header


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "fsdp2", "context_parallel"])
def test_it_starts_two_processes_on_a_cpu(name: str, tmp_path: Path) -> None:
    script = tmp_path / "who.py"
    script.write_text(WHO, encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    done = subprocess.run(
        [*command, "--config_file", str(FOLDER / f"{name}.yaml"), str(script)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {line for line in done.stdout.splitlines() if line.startswith("process")} == {
        "process 0 of 2",
        "process 1 of 2",
    }

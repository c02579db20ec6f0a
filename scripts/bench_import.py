"""How long `import` and `--help` take: ropepatch against transformers and lm_eval, in fresh processes.

    python scripts/bench_import.py [--rounds 11]

The commands run interleaved, round after round, so that a slow spell of the machine meets all of them; the first
round only warms the disk cache. Printed are the medians and their ratio to ropepatch's. A command whose package is
not installed is named and left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time

BASE_IMPORT = "import ropepatch"
BASE_HELP = "ropepatch --help"

# Label -> (package, arguments of the interpreter). `transformers` alone imports lazily, so both forms are shown.
COMMANDS: dict[str, tuple[str, list[str]]] = {
    BASE_IMPORT: ("ropepatch", ["-c", "import ropepatch"]),
    "import transformers": ("transformers", ["-c", "import transformers"]),
    "from transformers import AutoModelForCausalLM": (
        "transformers",
        ["-c", "from transformers import AutoModelForCausalLM"],
    ),
    "import lm_eval": ("lm_eval", ["-c", "import lm_eval"]),
    BASE_HELP: ("ropepatch", ["-m", "ropepatch", "--help"]),
    "transformers --help": ("transformers", ["-m", "transformers.cli.transformers", "--help"]),
    "lm_eval --help": ("lm_eval", ["-m", "lm_eval", "--help"]),
    "python (nothing)": ("sys", ["-c", "pass"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="measured rounds (default 11)")
    rounds = parser.parse_args().rounds
    if rounds < 1:
        parser.error("--rounds takes at least 1")

    commands = {}
    for label, (package, arguments) in COMMANDS.items():
        if package in sys.builtin_module_names or importlib.util.find_spec(package) is not None:
            commands[label] = arguments
        else:
            print(f"left out: {label} ({package} is not installed)")

    seconds: dict[str, list[float]] = {label: [] for label in commands}
    for number in range(rounds + 1):
        for label, arguments in commands.items():
            elapsed = run(arguments)
            if number:
                seconds[label].append(elapsed)
    print(table(seconds, rounds))


def run(arguments: list[str]) -> float:
    """Wall time in seconds of one fresh interpreter; a command that fails ends the benchmark."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def table(seconds: dict[str, list[float]], rounds: int) -> str:
    """A Markdown table of medians, spreads and ratios."""
    lines = [
        f"median of {rounds} interleaved rounds",
        "",
        "| command | median, s | min to max, s | times ropepatch |",
        "|---|---|---|---|",
    ]
    medians = {label: statistics.median(values) for label, values in seconds.items()}
    for label, values in seconds.items():
        base = medians[BASE_HELP if "--help" in label else BASE_IMPORT]
        ratio = medians[label] / base
        lines.append(f"| `{label}` | {medians[label]:.3f} | {min(values):.3f} to {max(values):.3f} | {ratio:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

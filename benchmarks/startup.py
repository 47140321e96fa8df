"""Processor seconds of commands that load no torch, against importing torch: best of a few new interpreters each.

    python benchmarks/startup.py [--rounds 5]

The limit is a ratio of 0.3: help, lists and plans must not feel like loading a framework.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from billhook.plan.table import Row, Table

LIMIT = 0.3


def seconds(arguments: list[str]) -> float:
    """Processor time (user + system) of one new interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a row for every command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.json"
        Table(tuple(Row(f"blocks.{i}.w", i, "w", (8, 8), {"alpha_peak": 1.0 + i}, {}) for i in range(4))).save(table)
        billhook = ["-m", "billhook"]
        commands = {
            "import torch": ["-c", "import torch"],
            "--help": [*billhook, "--help"],
            "prune --help": [*billhook, "prune", "--help"],
            "ls metrics": [*billhook, "ls", "metrics"],
            "plan": [
                *billhook,
                "plan",
                str(table),
                "--allocator=alphapruning",
                "--sparsity=0.5",
                f"-o{folder}/plan.json",
            ],
        }
        taken = {name: min(seconds(command) for _ in range(rounds)) for name, command in commands.items()}
    slowest = 0.0
    for name, value in taken.items():
        ratio = value / taken["import torch"]
        slowest = max(slowest, ratio if name != "import torch" else 0.0)
        print(f"{name:14} {value:6.2f} s  {ratio:5.2f} of importing torch")
    print(f"largest ratio {slowest:.2f}, limit {LIMIT}: {'met' if slowest <= LIMIT else 'MISSED'}")


if __name__ == "__main__":
    main()

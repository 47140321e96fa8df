"""Measure once, allocate as often as you like: the plans of many epsilons from one table.

Measuring needs the model. Allocating is arithmetic on the table: it loads no torch and takes microseconds, so a sweep
is free.
"""

import tempfile
from pathlib import Path

import billhook


def sweep(table: billhook.Table, sparsity: float, folder: Path) -> list[Path]:
    """Write one plan.json for each epsilon and print the range of sparsities it gives."""
    written = []
    for epsilon in (0.0, 0.1, 0.2, 0.3, 0.4):
        plan = billhook.allocate(table, sparsity, allocator="alphapruning", epsilon=epsilon)
        path = folder / f"plan-{epsilon}.json"
        plan.save(path)
        values = plan.sparsity.values()
        print(f"epsilon {epsilon}: layers lose {min(values):.3f} to {max(values):.3f} -> {path.name}")
        written.append(path)
    return written


def main() -> None:
    """Measure the bundled model, keep the table, sweep."""
    folder = Path(tempfile.mkdtemp())
    model = billhook.load_model(Path(billhook.__file__).parent / "demo_model")
    billhook.measure(model, ["alpha_peak"]).save(folder / "table.json")

    sweep(billhook.Table.load(folder / "table.json"), 0.6, folder)
    print(f"Use one of them: billhook prune MODEL --plan {folder / 'plan-0.2.json'} --calibration TEXT --output pruned")


if __name__ == "__main__":
    main()

"""Names of Billhook's own files in a model directory, and what their presence means."""

from pathlib import Path

RECORD = "billhook.json"  # what was done to the model, with a checksum of every file except those below
REPORT, CARD, PAGE = "report.json", "README.md", "report.html"  # made from the record; rewritten at any time
SHAPE = "shape.json"  # of a slimmed model, made from the record: the plan of what stays, to be edited and given again
PACKED = "billhook_packed.json"  # the record of the packed format
UNFINISHED = "billhook.unfinished.json"  # the state of a run that can be resumed
GRADIENTS = "gradients.safetensors"  # gradients of such a run; other ranks than 0 prefix their number
TRAINING = "training.safetensors"  # the state of a training run; the number of its steps is before the name
WRITTEN = "written.safetensors"  # calibration text that the model generated for such a run
LEVELS = "billhook.levels.json"  # what was measured so far to choose types for such a run
PARTIAL = ".partial"  # suffix of a directory's name until the directory is complete


def is_packed(directory: Path) -> bool:
    """Whether a directory was written by `billhook pack`."""
    return (directory / PACKED).is_file()


def is_unfinished(directory: Path) -> bool:
    """Whether the run that writes a directory has not completed it.

    A run ends by writing the record, renaming the directory and deleting the state, in this order: a state file in a
    renamed directory with a record is only left over.
    """
    renamed = not directory.resolve().name.endswith(PARTIAL)
    return (directory / UNFINISHED).is_file() and not (renamed and (directory / RECORD).is_file())

"""Names of the files in a model directory that are Billhook's own, and what their presence says about the directory."""

from pathlib import Path

RECORD = "billhook.json"  # what was done to the model, with a checksum of every file but those below
REPORT, CARD, PAGE = "report.json", "README.md", "report.html"  # made from the record; rewritten at any time
PACKED = "billhook_packed.json"  # the record of the packed format
UNFINISHED = "billhook.unfinished.json"  # the state of a run that can be resumed
GRADIENTS = "gradients.safetensors"  # gradients that such a run keeps, behind the rank of a process
WRITTEN = "written.safetensors"  # calibration text that the model wrote for such a run
PARTIAL = ".partial"  # suffix of a directory's name until the directory is complete


def is_packed(directory: Path) -> bool:
    """Whether a directory was written by `billhook pack`."""
    return (directory / PACKED).is_file()


def is_unfinished(directory: Path) -> bool:
    """Whether the run that writes a directory has not completed it.

    At the end of a run the record is among the last files to be written, then the directory gets its final name, and
    the state is deleted last: a state file in a directory that has both is only left over.
    """
    renamed = not directory.resolve().name.endswith(PARTIAL)
    return (directory / UNFINISHED).is_file() and not (renamed and (directory / RECORD).is_file())

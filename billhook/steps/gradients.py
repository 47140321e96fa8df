"""Write the gradients of the model that a request names to a file."""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from billhook.architectures.layers import Layer
from billhook.distributed.torchrun import rank
from billhook.engine.gradient_file import Gradients, open_gradients
from billhook.engine.gradients import compute_gradients
from billhook.engine.walk import Progress
from billhook.steps.inputs import ModelRequest
from billhook.steps.partial_output import PartialOutput
from billhook.steps.request import Opened, calibration_facts, open_request
from billhook.store.layout import GRADIENTS
from billhook.store.output import check_room


def open_for_gradients(request: ModelRequest, progress: Progress = lambda step: None) -> Opened:
    """Open model and calibration samples; raises BillhookError for an impossible request."""
    return open_request(request, True, "A gradient", streamed=True, progress=progress)


def gradient_bytes(layers: Sequence[Layer]) -> int:
    """The largest size of the values in a gradients file."""
    return 4 * sum(math.prod(layer.shape) for layer in layers)


def check_temporary_room(layers: Sequence[Layer], files: int = 1) -> None:
    """Raise JobError where the folder of temporary files has no room for so many gradients files."""
    check_room(Path(tempfile.gettempdir()) / GRADIENTS, files * gradient_bytes(layers))


def make_gradients(opened: Opened, statistic: str, path: Path, progress: Progress = lambda layer: None) -> Gradients:
    """Accumulate the gradients of an opened model on its samples and write them to `path`; see `compute_gradients`."""
    made = calibration_facts(opened)
    facts = {"model": opened.facts} | ({} if made is None else {"calibration": made})
    return compute_gradients(
        opened.model, opened.batches, statistic, path, loss=opened.task.loss, layers=opened.layers, facts=facts,
        resources=opened.resources, progress=progress,
    )  # fmt: skip


def stored_gradients(opened: Opened, statistic: str, partial: PartialOutput, progress: Progress) -> Gradients:
    """The gradients that are stored with an unfinished output, for use when it is resumed; new ones at its start."""
    if partial.has_file(GRADIENTS):
        return open_gradients(partial.folder / GRADIENTS)
    path = partial.folder / (f"{rank()}.{GRADIENTS}" if rank() else GRADIENTS)
    found = make_gradients(opened, statistic, path, progress)
    if not rank():
        partial.add_file(GRADIENTS)
    return found

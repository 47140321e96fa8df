"""Write the gradients of a model that a request names to a file."""

from pathlib import Path

from billhook.engine.gradient_file import Gradients
from billhook.engine.gradients import compute_gradients
from billhook.engine.walk import Progress
from billhook.steps.request import Opened, Request, calibration_facts, open_request


def open_for_gradients(request: Request, progress: Progress = lambda step: None) -> Opened:
    """Open model and calibration samples; raises BillhookError for what cannot be done as asked."""
    return open_request(request, True, "A gradient", streamed=True, progress=progress)


def make_gradients(opened: Opened, statistic: str, path: Path, progress: Progress = lambda layer: None) -> Gradients:
    """Accumulate the gradients of an opened model on its samples and write them to `path`; see `compute_gradients`."""
    return compute_gradients(
        opened.model,
        opened.batches,
        statistic,
        path,
        loss=opened.task.loss,
        layers=opened.layers,
        facts={"model": opened.facts, "calibration": calibration_facts(opened)},
        resources=opened.resources,
        progress=progress,
    )

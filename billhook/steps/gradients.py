"""Write the gradients of a model that a request names to a file."""

from collections.abc import Callable
from pathlib import Path

from billhook.engine.gradient_file import Gradients
from billhook.engine.gradients import compute_gradients
from billhook.steps.request import Opened, Request, calibration_facts, open_request


def make_gradients(
    request: Request,
    statistic: str,
    path: Path,
    progress: Callable[[str], None] = lambda layer: None,
    begin: Callable[[Opened], None] = lambda opened: None,
) -> Gradients:
    """Accumulate the gradients of a request's model on its calibration samples and write them to `path`.

    See `compute_gradients`. `begin` is called with what was opened before the work starts.
    """
    opened = open_request(request, True, "A gradient", streamed=True, progress=progress)
    begin(opened)
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

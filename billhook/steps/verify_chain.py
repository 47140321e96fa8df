"""Check that the steps in a billhook.json follow from each other."""

from collections.abc import Iterator
from itertools import pairwise

from billhook.store.layout import RECORD
from billhook.store.record import Record, Step, weights_digest


def check_chain(record: Record) -> Iterator[str]:
    """Whether the input of each step is the output of the step before, and the files are the output of the last step.

    Unknown digests (null) are not compared.
    """
    names = [step_name(number, step) for number, step in enumerate(record.steps)]
    for (before, step), (first, second) in zip(pairwise(record.steps), pairwise(names), strict=True):
        if None not in (before.result, step.model.get("digest")) and before.result != step.model["digest"]:
            yield f"{second} did not start from the weights that {first} wrote: the model was changed in between."
    if record.steps[-1].result not in (None, weights_digest(record.files)):
        yield f"The files in {RECORD} are not those that {names[-1]} wrote."


def check_recovered(record: Record) -> Iterator[str]:
    """Whether every layer has at least the zeros that it had before the last step, if that trained the model.

    The recorded zeros are compared with the files elsewhere.
    """
    step = record.steps[-1]
    for name, zeros in (step.made_by.get("zeros") or {}).items() if step.step == "recover" else ():
        if (now := record.layers.get(name, {}).get("zeros", 0)) < zeros:
            yield f"{name}: {zeros - now} weights that were zero before the training had values again."


def step_name(number: int, step: Step) -> str:
    """How messages name a step."""
    return f"step {number + 1} ({step.step})"

"""Adapters in a training run: where they are put, how they are merged, and the directory of an adapter."""

from pathlib import Path
from typing import Any

from billhook.recovery.adapters import add_adapters_, merge_
from billhook.recovery.lora import zeros_lost_by_an_ordinary_merge
from billhook.recovery.training import Recovered
from billhook.steps.recover_job import RANK, RecoverJob, RecoverReport, RecoverRequest, record
from billhook.steps.recover_setup import stored_in, trained_layers
from billhook.steps.recover_source import Source
from billhook.steps.request import Opened
from billhook.store.directory import checksums
from billhook.store.files import read_json, write_json
from billhook.store.layout import RECORD
from billhook.store.record import completed


def add_adapters(request: RecoverRequest, opened: Opened, source: Source) -> Any:
    """Put the adapters of a request on the model and return peft's model, or None where others are trained.

    Those beside quantized weights, which are never merged, are ordinary ones: a code of zero is no pruned weight.
    """
    if request.tune != "adapters":
        return None
    layers, masked = trained_layers(opened, request), not source.grids
    return add_adapters_(opened.model, layers, rank=request.rank or RANK, masked=masked, seed=request.seed)


def merged(job: RecoverJob, done: Recovered) -> tuple[Recovered, list[str]]:
    """Merge the adapters of a run, if it has any and does not save them; the result, and a note on what an ordinary
    merge would have done."""
    if job.adapted is None or job.request.save == "adapter":
        return done, []
    lost, zeros = zeros_lost_by_an_ordinary_merge(job.adapted), sum(job.zeros.values())
    done = merge_(job.adapted, job.opened.layers, done, job.setup.held_out, stored_in(job.opened))
    note = f"An ordinary merge of these adapters would have lost {lost:,} of {zeros:,} zeros."
    return done, [note] if done.after < done.before else []


def save_adapter(job: RecoverJob, report: RecoverReport, folder: Path) -> None:
    """Write the adapter as peft does, with billhook.json beside it, and without peft's empty model card."""
    job.adapted.peft_config["default"].base_model_name_or_path = job.opened.facts["name"]
    job.adapted.save_pretrained(folder, save_embedding_layers=False)  # otherwise it asks the hub for the base model
    (folder / "README.md").unlink()
    config = read_json(folder / "adapter_config.json", "adapter configuration")
    write_json(folder / "adapter_config.json", config | {"target_modules": sorted(config["target_modules"])})
    write_json(folder / RECORD, completed(record(job, report), {}, checksums(folder)))

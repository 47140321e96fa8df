"""What `quantize` and `compress` show instead of running (`--dry-run`)."""

from collections import Counter
from typing import TYPE_CHECKING

from billhook.cli.common import announce, emit, say, say_notes, table
from billhook.plan.storage import bits
from billhook.store.layout import LEVELS

if TYPE_CHECKING:
    from billhook.steps.quantize_job import QuantizeJob


def show_job(job: "QuantizeJob", as_json: bool, *, keeps: bool = True) -> None:
    """Print the types of the layers by kind, and what the job needs; `keeps` says whether measurements stay."""
    from billhook.steps.sample_quantize import estimate_quantize_time
    from billhook.steps.state import partial_folder
    from billhook.steps.types import plan_types
    from billhook.store.output import absolute

    needed, types, layers = estimate_quantize_time(job), plan_types(job.plan), job.opened.layers
    kept = partial_folder(absolute(job.request.output)) / LEVELS
    say_notes(job.notes)
    announce(needed, job.request.device)
    if as_json:
        listed = {x.name: {"shape": list(x.shape), "type": types[x.name]} for x in layers}
        outside = dict(job.outside)
        return emit({"layers": listed, "outside": outside, "bits": job.bits, "estimate": needed.to_json()})
    rows = []
    for kind in dict.fromkeys(layer.kind for layer in layers):
        found = Counter(types[layer.name] for layer in layers if layer.kind == kind)
        rows += [[kind, str(found[type]), type] for type in sorted(found, key=bits, reverse=True)]
    rows += [[name, "1", type] for name, type in job.outside.items()]
    table("What would be quantized", ["kind of layer", "layers", "type"], rows)
    measured = keeps and kept.is_file()
    left = f"Only what was measured was written, to {kept}: the run uses it." if measured else "Nothing was written."
    say(f"{len(layers)} layers at {job.bits:.2f} bits a weight. {left}")

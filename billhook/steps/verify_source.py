"""Compare the kept weights of a pruned directory with those of its source, byte by byte."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from billhook.errors import BillhookError
from billhook.store.record import Record
from billhook.store.shards import Shard, read_shard, weight_files


def changed_weights(shards: Sequence[Shard], record: Record, source: Path) -> Iterator[str]:
    """A sentence for each tensor whose nonzero values are not those of `source`, although no step updated them.

    `source` is the model from which any step of the record started. Norms and biases may have been tuned.
    """
    originals = [read_shard(file) for file in weight_files(source)]
    if not originals:
        raise BillhookError(f"{source} has no safetensors to compare with.")
    pieces = [(facts, piece) for facts in record.layers.values() for piece in facts.get("pieces", [facts])]
    updated = {piece.get("tensor") for facts, piece in pieces if facts.get("updated", True)}
    steps = [step.made_by for step in record.steps]
    tuned = any(made.get("refine") == "blocks+norms" or made.get("tune") == "kept+norms" for made in steps)
    for shard in shards:
        for entry in shard.entries.values():
            original = next((other for other in originals if entry.name in other.entries), None)
            if original is None:
                yield f"{entry.name} is not in {source}."
                continue
            may_differ = entry.name in updated or (tuned and len(entry.shape) == 1)
            if not may_differ and not shard.same_where_nonzero(entry, original, original.entries[entry.name]):
                yield f"{entry.name}: kept weights are not those of {source}, although no step updated them."

"""Check the units of a model that `billhook slim` made smaller against its record: how many parts stayed, and which."""

from collections.abc import Iterator

from billhook.store.record import Record


def check_units(record: Record) -> Iterator[str]:
    """Whether the plan of the last step that removed units, the parts it recorded, and the shapes of layers agree.

    The shapes themselves are compared with the files where zeros are counted.
    """
    step = next((step for step in reversed(record.steps) if step.step == "slim"), None)
    if step is None:
        return
    planned, kept = (step.plan or {}).get("units", {}), step.made_by.get("kept") or {}
    for unit, count in planned.items():
        if len(set(kept.get(unit, ()))) != count:
            yield f"{unit}: {len(set(kept.get(unit, ())))} parts are recorded, {count} planned."
    for name, facts in (step.made_by.get("consumers") or {}).items():
        shape = record.layers.get(name, {}).get("shape", (0, 0))
        columns = facts.get("stored", planned.get(facts.get("unit"), 0)) * facts.get("columns", 0)
        if shape[1] != columns:
            yield f"{name}: {shape[1]} columns, where {columns} are stored of {facts.get('unit')}."

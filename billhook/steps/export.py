"""Write a model directory in the format of another program."""

from collections.abc import Callable
from pathlib import Path

from billhook.architectures.sources import resolve
from billhook.errors import BillhookError
from billhook.export.gguf import TYPES, write_gguf
from billhook.export.gguf_writer import Written
from billhook.store.checkpoint import check_directory, model_digest
from billhook.store.files import sha256, write_json
from billhook.store.layout import RECORD, is_unfinished
from billhook.store.record import Step, append_step, history


def export_gguf(
    model: str | Path,
    output: str | Path,
    *,
    kind: str = "auto",
    template: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda tensor: None,
) -> Written:
    """Write a model directory (or hub name) as a GGUF file with weights of the type `kind`, one of `TYPES`.

    Where the model has a billhook.json, it is written beside the file, as NAME.billhook.json, with this step. Raises
    BillhookError for a model that has no form in GGUF files and for an output that exists, and JobError when writing
    fails; nothing is left behind then.
    """
    if kind not in TYPES:
        raise BillhookError(f"Unknown type {kind!r}: use {', '.join(TYPES)}.")
    output = Path(output).expanduser()
    if output.exists() and not overwrite:
        raise BillhookError(f"The output {output} exists: choose another, or allow replacing it (--overwrite).")
    source = resolve(model)
    if is_unfinished(source):
        raise BillhookError(f"{source} is not finished: resume it with the command that started it and --resume.")
    config = check_directory(source)
    before, digest = history(source), model_digest(source)
    facts = {"source.digest": digest} | ({} if before is None else {"steps": ", ".join(x.step for x in before.steps)})
    given = None if template is None else Path(template).expanduser()
    written = write_gguf(source, output, rest=kind, template=given, facts=facts, progress=progress)
    if before is not None:
        facts_of_model = {"name": source.name, "type": config.get("model_type"), "digest": digest}
        checksum = sha256(output)
        step = Step("export", None, {"type": kind, "types": written.types}, facts_of_model, written.notes, checksum)
        record = append_step(before, step, {}).to_json()
        write_json(output.with_suffix(f".{RECORD}"), {**record, "files": {output.name: checksum}})
    return written

"""billhook.json: what was done to a model, step by step, and the present state of its layers.

A record is read, a step is appended, and `completed` adds what is known only when the files are written. The same
inputs give the same bytes: a record contains no date, no duration and no local path.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from billhook import __version__
from billhook.errors import BillhookError
from billhook.store.files import digest_of, read_json
from billhook.store.layout import RECORD
from billhook.store.typed_json import typed

VERSION = 2
_LAYER = {"shape": tuple[int, int], "zeros": int, "notes": list[str] | None}
REFILLED = "weights that an earlier step had removed have values again"  # ends a note of a layer


@dataclass(frozen=True)
class Step:
    """One step of a model's history: an entry of `steps` in billhook.json. `made_by` is that of `prune`; `quantize` has
    `lost`, `seed` to `calibration`, `papers` and `versions` of it too.

    * `step`: what was done: `prune`, `quantize` (by `compress`, too), `slim`, `recover` or `export`.
    * `plan` (object or null): the plan that was applied, as in plan.json; null for a step without one.
    * `made_by.lost.*` (any, optional): what was lost against the model before this step, on held-out text, with the
      fields of [prune --json](json_output.md#billhook-prune); `made_by.lost` is null if it was not measured.
    * `made_by.better_recipe` (string or null, optional): the next recipe that loses less.
    * `made_by.recipe` (string or null, optional): the recipe that was followed unchanged; of `recover`, the published
      one that filled in what was not given.
    * `made_by.quantizer` (string, optional): name of the quantizer.
    * `made_by.quantizer_options.*` (any, optional): its options, defaults filled in.
    * `made_by.imatrix` (string or null, optional): SHA-256 of the importance matrix that was given instead of text.
    * `made_by.outside.*` (string, optional): storage types of embeddings and head, by the names of their tensors.
    * `made_by.method` (string, optional): name of the structured method of `slim`.
    * `made_by.method_options.*` (any, optional): its options, defaults filled in.
    * `made_by.experts` (string or null, optional): name of the method that chose experts.
    * `made_by.dropped` (list of integers, optional): the blocks that were dropped, numbered as before the step.
    * `made_by.removed` (number, optional): fraction of the parameters in blocks that `slim` removed.
    * `made_by.kept.*` (list of integers, optional): the parts that stayed, by unit, numbered as before the step.
    * `made_by.padding` (number, optional): fraction of the stored parameters in blocks that are zero only so that all
      blocks have one width.
    * `made_by.parts.*` (integer, optional): the parts that each unit had.
    * `made_by.consumers.*.*` (any, optional): `unit` and `columns` a part, of each layer that lost columns.
    * `made_by.criterion` (string, optional): name of the criterion.
    * `made_by.criterion_options.*` (any): its options, defaults filled in.
    * `made_by.group` (string, optional): which weights were compared with each other: `row` or `layer`.
    * `made_by.prefix` (string, optional): of which model the statistics are: with the blocks before as they are now,
      `pruned`, or as they were, `dense`.
    * `made_by.published` (boolean, optional): whether zeros were counted, windows drawn and gradients accumulated as
      published.
    * `made_by.refine` (string, optional): `none`, `blocks` or `blocks+norms`.
    * `made_by.seed` (integer): seed of every random choice.
    * `made_by.dtype` (string): the dtype of the computation; the files keep theirs.
    * `made_by.device` (string): the kind of device: `cpu` or `cuda`.
    * `made_by.targets` (list of strings, optional): as requested.
    * `made_by.ignore` (list of strings, optional): as requested.
    * `made_by.budget` (string or null, optional): whether `each` stack of blocks met the sparsity, or all shared it
      (`joint`); of `recover`, the time from which the number of tokens follows.
    * `made_by.stacks` (list of strings, optional): the stacks of blocks: all, language, vision or names.
    * `made_by.calibration.*` (any, optional): the text, as in table.json; `made_by.calibration` is null if none was
      needed.
    * `made_by.gradients.*` (any, optional): `statistic` and `calibration` of the gradients that the criterion read;
      null if none.
    * `made_by.papers.*` (string or null): sources of `criterion` and `allocator`.
    * `made_by.versions.*` (string): python, torch and transformers.
    * `made_by.by` (string, optional): `block` where `recover` tuned one block at a time.
    * `made_by.epochs` (integer, optional): the most passes over the text in tuning a block.
    * `made_by.objective` (string, optional): name of the objective of `recover`.
    * `made_by.objective_options.*` (any, optional): its options, defaults filled in.
    * `made_by.tune` (string, optional): what was trained.
    * `made_by.rank` (integer or null, optional): the rank of adapters.
    * `made_by.tokens` (integer, optional): tokens of text (or positions of images) that were trained on.
    * `made_by.rate` (number, optional): the rate; a share of each parameter's root mean square, or of 1 for adapters.
    * `made_by.races.*` (number or null, optional): held-out losses after short runs, by rate; null where not finite.
    * `made_by.steps` (integer, optional): steps of the optimizer.
    * `made_by.best_step` (integer, optional): the step whose weights were kept; 0 where nothing improved.
    * `made_by.held_out.*` (number, optional): the loss on which rate and step were chosen, `before` and `after`.
    * `made_by.zeros.*` (integer, optional): zeros of each layer before the training.
    * `made_by.teacher.*` (string or null, optional): `name` and `digest` of the dense model.
    * `made_by.lost_before.*` (any, optional): what the input had lost, as `made_by.lost`.
    * `made_by.search.*` (any, optional): if a search chose the plan, the `objective` and the `heldout` windows.
    * `model.*` (string or null): `name`, `type` and `digest` of the step's input, as in table.json.
    * `warnings`: all notes of the layers, each with its layer's name, and what concerns the whole model.
    * `result`: digest of the step's output, which the next step has as `model.digest`; null until it is written.
    """

    step: str
    plan: dict[str, Any] | None
    made_by: dict[str, Any]
    model: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    result: str | None = None


@dataclass(frozen=True)
class Record:
    """The content of billhook.json. Version 1, the record of a single pruning run, is read too.

    * `version` (integer): 2.
    * `billhook`: version of the program that wrote the record.
    * `steps`: all that was done to the model, first to last (see `Step`).
    * `layers.*.shape` (two integers): [out, in].
    * `layers.*.sparsity` (number, optional): the target of the last plan for the layer.
    * `layers.*.zeros` (integer): zeros, counted in the files.
    * `layers.*.error` (number or null): squared change of the layer's output relative to its square, for uncorrelated
      inputs; null if it is not a number.
    * `layers.*.updated` (boolean, optional): whether kept weights were given new values; otherwise they have the bytes
      of the source.
    * `layers.*.type` (string, optional): the storage type of a quantized layer.
    * `layers.*.notes` (list of strings): what was done differently, and why.
    * `layers.*.tensor` (string or null, optional): the tensor on disk, see `billhook.store.locate`.
    * `layers.*.index` (integer or null, optional): index into a 3-D tensor, for an expert; null for a matrix.
    * `layers.*.transposed` (boolean, optional): whether the tensor is stored [in, out]. A convolution is stored as
      [out, channels, *kernel].
    * `layers.*.pieces[].*` (any, optional): for a layer in several tensors, `tensor`, `index`, `transposed` and `rows`
      [from, to) of each, null for all.
    * `files.*` (string): SHA-256 of every file by path, except billhook.json and the report's three.
    """

    billhook: str
    steps: list[Step]
    layers: dict[str, dict[str, Any]]
    files: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of billhook.json."""
        return {"version": VERSION, **asdict(self)}


def append_step(before: Record | None, step: Step, layers: Mapping[str, Mapping[str, Any]]) -> Record:
    """The record after one more step, which changed the state of `layers`; it has no checksums yet."""
    steps, known = ([], {}) if before is None else (before.steps, before.layers)
    changed = {name: dict(facts) for name, facts in layers.items()}
    return Record(__version__, [*steps, step], {**known, **changed})


def completed(
    record: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]], files: Mapping[str, str]
) -> dict[str, Any]:
    """The json of a record whose model is written: with `layers` (and their places on disk), the checksums `files`, and
    the digest of the last step's result."""
    steps = [dict(step) for step in record.get("steps", ())]
    if steps:
        steps[-1]["result"] = weights_digest(files)
    return {**record, **({"steps": steps} if steps else {}), "layers": dict(layers), "files": dict(files)}


def weights_digest(files: Mapping[str, str]) -> str:
    """The digest of a model, as by `billhook.store.checkpoint.model_digest`, from the checksums of its files."""
    own = {name for name in files if name == "config.json" or (name.endswith(".safetensors") and "/" not in name)}
    return digest_of({name: files[name] for name in own})


def last_made(record: Record) -> str:
    """The last step but recovery, which keeps the form of what it trains; empty for a record without another."""
    return next((step.step for step in reversed(record.steps) if step.step != "recover"), "")


def located(layer: Mapping[str, Any]) -> bool:
    """Whether a layer's place on disk is known."""
    return "pieces" in layer or layer.get("tensor") is not None


def history(folder: Path) -> Record | None:
    """The record of a model directory, or None."""
    return read_record(folder / RECORD) if (folder / RECORD).is_file() else None


def read_record(path: Path) -> Record:
    """Read billhook.json; raises BillhookError where it is missing or not as documented."""
    value = read_json(path, "record of a pruned model")
    version = value.get("version")
    if type(version) is not int or version not in (1, VERSION):
        raise BillhookError(f"{path} is not a record of version 1 or {VERSION} (found {version!r:.40}).")
    for key in ("plan" if version == 1 else "steps", "layers", "files"):
        if not isinstance(value.get(key), list if key == "steps" else dict) or not value[key]:
            raise BillhookError(f"{path} has no {key!r}: it is not a record of a pruned model.")
    for name, facts in value["layers"].items():
        typed(_LAYER, facts, f"{path}, {name}")
        facts["notes"] = facts.get("notes") or []
        if min(facts["shape"]) < 1:
            raise BillhookError(f"{path}, {name}, shape: must be positive numbers, found {facts['shape']}.")
    _check_files(path, value["files"])
    entries = value["steps"] if version == VERSION else [_step_of_version_1(value)]
    steps = [typed(Step, entry, f"{path}, step {number}") for number, entry in enumerate(entries, start=1)]
    return Record(str(value.get("billhook")), steps, value["layers"], value["files"])


def _check_files(path: Path, files: Mapping[str, Any]) -> None:
    for name, digest in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BillhookError(f"{path} lists the file {name!r}, which is outside the directory.")
        if not isinstance(digest, str):
            raise BillhookError(f"{path}: the checksum of {name!r} must be a string.")


def _step_of_version_1(value: Mapping[str, Any]) -> dict[str, Any]:
    """The step of a record of version 1, which had the model in `made_by` and no result."""
    made_by = value.get("made_by")
    made_by = dict(made_by) if isinstance(made_by, dict) else {}
    known = {"plan": value["plan"], "model": made_by.pop("model", {}), "warnings": value.get("warnings", [])}
    return {"step": "prune", **known, "made_by": made_by, "result": weights_digest(value["files"])}

"""The plan: the spec of each weight, for one budget, in a file that people can read, edit and compare."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from billhook.errors import BillhookError, ignoring
from billhook.plan.budget import whole_numbers
from billhook.plan.spec import Pattern, Spec
from billhook.plan.storage import stored_bytes
from billhook.registry import hint
from billhook.store.files import read_json, write_json
from billhook.store.typed_json import typed

VERSION = 2
_MADE_BY = {"allocator": str | None, "options": dict[str, Any] | None, "paper": str | None}  # what reports show
_MADE_BY |= {"metrics": dict[str, dict[str, float]] | None, "spectra": dict[str, list[float]] | None}
Shapes = Mapping[str, tuple[int, int]]
Kind = Literal["sparsity", "bytes", "parameters"]


def check_target(sparsity: Any) -> float:
    """Return a global sparsity, or raise BillhookError unless it is a number in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        found = f"got {sparsity!r:.40}. Use 0.5 for half"
        raise BillhookError(f"Sparsity must be a number in [0, 1), the fraction removed; {found}.")
    return float(sparsity)


@dataclass(frozen=True)
class Budget:
    """The target of a plan, `{kind: value}` in JSON.

    * `sparsity`: the parameter-weighted mean of the sparsities, in [0, 1);
    * `bytes`: bytes of all weights as stored, a positive integer;
    * `parameters`: parameters that remain, a positive integer.
    """

    kind: Kind
    value: float

    def __post_init__(self) -> None:
        if self.kind == "sparsity":
            check_target(self.value)
        elif self.kind not in get_args(Kind):
            raise BillhookError(f"Unknown budget {self.kind!r:.40}: use one of {', '.join(get_args(Kind))}.")
        elif type(self.value) is not int or self.value < 1:
            raise BillhookError(f"A budget in {self.kind} must be a positive integer, got {self.value!r:.40}.")

    @classmethod
    def parse(cls, value: Any) -> "Budget":
        """Read the json form; raises BillhookError for anything else."""
        if not isinstance(value, dict) or len(value) != 1:
            raise BillhookError(f"'budget' must be an object with one of {', '.join(get_args(Kind))}.")
        ((kind, amount),) = value.items()
        return cls(kind, check_target(amount) if kind == "sparsity" else amount)


@dataclass(frozen=True)
class Plan:
    """What becomes of each weight. The fields are those of plan.json.

    * `version` (integer): 2.
    * `budget.*` (number): what the plan was made for: `sparsity` in [0, 1), `bytes`, or `parameters` (see `Budget`).
      The weights decide what is done; whoever edits them should edit the budget too.
    * `weights.*` (number or string): every layer that the plan is for and no other: a sparsity such as 0.5, an N:M
      pattern such as "2:4" (keep 2 of every 4), or a storage type such as "q4_k" (see `Spec`).
    * `units.*` (integer, optional): how many parts of a unit are kept, such as `{"layers.3.mlp:channels": 256}`.
    * `made_by.allocator` (string): name of the allocator; `made_by` may be empty.
    * `made_by.options.*` (any): its options, defaults filled in.
    * `made_by.paper` (string): where the allocator comes from.
    * `made_by.model.*` (any): the `model` of the table it was made from.
    * `made_by.metrics.*.*` (number): what the allocator read: column, layer, value.
    * `made_by.spectra.*` (list of numbers, optional): if it read spectra, those of up to three layers
      (`spectrum_quantiles` of the table).
    * `made_by.outside.*` (string, optional): the storage types of embeddings and head, by their names on disk.
    * `made_by.levels.*.weight` (number, optional): what was measured for the choice of storage types: the KL divergence
      that an error of 1 in the tensor costs.
    * `made_by.levels.*.types.*.bytes` (integer, optional): the tensor's bytes as a type.
    * `made_by.levels.*.types.*.error` (number, optional): its error as that type; times `weight` the predicted loss.
    * `made_by.tied` (list of lists of strings, optional): layers that had to get the same type.
    * `made_by.request.*` (any, optional): the target, bytes, types, allocator and options that `compress` was given,
      the SHA-256 of the `file` whose types were taken, if they were, and the text on which another run measured the
      `levels`, if one did.
    * `made_by.loss_by_size.*` (number, optional): the predicted loss of a file with a tenth less and a tenth more
      bytes, by that factor, relative to that of this size.
    * `made_by.units.*` (any, optional): of `compress --units`, the `share` of the parameters in blocks that went, and
      by share the divergences `predicted` and `measured`.
    * `made_by.racing.*` (any, optional): if a race chose the plan, the `objective`, the `best` candidate, the mean loss
      of those `tried`, those `dropped`, and the `heldout` windows; or the `reason` why there was none.

    A layer of n weights and sparsity s loses a whole number of weights that is less than 1 away from s n, and the total
    is the budget rounded once (see `zeros`). Version 1 of plan.json, with `target`, `pattern` and `sparsity`, is read
    too.
    """

    budget: Budget
    weights: dict[str, Spec]
    units: dict[str, int] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_sparsities(
        cls, target: float, pattern: Pattern, sparsity: Mapping[str, float], made_by: Mapping[str, Any] | None = None
    ) -> "Plan":
        """A plan of sparsities alone, whose parameter-weighted mean is `target`; under N:M each layer gets its own N.

        Raises BillhookError for a sparsity outside [0, 1], or one that is not a multiple of 1/M under N:M.
        """
        weights = {}
        for name, s in sparsity.items():
            if not 0 <= s <= 1:
                raise BillhookError(f"The plan has sparsity {s} in {name}: it must be in [0, 1].")
            try:
                weights[name] = Spec.of_sparsity(s, pattern)
            except BillhookError as error:
                raise BillhookError(f"{name}: {error}") from None
        return cls(Budget("sparsity", target), weights, made_by=dict(made_by or {}))

    @property
    def target(self) -> float:
        """The requested sparsity; raises BillhookError for another kind of budget."""
        if self.budget.kind != "sparsity":
            raise BillhookError(f"This plan has a budget in {self.budget.kind}, not a sparsity.")
        return self.budget.value

    @cached_property
    def pattern(self) -> Pattern:
        """The pattern that the layers have on average; unstructured where they do not all have the same M."""
        of = {spec.pattern.of for spec in self.weights.values() if 0 < spec.sparsity < 1}
        if self.budget.kind != "sparsity" or len(of) != 1 or None in of:
            return Pattern()
        (m,) = of
        assert m is not None
        return Pattern(min(m - 1, max(1, round(m * (1 - self.target)))), m)

    @cached_property
    def sparsity(self) -> dict[str, float]:
        """Layer name -> fraction removed; 0 for a layer with a storage type."""
        return {name: spec.sparsity for name, spec in self.weights.items()}

    def check(self, shapes: Shapes) -> None:
        """Raise BillhookError unless the plan names exactly the layers of `shapes` and each Spec fits its layer."""
        missing = [name for name in shapes if name not in self.weights]
        extra = [name for name in self.weights if name not in shapes]
        if missing or extra:
            first = [*missing, *extra][0]
            raise BillhookError(
                f"The plan is not for this model: {len(missing)} of its layers are not in the plan and {len(extra)} of "
                f"the plan's are not in the model (first: {first}).{hint(first, extra if missing else shapes)}"
            )
        if uneven := [name for name, spec in self.weights.items() if shapes[name][1] % spec.block]:
            name, spec, columns = uneven[0], self.weights[uneven[0]], shapes[uneven[0]][1]
            what = f"Pattern {spec.pattern}" if spec.type is None else f"Type {spec.type}"
            raise BillhookError(
                f"{what} is impossible for {name}: its {columns} columns do not divide by {spec.block}. Leave out what "
                f"does not divide ({ignoring(uneven)}), or use another {what.split()[0].lower()}."
            )

    def check_sparsities(self, user: str = "billhook prune") -> None:
        """Raise BillhookError unless the plan has only sparsities, which the command `user` applies."""
        types = list(dict.fromkeys(spec.type for spec in self.weights.values() if spec.type))
        if types:
            what = f"stores layers as {', '.join(types[:3])}{' ...' if len(types) > 3 else ''}"
        elif self.units:
            what = f"keeps parts of units ({next(iter(self.units))}{' ...' if len(self.units) > 1 else ''})"
        elif self.budget.kind != "sparsity":
            what = f"has a budget in {self.budget.kind}"
        else:
            return
        raise BillhookError(f"This plan {what}: {user} applies sparsities.")

    def zeros(self, shapes: Shapes) -> dict[str, int]:
        """Whole numbers of zeros per layer whose sum is the budget rounded once (largest remainder)."""
        sizes = {name: shapes[name][0] * shapes[name][1] for name in self.weights}
        counts = whole_numbers([s * sizes[name] for name, s in self.sparsity.items()], list(sizes.values()))
        return dict(zip(self.weights, counts, strict=True))

    def bytes(self, shapes: Shapes) -> int:
        """Bytes of all weights as stored; raises BillhookError for a layer without a storage type, or as `check`."""
        self.check(shapes)
        total = 0
        for name, spec in self.weights.items():
            if spec.type is None:
                raise BillhookError(f"{name} has a sparsity and no storage type, so its bytes are not known.")
            total += stored_bytes(spec.type, shapes[name])
        return total

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "version": VERSION,
            "budget": {self.budget.kind: self.budget.value},
            "weights": {name: spec.to_json() for name, spec in self.weights.items()},
            **({"units": self.units} if self.units else {}),
            "made_by": self.made_by,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> "Plan":
        """Read the content of plan.json, version 1 or 2; raises BillhookError naming what is not as documented."""
        version = value.get("version")
        if type(version) is not int or version not in (1, VERSION):
            raise BillhookError(f"{where} is not a plan of version 1 or {VERSION} (found {version!r:.40}).")
        try:
            return _version_1(value) if version == 1 else _version_2(value)
        except BillhookError as error:
            raise BillhookError(f"{where}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write plan.json atomically."""
        write_json(Path(path), self.to_json())


def load_plan(path: str | Path) -> Plan:
    """Read plan.json."""
    return Plan.from_json(read_json(Path(path), "plan"), str(path))


def _version_2(value: Mapping[str, Any]) -> Plan:
    weights, units = value.get("weights", {}), value.get("units", {})
    if not isinstance(weights, dict) or not isinstance(units, dict) or not (weights or units):
        raise BillhookError("'weights' must be an object of layer names and specs, 'units' one of counts.")
    specs = {}
    for name, spec in weights.items():
        try:
            specs[name] = Spec.parse(spec)
        except BillhookError as error:
            raise BillhookError(f"{name}: {error}") from None
    for name, kept in units.items():
        if type(kept) is not int or kept < 0:
            raise BillhookError(f"unit {name}: the number of kept parts must be a whole number, got {kept!r:.40}.")
    return Plan(Budget.parse(value.get("budget")), specs, units, _made_by(value))


def _version_1(value: Mapping[str, Any]) -> Plan:
    sparsity = value.get("sparsity")
    if not isinstance(sparsity, dict) or not sparsity:
        raise BillhookError("'sparsity' must be an object of layer names and fractions.")
    for name, s in sparsity.items():
        if isinstance(s, bool) or not isinstance(s, int | float) or not 0 <= s <= 1:
            raise BillhookError(f"the sparsity of {name} must be a number in [0, 1], got {s!r:.40}.")
    target, pattern = check_target(value.get("target")), Pattern.parse(str(value.get("pattern")))
    return Plan.of_sparsities(target, pattern, {name: float(s) for name, s in sparsity.items()}, _made_by(value))


def _made_by(value: Mapping[str, Any]) -> dict[str, Any]:
    made_by: dict[str, Any] = typed(_MADE_BY, value.get("made_by") or {}, "made_by")
    return dict(made_by)

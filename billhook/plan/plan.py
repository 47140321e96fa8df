"""The sparsity plan: how much each layer loses, and in which pattern. A person can read, edit and diff it.

File format: docs/formats.md, `plan.json`. Everything that can be wrong with a plan is found by `check`, before any
weight changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from billhook.errors import BillhookError
from billhook.plan.budget import whole_numbers
from billhook.registry import hint
from billhook.store.files import read_json, write_json

VERSION = 1
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Pattern:
    """Unstructured (`keep` and `of` are None), or keep `keep` of every `of` consecutive weights along the input
    dimension."""

    keep: int | None = None
    of: int | None = None

    @property
    def structured(self) -> bool:
        """Whether this is an N:M pattern."""
        return self.of is not None

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}" if self.structured else "unstructured"

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read "unstructured" or "N:M" (keep N of every M, 0 < N < M)."""
        if text == "unstructured":
            return cls()
        keep, colon, of = text.partition(":")
        whole = colon and len(text) < 10 and text.isascii() and keep.isdigit() and of.isdigit()
        if whole and 0 < int(keep) < int(of) <= 1024:
            return cls(int(keep), int(of))
        raise BillhookError(
            f"Pattern {text!r:.40} is neither 'unstructured' nor N:M with 0 < N < M (keep N of every M, such as 2:4)."
        )

    def kept(self, sparsity: float) -> int:
        """How many of every `of` a layer of this sparsity keeps; raises BillhookError when that is not a whole
        number."""
        assert self.of is not None
        exact = self.of * (1 - sparsity)
        if abs(exact - round(exact)) > 1e-6:
            raise BillhookError(f"sparsity {sparsity} is not a multiple of 1/{self.of}, which pattern {self} needs")
        return round(exact)


def check_target(sparsity: Any) -> float:
    """Return a global sparsity, or raise BillhookError unless it is a number in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise BillhookError(
            f"Sparsity must be a number in [0, 1), the fraction removed; got {sparsity!r:.40}. Use 0.5 for half."
        )
    return float(sparsity)


@dataclass(frozen=True)
class SparsityPlan:
    """Layer name -> fraction removed; `target` is the parameter-weighted mean, `made_by` says which allocator with
    which options."""

    target: float
    pattern: Pattern
    sparsity: dict[str, float]
    made_by: dict[str, Any] = field(default_factory=dict)

    def check(self, shapes: Shapes) -> None:
        """Raise BillhookError unless the plan names exactly the layers of `shapes`, each with a possible sparsity."""
        missing = [name for name in shapes if name not in self.sparsity]
        extra = [name for name in self.sparsity if name not in shapes]
        if missing or extra:
            first = missing[0] if missing else extra[0]
            raise BillhookError(
                f"The plan is not for this model: {len(missing)} of its layers are not in the plan and "
                f"{len(extra)} of the plan's "
                f"are not in the model (first: {first}).{hint(first, extra if missing else shapes)} Make one "
                "with billhook plan."
            )
        for name, s in self.sparsity.items():
            if not 0 <= s <= 1:
                raise BillhookError(f"The plan asks for sparsity {s} in {name}: it must be in [0, 1].")
            if self.pattern.structured:
                self._check_groups(name, s, shapes[name][1])

    def _check_groups(self, name: str, s: float, columns: int) -> None:
        assert self.pattern.of is not None
        if columns % self.pattern.of:
            raise BillhookError(
                f"Pattern {self.pattern} is impossible for {name}: its {columns} columns do not divide by "
                f"{self.pattern.of}. "
                f"Leave it out with --ignore {name}, or use another pattern."
            )
        try:
            self.pattern.kept(s)
        except BillhookError as error:
            raise BillhookError(f"{name}: {error}.") from None

    def zeros(self, shapes: Shapes) -> dict[str, int]:
        """Whole numbers of zeros per layer whose sum is the budget rounded once (largest remainder)."""
        sizes = {name: shapes[name][0] * shapes[name][1] for name in self.sparsity}
        counts = whole_numbers([s * sizes[name] for name, s in self.sparsity.items()], list(sizes.values()))
        return dict(zip(self.sparsity, counts, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json."""
        return {
            "version": VERSION,
            "target": self.target,
            "pattern": str(self.pattern),
            "sparsity": self.sparsity,
            "made_by": self.made_by,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> "SparsityPlan":
        """Read the content of plan.json; raises BillhookError naming what is not as documented."""
        if value.get("version") != VERSION:
            raise BillhookError(f"{where} is not a plan of version {VERSION} (found {value.get('version')!r:.40}).")
        sparsity = value.get("sparsity")
        if not isinstance(sparsity, dict) or not sparsity:
            raise BillhookError(f"{where}: 'sparsity' must be an object of layer names and fractions.")
        for name, s in sparsity.items():
            if isinstance(s, bool) or not isinstance(s, int | float) or not 0 <= s <= 1:
                raise BillhookError(f"{where}: the sparsity of {name} must be a number in [0, 1], got {s!r:.40}.")
        try:
            pattern, target = Pattern.parse(str(value.get("pattern"))), check_target(value.get("target"))
        except BillhookError as error:
            raise BillhookError(f"{where}: {error}") from None
        made_by = value.get("made_by")
        return cls(
            target,
            pattern,
            {k: float(s) for k, s in sparsity.items()},
            dict(made_by) if isinstance(made_by, dict) else {},
        )

    def save(self, path: str | Path) -> None:
        """Write plan.json atomically."""
        write_json(Path(path), self.to_json())


def load_plan(path: str | Path) -> SparsityPlan:
    """Read plan.json."""
    return SparsityPlan.from_json(read_json(Path(path), "plan"), str(path))

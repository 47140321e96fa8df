"""The spec of one weight: a sparsity with a pattern, or a storage type. No torch."""

from dataclasses import dataclass
from typing import Any

from billhook.errors import BillhookError
from billhook.plan import storage


@dataclass(frozen=True)
class Pattern:
    """Unstructured (`keep` and `of` are None), or N:M: keep `keep` of every `of` consecutive weights of a row."""

    keep: int | None = None
    of: int | None = None

    @property
    def structured(self) -> bool:
        """Whether this is an N:M pattern."""
        return self.of is not None

    @property
    def sparsity(self) -> float:
        """(M - N) / M of N:M, 0 if unstructured."""
        return 0.0 if self.keep is None or self.of is None else (self.of - self.keep) / self.of

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
        raise BillhookError(f"Pattern {text!r:.40} is neither 'unstructured' nor N:M with 0 < N < M (such as 2:4).")

    def kept(self, sparsity: float) -> int:
        """How many of every `of` a layer of this sparsity keeps; raises BillhookError for a fraction."""
        assert self.of is not None
        exact = self.of * (1 - sparsity)
        if abs(exact - round(exact)) > 1e-6:
            raise BillhookError(f"sparsity {sparsity} is not a multiple of 1/{self.of}, which pattern {self} needs.")
        return round(exact)


@dataclass(frozen=True)
class Spec:
    """The treatment of one weight: `sparsity`, the fraction removed, with a `pattern`, or a storage `type`.

    In JSON, and in `parse`, a Spec is one value:

    * a number in [0, 1]: an unstructured sparsity;
    * a string "N:M" with 0 < N < M: keep N of every M consecutive weights of a row; the sparsity is (M - N) / M;
    * any other string: the name of a storage type, such as "bf16", "int4/64", "q4_k" (see `billhook.plan.storage`).

    Raises BillhookError for anything else.
    """

    sparsity: float = 0.0
    pattern: Pattern = Pattern()
    type: str | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.sparsity, int | float) and not isinstance(self.sparsity, bool)
        if not number or not 0 <= self.sparsity <= 1:
            raise BillhookError(f"A sparsity must be a number in [0, 1], got {self.sparsity!r:.40}.")
        if self.pattern.structured and self.sparsity != self.pattern.sparsity:
            raise BillhookError(f"Pattern {self.pattern} removes {self.pattern.sparsity:g}, not {self.sparsity:g}.")
        if self.type is not None:
            storage.bits(self.type)
            if self.sparsity or self.pattern.structured:
                raise BillhookError(f"A weight has a sparsity or a storage type ({self.type}), not both.")

    @property
    def bits(self) -> float | None:
        """Average stored bits per weight of the type, everything counted; None for a sparsity."""
        return None if self.type is None else storage.bits(self.type)

    @property
    def keep_of(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern, otherwise None."""
        keep, of = self.pattern.keep, self.pattern.of
        return None if keep is None or of is None else (keep, of)

    @property
    def block(self) -> int:
        """The number of which a layer's columns must be a multiple: M of N:M, or the block of the type."""
        return self.pattern.of or (1 if self.type is None else storage.block(self.type))

    @classmethod
    def of_sparsity(cls, sparsity: float, pattern: Pattern) -> "Spec":
        """The spec of a layer in a plan whose mean pattern is `pattern`: 0.75 under 2:4 is 1:4.

        Raises BillhookError unless the sparsity is in [0, 1] and, under N:M, a multiple of 1/M.
        """
        if pattern.of is None or not 0 <= sparsity <= 1:
            return cls(float(sparsity))
        kept = pattern.kept(sparsity)
        return cls.parse(f"{kept}:{pattern.of}") if 0 < kept < pattern.of else cls(float(kept == 0))

    @classmethod
    def parse(cls, value: Any) -> "Spec":
        """Read the json form of a Spec (see above)."""
        if isinstance(value, str) and ":" in value:
            pattern = Pattern.parse(value)
            return cls(pattern.sparsity, pattern)
        if isinstance(value, str):
            return cls(type=value)
        return cls(float(cls(value).sparsity))

    def to_json(self) -> float | str:
        """The json form of a Spec, which `parse` reads."""
        return self.type or (str(self.pattern) if self.pattern.structured else self.sparsity)

"""Statistics of the inputs and gradients of one layer on the calibration text, accumulated sequence by sequence.

For inputs X [tokens, in]: `input_norm` [in] is ||X_j||_2 / sqrt(sequences), the square root of the mean over sequences
of the summed squares of each input feature (for an expert over all sequences, whether they reach it or not);
`input_mean` [in] is the mean over all tokens; `gram` [in, in] is X^T X; `drift` [in, in] is (X' - X)^T X, X' being the
inputs of the same tokens in the dense model (see `billhook.engine.dense_stream`).

Inputs are converted to float32 before they are squared, so that half-precision activations do not overflow.
`input_norm` is a running mean in float32, one sequence at a time, as in Wanda's published code: near ties are then
ranked in the same way, bit for bit, for any batch size. The Gram matrix is the float32 sum of one float32 product per
batch. Its relative error is about 1e-7 times the square root of the number of batches, far below SparseGPT's damping of
1e-2; a float64 sum would double the largest allocation of a run (1.6 GB instead of 0.8 GB for 14336 inputs).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from billhook.distributed.collectives import all_reduce_, world
from billhook.errors import BillhookError, JobError
from billhook.registry import hint


@dataclass(frozen=True)
class LayerStats:
    """The statistics of one layer that a criterion reads; those that were not collected are None.

    `tokens` and `sequences` count the calibration text that reached the layer. `gradient` [out, in] is the statistic of
    `GRADIENTS` that the criterion named. `drift` is None where the inputs are the dense model's own. `stream_drift`
    [out, in] exists only for layers that write into the residual stream; without `drift` it includes what the drift of
    the inputs does. With it `gram` and both drifts weigh tokens (`billhook.engine.dense_stream`). `notes` are for the
    report: damping that was raised, inputs that are always zero.
    """

    tokens: int
    sequences: int
    input_norm: Tensor | None = None
    gram: Tensor | None = None
    input_mean: Tensor | None = None
    drift: Tensor | None = None
    stream_drift: Tensor | None = None
    gradient: Tensor | None = None
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Add a note for the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def note_zero_inputs(self, zero: Tensor) -> None:
        """Note how many inputs are always zero, `zero` bool [in], if any."""
        if count := int(zero.sum()):
            self.note(
                f"{count} of {len(zero)} inputs are zero on all calibration text; their weights are removed first"
            )


class _Sum:
    """An accumulator in float32, [in] or [in, in]."""

    _square = False

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self._sum = torch.zeros((in_features, in_features) if self._square else in_features, device=device)

    def add(self, x: Tensor, dense: Tensor) -> None:
        """Add float32 inputs [sequences, tokens, in]; `dense` are those of these tokens in the dense model."""
        raise NotImplementedError

    def merge(self) -> None:
        """Sum over all processes of the run."""
        all_reduce_(self._sum)

    def value(self) -> Tensor:
        """The statistic of everything added so far; it may be the accumulator itself."""
        return self._sum


class _InputNorm(_Sum):
    """||X_j||_2 / sqrt(sequences) of each input feature, float32 [in]; accumulates the mean of the squares."""

    _sequences = 0

    def add(self, x: Tensor, dense: Tensor) -> None:
        for sequence in x:
            self._sum *= self._sequences / (self._sequences + 1)
            self._sequences += 1
            self._sum += sequence.norm(dim=0).square() / self._sequences

    def merge(self) -> None:
        if world() > 1:
            sequences = int(all_reduce_(torch.tensor(self._sequences)))
            self._sum = all_reduce_(self._sum * self._sequences) / max(sequences, 1)
            self._sequences = sequences

    def value(self) -> Tensor:
        return self._sum.sqrt()


class _InputMean(_Sum):
    """Mean over tokens of each input feature, float32 [in]."""

    _tokens = 0

    def add(self, x: Tensor, dense: Tensor) -> None:
        for sequence in x:
            self._sum += sequence.sum(0)
            self._tokens += len(sequence)

    def merge(self) -> None:
        super().merge()
        self._tokens = int(all_reduce_(torch.tensor(self._tokens)))

    def value(self) -> Tensor:
        return self._sum / max(self._tokens, 1)


class _Gram(_Sum):
    """X^T X, float32 [in, in]; only its upper triangle is accumulated."""

    _square = True

    def _panels(self) -> Iterator[tuple[slice, slice]]:
        """Rows in quarters, each with the columns from its own first one on: 10 of 16 parts of the matrix."""
        n = len(self._sum)
        step = max(n // 4, 64)
        for start in range(0, n, step):
            yield slice(start, min(start + step, n)), slice(start, n)

    def add(self, x: Tensor, dense: Tensor) -> None:
        x = x.flatten(0, 1)
        for rows, columns in self._panels():
            self._sum[rows, columns].addmm_(x[:, rows].T, x[:, columns])

    def value(self) -> Tensor:
        for rows, columns in self._panels():
            self._sum[columns, rows] = self._sum[rows, columns].T.clone()
        return self._sum


class _Drift(_Sum):
    """(X' - X)^T X, float32 [in, in], for inputs X and those of the same tokens in the dense model, X'."""

    _square = True

    def add(self, x: Tensor, dense: Tensor) -> None:
        self._sum.addmm_((dense - x).flatten(0, 1).T, x.flatten(0, 1))


STATISTICS: dict[str, type[_InputNorm] | type[_InputMean] | type[_Gram] | type[_Drift]] = {
    "input_norm": _InputNorm,
    "input_mean": _InputMean,
    "gram": _Gram,
    "drift": _Drift,
}


class Collector:
    """Feeds the inputs of one layer to the accumulators of the statistics in `names`.

    If `gram` is among them, `input_norm` is read from its diagonal. Raises BillhookError for an unknown name.
    """

    def __init__(self, names: tuple[str, ...], in_features: int, device: torch.device | str = "cpu") -> None:
        for name in names:
            if name not in STATISTICS:
                known = f"{hint(name, STATISTICS)} There are: {', '.join(STATISTICS)}."
                raise BillhookError(f"Unknown statistic {name!r}.{known}")
        self.names, self.in_features = names, in_features
        self.tokens = self.sequences = 0
        self._flat = False  # experts see the tokens of a batch without knowing which sequence each belongs to
        derived = {"input_norm"} if "gram" in names else set()
        self._accumulators = {name: STATISTICS[name](in_features, device) for name in names if name not in derived}

    @torch.no_grad()
    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Add inputs [sequences, tokens, in], or [tokens, in] of a whole batch, of any float dtype.

        `dense` are the inputs of the same tokens in the dense model, the same inputs by default.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"inputs {tuple(x.shape)} for a layer with {self.in_features} input features")
        self._flat = self._flat or x.dim() == 2
        x, other = ((v[None] if v.dim() == 2 else v.flatten(1, -2)).float() for v in (x, x if dense is None else dense))
        if x.numel():
            self.sequences += len(x)
            self.tokens += x.shape[0] * x.shape[1]
            for accumulator in self._accumulators.values():
                accumulator.add(x, other)

    def merge(self) -> None:
        """Sum over all processes of the run; every process calls this once, at the end."""
        counts = all_reduce_(torch.tensor([self.tokens, self.sequences, int(self._flat)]))
        self.tokens, self.sequences, self._flat = (*counts[:2].tolist(), bool(counts[2]))
        for accumulator in self._accumulators.values():
            accumulator.merge()

    def stats(self, layer: str = "", rows: int | None = None) -> LayerStats:
        """The statistics so far; raises JobError, naming the layer, when an input was NaN or infinite.

        `rows` counts the sequences of all batches. It replaces the number of calls where inputs were [tokens, in], so
        that the statistics do not depend on the batch size.
        """
        values = {name: accumulator.value() for name, accumulator in self._accumulators.items()}
        sequences = self.sequences if rows is None or not self._flat else rows
        if "gram" in values and "input_norm" in self.names:
            values["input_norm"] = (values["gram"].diagonal() / max(sequences, 1)).sqrt()
        elif "input_norm" in values and sequences != self.sequences:
            values["input_norm"] = values["input_norm"] * (self.sequences / sequences) ** 0.5
        for name, value in values.items():
            if not (value.diagonal() if name in ("gram", "drift") else value).isfinite().all():
                where = f"{layer}: the" if layer else "The"
                found = f"{where} calibration activations contain NaN or infinity"
                raise JobError(f"{found}: use --dtype float32, or check the weights.")
        norm, gram = values.get("input_norm"), values.get("gram")
        return LayerStats(self.tokens, sequences, norm, gram, values.get("input_mean"), values.get("drift"))


class GradientNorm:
    """The l1 (`power=1`) or l2 (`power=2`) norm over sequences of each entry of the gradient, float32.

    `published`: as in GBLM-Pruner's code, of 100 times the gradient. For l1 every term and every partial sum is rounded
    to float16, for l2 the root of the sum.
    """

    def __init__(self, like: Tensor, power: int = 1, published: bool = False) -> None:
        self._power, self._published = power, published
        self._sum = torch.zeros_like(like, dtype=torch.float16 if published and power == 1 else torch.float32)

    def add(self, g: Tensor) -> None:
        """Add the gradient of one sequence, float32, which is overwritten."""
        g = g.mul_(100) if self._published else g
        self._sum += (g.abs_() if self._power == 1 else g.square_()).to(self._sum.dtype)

    def merge(self) -> None:
        """Sum over all processes of the run."""
        all_reduce_(self._sum)

    def value(self) -> Tensor:
        """The norm over everything added so far."""
        if self._power == 1:
            return self._sum
        return self._sum.sqrt().half() if self._published else self._sum.sqrt()


REGIONAL = "gradient_regional"  # of a block's own outputs, see billhook.engine.regional_gradients
GRADIENTS: dict[str, Callable[[Tensor], GradientNorm]] = {
    "gradient_l1": GradientNorm,
    "gradient_l2": partial(GradientNorm, power=2),
    "gradient_l1_reference": partial(GradientNorm, published=True),
    "gradient_l2_reference": partial(GradientNorm, power=2, published=True),
    REGIONAL: partial(GradientNorm, power=2),
}


def gradient_name(norm: str, mode: str) -> str:
    """The statistic of gradients that GBLM reads with these options."""
    return f"gradient_{norm}" if mode == "paper" else f"gradient_{norm}_{mode}"

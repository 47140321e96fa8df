"""What the calibration text says about the inputs and the gradients of one layer, accumulated sequence by sequence.

For inputs X [tokens, in]: `input_norm` [in] is ||X_j||_2 / sqrt(sequences) of every input feature, the root mean over
sequences of the summed squares, `input_mean` [in] is the mean over all tokens, and `gram` [in, in] is X^T X. `drift`
[in, in] is (X' - X)^T X where X' are the inputs of the same tokens in the dense model (see
`billhook.engine.dense_stream`).

Inputs of any float dtype are converted to float32 before they are squared, so half-precision activations cannot
overflow. `input_norm` is a running mean in float32, one sequence at a time, which is the arithmetic of Wanda's
published code: scores that nearly tie are then ranked as there, bit for bit, whatever the batch size. (An exact sum
would rank such ties otherwise, and the activations of all later blocks with them.) The Gram matrix is one float32
product per batch added to a float32 total: its relative error grows like 1e-7 times the square root of the number of
batches, far below SparseGPT's damping of 1e-2, while a float64 total would double the largest allocation of a run (1.6
GB instead of 0.8 GB for 14336 inputs).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from billhook.distributed.collectives import all_reduce_, world
from billhook.errors import BillhookError, JobError
from billhook.registry import hint


@dataclass(frozen=True)
class LayerStats:
    """What a criterion gets to know about a layer's inputs; a statistic that was not collected is None.

    `tokens` and `sequences` count the calibration text that reached the layer. `gradient` [out, in] is the one of
    `GRADIENTS` that the criterion named. `drift` is None where the inputs are the dense model's own, `stream_drift`
    [out, in] is there for layers that write into the residual stream only. `notes` collects what a criterion had to do
    differently (damping raised, dead inputs), for the report.
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
        """Remember, once, something that the report must say about this layer."""
        if text not in self.notes:
            self.notes.append(text)


class InputNorm:
    """||X_j||_2 / sqrt(sequences) of each input feature, float32 [in]."""

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self._mean = torch.zeros(in_features, device=device)
        self._sequences = 0

    def add(self, x: Tensor) -> None:
        """Take in float32 inputs [sequences, tokens, in]."""
        for sequence in x:
            self._mean *= self._sequences / (self._sequences + 1)
            self._sequences += 1
            self._mean += sequence.norm(dim=0).square() / self._sequences

    def merge(self) -> None:
        """Take in what the other processes of the run have added (see `billhook.distributed.collectives`)."""
        if world() > 1:
            sequences = int(all_reduce_(torch.tensor(self._sequences)))
            self._mean = all_reduce_(self._mean * self._sequences) / max(sequences, 1)
            self._sequences = sequences

    def value(self) -> Tensor:
        """The norms over everything added so far."""
        return self._mean.sqrt()


class InputMean:
    """Mean over tokens of each input feature, float32 [in]."""

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self._sum = torch.zeros(in_features, device=device)
        self._tokens = 0

    def add(self, x: Tensor) -> None:
        """Take in float32 inputs [sequences, tokens, in]."""
        for sequence in x:
            self._sum += sequence.sum(0)
            self._tokens += len(sequence)

    def merge(self) -> None:
        """Take in what the other processes of the run have added (see `billhook.distributed.collectives`)."""
        if world() > 1:
            all_reduce_(self._sum)
            self._tokens = int(all_reduce_(torch.tensor(self._tokens)))

    def value(self) -> Tensor:
        """The mean over everything added so far."""
        return self._sum / max(self._tokens, 1)


class Gram:
    """X^T X, float32 [in, in]."""

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)

    def _panels(self) -> Iterator[tuple[slice, slice]]:
        """Columns in quarters, each with all columns from its own first on: the upper triangle in 10 of 16 parts."""
        n = len(self._sum)
        step = max(n // 4, 64)
        for start in range(0, n, step):
            yield slice(start, min(start + step, n)), slice(start, n)

    def add(self, x: Tensor) -> None:
        """Take in float32 inputs [sequences, tokens, in]."""
        x = x.flatten(0, 1)
        for rows, columns in self._panels():
            self._sum[rows, columns].addmm_(x[:, rows].T, x[:, columns])

    def merge(self) -> None:
        """Take in what the other processes of the run have added (see `billhook.distributed.collectives`)."""
        all_reduce_(self._sum)

    def value(self) -> Tensor:
        """The sum over everything added so far (the accumulator itself, not a copy)."""
        for rows, columns in self._panels():
            self._sum[columns, rows] = self._sum[rows, columns].T.clone()
        return self._sum


class Drift:
    """(X' - X)^T X, float32 [in, in], for inputs X and those of the same tokens in the dense model, X'."""

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self._sum = torch.zeros(in_features, in_features, device=device)

    def add(self, x: Tensor, dense: Tensor) -> None:
        """Take in float32 inputs, both [sequences, tokens, in]."""
        self._sum.addmm_((dense - x).flatten(0, 1).T, x.flatten(0, 1))

    def merge(self) -> None:
        """Take in what the other processes of the run have added (see `billhook.distributed.collectives`)."""
        all_reduce_(self._sum)

    def value(self) -> Tensor:
        """The sum over everything added so far."""
        return self._sum


STATISTICS: dict[str, type[InputNorm] | type[InputMean] | type[Gram] | type[Drift]] = {
    "input_norm": InputNorm,
    "input_mean": InputMean,
    "gram": Gram,
    "drift": Drift,
}


class Collector:
    """Feeds one layer's inputs to the accumulators of the statistics in `names`, each computed once.

    When `gram` is asked for, `input_norm` is read off its diagonal. Raises BillhookError for an unknown name.
    """

    def __init__(self, names: tuple[str, ...], in_features: int, device: torch.device | str = "cpu") -> None:
        for name in names:
            if name not in STATISTICS:
                raise BillhookError(
                    f"Unknown statistic {name!r}.{hint(name, STATISTICS)} There are: {', '.join(STATISTICS)}."
                )
        self.names = names
        self.in_features = in_features
        self.tokens = 0
        self.sequences = 0
        derived = {"input_norm"} if "gram" in names else set()
        self._accumulators = {name: STATISTICS[name](in_features, device) for name in names if name not in derived}

    @torch.no_grad()
    def add(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Take in inputs [sequences, tokens, in], or [tokens, in] as one sequence, of any float dtype, and those of the
        same tokens in the dense model, by default no others."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"inputs {tuple(x.shape)} for a layer with {self.in_features} input features")
        x, other = ((v[None] if v.dim() == 2 else v.flatten(1, -2)).float() for v in (x, x if dense is None else dense))
        if x.numel():
            self.sequences += len(x)
            self.tokens += x.shape[0] * x.shape[1]
            for accumulator in self._accumulators.values():
                if isinstance(accumulator, Drift):
                    accumulator.add(x, other)
                else:
                    accumulator.add(x)

    def merge(self) -> None:
        """Take in what the other processes of the run have seen; all of them call this once, at the end."""
        if world() > 1:
            self.tokens, self.sequences = all_reduce_(torch.tensor([self.tokens, self.sequences])).tolist()
            for accumulator in self._accumulators.values():
                accumulator.merge()

    def stats(self) -> LayerStats:
        """Return the statistics so far; raises JobError, without the layer's name, when an input was NaN or
        infinite."""
        values = {name: accumulator.value() for name, accumulator in self._accumulators.items()}
        if "gram" in values and "input_norm" in self.names:
            values["input_norm"] = (values["gram"].diagonal() / max(self.sequences, 1)).sqrt()
        for name, value in values.items():
            if not (value.diagonal() if name in ("gram", "drift") else value).isfinite().all():
                raise JobError(
                    "The calibration activations contain NaN or infinity; try --dtype float32, or check the weights."
                )
        norm, gram = values.get("input_norm"), values.get("gram")
        return LayerStats(self.tokens, self.sequences, norm, gram, values.get("input_mean"), values.get("drift"))

    def named(self, layer: str) -> LayerStats:
        """`stats`, with the layer's name in the error."""
        try:
            return self.stats()
        except JobError as error:
            raise JobError(f"{layer}: {error}") from None


class AbsoluteSum:
    """Sum over sequences of |g|: the l1 norm, float32."""

    def __init__(self, like: Tensor) -> None:
        self._sum = torch.zeros_like(like, dtype=torch.float32)

    def add(self, g: Tensor) -> None:
        """Take in one sequence's gradient, float32, which is overwritten."""
        self._sum += g.abs_()

    def merge(self) -> None:
        """Take in what the other processes of the run have added (see `billhook.distributed.collectives`)."""
        all_reduce_(self._sum)

    def value(self) -> Tensor:
        """The norm over everything added so far."""
        return self._sum


class RootOfSquares(AbsoluteSum):
    """Square root of the sum over sequences of g^2: the l2 norm, float32."""

    def add(self, g: Tensor) -> None:
        """Take in one sequence's gradient, float32, which is overwritten."""
        self._sum += g.square_()

    def value(self) -> Tensor:
        """The norm over everything added so far."""
        return self._sum.sqrt()


class PublishedAbsoluteSum(AbsoluteSum):
    """Sum of |100 g| as GBLM-Pruner's code takes it: every term and every partial sum rounded to float16."""

    def __init__(self, like: Tensor) -> None:
        self._sum = torch.zeros_like(like, dtype=torch.float16)

    def add(self, g: Tensor) -> None:
        """Take in one sequence's gradient, float32, which is overwritten."""
        self._sum += g.mul_(100).abs_().half()


class PublishedRootOfSquares(RootOfSquares):
    """Root of the sum of (100 g)^2 as GBLM-Pruner's code takes it: summed in float32, the root rounded to float16."""

    def add(self, g: Tensor) -> None:
        """Take in one sequence's gradient, float32, which is overwritten."""
        super().add(g.mul_(100))

    def value(self) -> Tensor:
        """The norm over everything added so far."""
        return super().value().half()


REGIONAL = "gradient_regional"  # of a block's own outputs, see billhook.engine.regional_gradients
GRADIENTS: dict[str, type[AbsoluteSum]] = {
    "gradient_l1": AbsoluteSum,
    "gradient_l2": RootOfSquares,
    "gradient_l1_reference": PublishedAbsoluteSum,
    "gradient_l2_reference": PublishedRootOfSquares,
    REGIONAL: RootOfSquares,
}


def gradient_name(norm: str, mode: str) -> str:
    """The statistic of gradients that GBLM reads with these options."""
    return f"gradient_{norm}" if mode == "paper" else f"gradient_{norm}_{mode}"

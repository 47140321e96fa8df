"""From scores to a mask.

A criterion scores every weight; `Select` turns the scores into a boolean mask (True = kept) that removes exactly the
planned number. The mask equals that of a stable sort in ascending order which removes from the front: among equal
scores the leftmost column (for whole-layer groups: the first weight in row-major order) is removed first. It is found
by partial selection (numpy's introselect) of one threshold per comparison group; ties are resolved only where they
exist.

Two ways to count:

* `exact` (default): the plan's whole number of zeros, for any shape.
* `floor`: the counts of the published code. Row groups lose `int(columns * sparsity)` weights per row (Wanda). Layer
  groups lose every weight whose score is at or below that at sorted position `int(numel * sparsity)`, counted from
  zero, and so at least one more than planned, with all ties of the threshold (magnitude and SparseGPT). A sparsity of 0
  removes nothing and one of 1 removes everything; there the published code removes one weight and fails.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from billhook.errors import BillhookError

PARALLEL_FROM = 1 << 20  # elements; with fewer, starting threads costs more than it saves
NETWORK_UP_TO = 4  # entries of a group; with more, introselect is faster than exchanging neighbours


@dataclass(frozen=True)
class Select:
    """How many weights a layer loses and which are compared with each other; call it with scores to get the mask.

    `shape` is the layer's [out, in], `sparsity` the fraction (used by `floor`) and `zeros` the number (used by `exact`)
    of removed weights. `keep_of=(N, M)` keeps the N largest scores of every M consecutive columns of a row; the other
    fields are then not used. Raises BillhookError for counts outside the layer and an M that does not divide the
    columns.
    """

    shape: tuple[int, int]
    sparsity: float
    zeros: int
    keep_of: tuple[int, int] | None = None
    group: Literal["row", "layer"] = "row"
    rounding: Literal["exact", "floor"] = "exact"

    def __post_init__(self) -> None:
        rows, columns = self.shape
        if not 0 <= self.sparsity <= 1:
            raise BillhookError(f"A layer's sparsity must be between 0 and 1, got {self.sparsity}.")
        if not 0 <= self.zeros <= rows * columns:
            size = f"the {rows * columns} weights of a {rows} x {columns} layer"
            raise BillhookError(f"Cannot remove {self.zeros} of {size}.")
        if self.group not in ("row", "layer") or self.rounding not in ("exact", "floor"):
            wrong = f"group={self.group!r} must be row or layer, rounding={self.rounding!r} must be exact or floor"
            raise BillhookError(f"{wrong}.")
        if self.keep_of is not None:
            keep, of = self.keep_of
            if not 0 <= keep <= of or of < 1:
                raise BillhookError(f"{keep}:{of} is no N:M pattern: N of every M weights are kept, 0 <= N <= M.")
            if columns % of:
                raise BillhookError(f"{keep}:{of} needs a multiple of {of} columns; the layer is {rows} x {columns}.")

    def __call__(self, score: Tensor, start: int = 0) -> Tensor:
        """The mask, bool [out, c], for scores [out, c] of any float dtype, of the `c` columns from `start` on.

        With `exact`, the counts of slices that cover the layer add up to the layer's. The rows of a slice lose equal
        numbers or, where these cannot be equal, one more in the rows whose next candidate has the smallest score.
        Raises BillhookError when a score is NaN.
        """
        rows, columns = score.shape
        if rows != self.shape[0] or not 0 <= start <= start + columns <= self.shape[1]:
            raise ValueError(f"scores {tuple(score.shape)} at column {start} do not fit a layer of shape {self.shape}")
        if score.amax().isnan():
            raise BillhookError("Scores contain NaN: check the weights and the activations for NaN and infinity.")
        if self.keep_of is not None:
            keep, of = self.keep_of
            return ~remove_smallest(score.reshape(-1, of), rows * columns // of * (of - keep)).view(rows, columns)
        groups = score.reshape(1, -1) if self.group == "layer" else score
        if self.rounding == "floor" and self.group == "layer":
            removed = _at_or_below(groups, self.sparsity)
        else:
            removed = remove_smallest(groups, self._count(start, columns))
        return ~removed.view(rows, columns)

    def _count(self, start: int, columns: int) -> int:
        """The number of weights to remove from `columns` columns, beginning at `start`."""
        rows, width = self.shape
        if self.rounding == "floor":
            return rows * int(columns * self.sparsity)
        before, after = ((2 * self.zeros * end + width) // (2 * width) for end in (start, start + columns))
        return after - before


def remove_smallest(score: Tensor, total: int) -> Tensor:
    """A bool tensor like `score` [groups, n], True at the smallest entries, `total` in all.

    Every group has `total // groups` of them or, where its next candidate is among the smallest, one more.
    """
    each, extra = divmod(total, len(score))
    most = each + bool(extra)
    if most == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = _kth_smallest(score, most)
    removed = score <= threshold[:, None]
    if _count(removed) != total:  # ties, or groups that lose one weight less than others
        counts = _count_rows(removed)
        wanted = each + remove_smallest(threshold[None], extra)[0].long() if extra else torch.full_like(counts, each)
        _put_back(removed, score == threshold[:, None], counts - wanted)
    return removed


def _put_back(removed: Tensor, ties: Tensor, excess: Tensor) -> None:
    """Clear, in place, the rightmost `excess[g]` of the tied entries of each group g of `removed` [groups, n]."""
    group, position = ties.nonzero(as_tuple=True)  # in row-major order
    last = torch.bincount(group, minlength=len(ties)).cumsum(0) - 1
    from_right = last[group] - torch.arange(len(group), device=group.device)
    back = from_right < excess[group]
    removed[group[back], position[back]] = False


def _at_or_below(score: Tensor, sparsity: float) -> Tensor:
    """The published rule for `score` [1, n]: True where it is <= the value at sorted position int(n * sparsity)."""
    if sparsity == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    position = min(int(score.numel() * sparsity), score.numel() - 1)
    return score <= _kth_smallest(score, position + 1)[:, None]


def _kth_smallest(score: Tensor, k: int) -> Tensor:
    """The k-th smallest (k from 1) of each row of `score` [rows, n], as [rows]."""
    if score.shape[1] <= NETWORK_UP_TO:
        return _kth_by_exchanges(score, k)
    if score.device.type != "cpu":
        return torch.kthvalue(score, k, dim=1).values
    if score.dtype in (torch.float16, torch.bfloat16):  # numpy has no bfloat16; the conversion is exact
        return _kth_smallest(score.float(), k).to(score.dtype)

    def partition(part: np.ndarray) -> np.ndarray:
        return np.partition(part, k - 1, axis=1)[:, k - 1]

    values = score.detach().numpy()
    if score.numel() < PARALLEL_FROM or len(values) == 1:
        return torch.from_numpy(partition(values))
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:  # numpy releases the interpreter lock while it selects
        return torch.from_numpy(np.concatenate(list(pool.map(partition, np.array_split(values, threads)))))


def _kth_by_exchanges(score: Tensor, k: int) -> Tensor:
    """`_kth_smallest` for the short rows of N:M groups: k rounds of bubble sort on all rows at once."""
    lanes = list(score.t().contiguous())
    for done in range(k):
        for i in range(len(lanes) - 1, done, -1):
            lanes[i - 1], lanes[i] = torch.minimum(lanes[i - 1], lanes[i]), torch.maximum(lanes[i - 1], lanes[i])
    return lanes[k - 1]


def _count(mask: Tensor) -> int:
    """The number of True entries; numpy counts ten times as fast as torch on a CPU, here and below."""
    return int(np.count_nonzero(mask.numpy()) if mask.device.type == "cpu" else mask.sum())


def _count_rows(mask: Tensor) -> Tensor:
    """The number of True entries in each row of a mask [rows, n], int64 [rows]."""
    if mask.device.type != "cpu":
        return mask.sum(1)
    return torch.from_numpy(np.count_nonzero(mask.numpy(), axis=1))

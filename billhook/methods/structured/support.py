"""What structured methods share: the parts with the largest scores, and least squares on the columns that stay."""

import torch
from torch import Tensor

from billhook.errors import JobError
from billhook.methods.least_squares import DOUBLE


def largest(scores: Tensor, count: int) -> Tensor:
    """The `count` parts with the largest scores [parts]; of equal ones the earlier. Bool [parts]."""
    keep = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    keep[scores.argsort(descending=True, stable=True)[:count]] = True
    return keep


def columns(keep: Tensor, groups: Tensor, width: int) -> Tensor:
    """The columns that stay: bool [width], for parts `keep` [parts]; columns of no part stay."""
    kept = torch.ones(width, dtype=torch.bool, device=keep.device)
    kept[groups[~keep].flatten()] = False
    return kept


def masked(W: Tensor, keep: Tensor, groups: Tensor) -> Tensor:
    """W [out, in] with zeros in the columns of removed parts."""
    return W * columns(keep, groups, W.shape[1])


def damped(gram: Tensor, damping: float) -> Tensor:
    """X^T X + damping * mean(diag) * I, in float64 up to 512 inputs and otherwise float32; dead inputs get 1."""
    H = gram.to(torch.float64 if len(gram) <= DOUBLE else torch.float32, copy=True)
    diagonal = H.diagonal()
    alive = diagonal > 0
    mean = diagonal.sum() / alive.sum().clamp_min(1)
    diagonal.add_(torch.where(alive, damping * mean, torch.where(mean > 0, mean, 1.0)))
    return H


def refit(W: Tensor, H: Tensor, kept: Tensor) -> Tensor:
    """The weights V, zero outside of the columns `kept` bool [in], that minimize tr((W - V) H (W - V)^T).

    The support is the same for all rows, so one Cholesky factorization serves all of them. Raises JobError if H is not
    positive definite there.
    """
    index = kept.nonzero()[:, 0]
    V = torch.zeros_like(W)
    if not len(index):
        return V
    L, failed = torch.linalg.cholesky_ex(H[index][:, index])
    if failed:
        raise JobError("The input statistics cannot be factorized: use more damping (--set damping=0.1).")
    V[:, index] = torch.cholesky_solve(H[index] @ W.to(H.dtype).T, L).T.to(W.dtype)
    return V

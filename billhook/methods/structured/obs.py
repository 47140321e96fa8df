"""OBS by parts: remove parts one after another, each time the one that is cheapest once the others make up for it.

Meng et al., "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial Optimization", ICML
2024, arXiv:2403.18983. Over the inputs X of the consumer W, with P the inverse of H on the columns that are still
there, and G the columns of a part:

    H = (1 − s) XᵀX + s · diag(XᵀX) + damping · mean(diag) · I,   s = shrinkage · in / (in + tokens)
    cost of removing G = tr(W_G (P_GG)⁻¹ W_Gᵀ),     then   W −= W_G (P_GG)⁻¹ P_G:,    P −= P_:G (P_GG)⁻¹ P_G:
    gain of restoring G = tr(R_G (S_G)⁻¹ R_Gᵀ),      R = (W_dense − W) H,   S_G = H_GG − H_G: P H_:G

Parts are removed in at most `rounds` rounds, one at a time where that is enough. Then up to `swaps` times the most
useful removed parts are restored and the cheapest ones removed in their place, as long as this lowers the loss; a step
that does not is repeated with half as many. At the end the weights that stay solve the least-squares problem exactly,
with one Cholesky factorization for all rows.

`dense_target` moves what is fitted from the outputs of W on the present inputs towards the dense model's outputs
(`billhook.methods.least_squares.shift_to_dense`), so that a layer makes up for what was lost before it. XᵀX is shrunk
towards its diagonal as in `gptq`, the more the fewer tokens there are: what is fitted to a short text is of less use on
other text.

Differences from the published code: the damping is relative; several channels may go in one round; XᵀX is shrunk.

Limits: inputs that are always zero are removed first. A layer with n inputs needs 2 n² numbers of memory.
"""

from dataclasses import replace

import torch
from torch import Tensor

from billhook.errors import BillhookError
from billhook.methods.least_squares import noise_share, shift_to_dense, shrunk
from billhook.methods.statistics import LayerStats
from billhook.methods.structured.support import columns, damped, refit
from billhook.registry import method


def _needs(damping: float, dense_target: float, rounds: int, swaps: int, shrinkage: float) -> tuple[str, ...]:
    return ("gram", "drift") if dense_target else ("gram",)


@method(paper="Meng et al. 2024, arXiv:2403.18983; Hassibi & Stork 1993", needs=_needs)
def obs(
    W: Tensor,
    stats: LayerStats,
    groups: Tensor,
    count: int,
    *,
    damping: float = 0.01,
    dense_target: float = 0.5,
    rounds: int = 128,
    swaps: int = 16,
    shrinkage: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The parts to keep, bool [parts], and the refitted W [out, in]; reads stats.gram and stats.drift, both [in, in].

    `damping` is a fraction of the mean of the gram's diagonal. Raises BillhookError for options out of range, JobError
    if H cannot be factorized.
    """
    in_range = 0 < damping < float("inf") and 0 <= dense_target <= 1 and 0 <= shrinkage <= 1
    if not in_range or rounds < 1 or swaps < 0:
        raise BillhookError(
            f"obs: damping={damping} must be positive, dense_target={dense_target} and shrinkage={shrinkage} in [0, 1],"
            f" rounds={rounds} at least 1, swaps={swaps} at least 0."
        )
    assert stats.gram is not None
    gram = shrunk(stats.gram, shrinkage * noise_share(W.shape[1], stats.tokens))
    H = damped(gram, damping)
    target = shift_to_dense(W, replace(stats, gram=gram), dense_target, damping)
    del gram  # as large as H
    state = _Elimination(target.to(H.dtype), H, groups)
    surplus = len(groups) - count
    step = -(-surplus // rounds)
    while surplus > 0:
        state.remove(state.cheapest(min(step, surplus)))
        surplus -= step
    _swap(state, swaps)
    return state.keep, refit(target, H, columns(state.keep, groups, W.shape[1]))


class _Elimination:
    """Parts that are still there, the best weights for them, and the inverse of H on their columns."""

    def __init__(self, target: Tensor, H: Tensor, groups: Tensor) -> None:
        self.target, self.H, self.groups = target, H, groups
        self.W, self.P = target.clone(), torch.linalg.inv(H)
        self.keep = torch.ones(len(groups), dtype=torch.bool, device=H.device)

    def costs(self) -> Tensor:
        """What removing each part would add to the loss, [parts]; infinite for removed parts."""
        blocks = self.P[self.groups[:, :, None], self.groups[:, None, :]]
        costs = torch.full((len(self.groups),), float("inf"), dtype=self.H.dtype, device=self.H.device)
        costs[self.keep] = _traces(self.W, self.groups[self.keep], blocks[self.keep])
        return costs

    def gains(self) -> Tensor:
        """What restoring each part would take off the loss, [parts]; -1 for parts that are there."""
        gone = self.groups[~self.keep]
        gains = torch.full((len(self.groups),), -1.0, dtype=self.H.dtype, device=self.H.device)
        R = (self.target - self.W) @ self.H
        inner = self.H @ (self.P @ self.H[:, gone.flatten()])
        at = torch.arange(gone.numel(), device=gone.device).view(gone.shape)
        blocks = self.H[gone[:, :, None], gone[:, None, :]] - inner[gone[:, :, None], at[:, None, :]]
        gains[~self.keep] = _traces(R, gone, blocks)
        return gains

    def cheapest(self, number: int) -> Tensor:
        """The parts with the least costs, int64 [number]."""
        return self.costs().argsort(stable=True)[:number]

    def remove(self, parts: Tensor) -> None:
        """Remove parts, whose work the others take over."""
        G = self.groups[parts].flatten()
        solved = torch.linalg.solve(self.P[G][:, G], self.P[G])
        self.W -= self.W[:, G] @ solved
        self.P -= self.P[:, G] @ solved
        self.W[:, G], self.P[G], self.P[:, G] = 0, 0, 0
        self.keep[parts] = False

    def restore(self, parts: Tensor) -> None:
        """Restore parts, with the best weights for them and the others."""
        G = self.groups[parts].flatten()
        u = self.P @ self.H[:, G]
        S = self.H[G][:, G] - self.H[G] @ u
        u[G] = -torch.eye(len(G), dtype=u.dtype, device=u.device)
        R = ((self.target - self.W) @ self.H)[:, G]
        solved = torch.linalg.solve(S, u.T)
        self.W -= R @ solved
        self.P += u @ solved
        self.keep[parts] = True


def _traces(W: Tensor, groups: Tensor, blocks: Tensor) -> Tensor:
    """tr(W_G B⁻¹ W_Gᵀ) of each part: W [out, in], groups [parts, size], blocks [parts, size, size]."""
    if groups.shape[1] == 1:
        return W[:, groups[:, 0]].square().sum(0) / blocks[:, 0, 0]
    parts = W[:, groups].permute(1, 2, 0)  # [parts, size, out]
    return (parts * torch.linalg.solve(blocks, parts)).sum((1, 2))


def _swap(state: _Elimination, swaps: int) -> None:
    """Exchange removed parts for ones that stayed while this lowers the loss."""
    gone = int((~state.keep).sum())
    size = max(1, min(gone, len(state.keep) - gone) // 8)
    if not gone or gone == len(state.keep):
        return
    for _ in range(swaps):
        before = state.W.clone(), state.P.clone(), state.keep.clone()
        back = state.gains().argsort(descending=True, stable=True)[:size]
        loss = _loss(state)
        state.restore(back)
        state.remove(state.cheapest(size))
        if _loss(state) < loss * (1 - 1e-9):
            continue
        state.W, state.P, state.keep = before
        if size == 1:
            return
        size = max(1, size // 2)


def _loss(state: _Elimination) -> float:
    D = state.target - state.W
    return float(((D @ state.H) * D).sum())

"""The published procedures, as plain code, for the benchmarks to be compared with.

AlphaPruning's estimate is float32 singular values and a Python loop over cut points; Wanda sorts every row fully and
stably; magnitude sorts the layer; SparseGPT factors, inverts, factors again and loops over columns; whole runs go one
sequence at a time.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def published_alpha_peak(W: Tensor) -> float:
    """AlphaPruning's `xmin_peak` estimate as its released code computes it: float32, one cut at a time."""
    evals = torch.square(torch.linalg.svdvals(W.float()).flatten()).sort().values
    count = len(evals)
    log_evals = torch.log(evals)
    decades = torch.log10(evals)
    low, high = decades.min(), decades.max()
    counts = torch.histc(decades, 100, min=float(low), max=float(high))
    edges = torch.linspace(float(low), float(high), 101)
    mode = 10 ** float(edges[int(counts.argmax())])
    alphas, distances = torch.zeros(count - 1), torch.ones(count - 1)
    for i, xmin in enumerate(evals[:-1]):
        if xmin < math.log10(0.95 * mode):
            continue
        if xmin > 1.5 * mode:
            break
        n = float(count - i)
        alpha = 1 + n / (log_evals[i:].sum() - n * log_evals[i])
        alphas[i] = alpha
        if alpha > 1:
            distances[i] = torch.max(torch.abs(1 - (evals[i:] / xmin) ** (-alpha + 1) - torch.arange(n) / n))
    return float(alphas[distances.argmin()])


def published_rows(score: Tensor, sparsity: float) -> Tensor:
    """Wanda's keep mask: sort every row, drop the first int(columns * sparsity)."""
    order = torch.sort(score, dim=-1, stable=True)[1][:, : int(score.shape[1] * sparsity)]
    return ~torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def published_layer(score: Tensor, sparsity: float) -> Tensor:
    """Magnitude's keep mask: sort the whole layer for one threshold."""
    return score > torch.sort(score.flatten())[0][int(score.numel() * sparsity)]


def published_groups(score: Tensor, keep: int, of: int) -> Tensor:
    """Wanda's N:M keep mask: one group of columns after another."""
    removed = torch.zeros_like(score, dtype=torch.bool)
    for start in range(0, score.shape[1], of):
        smallest = torch.topk(score[:, start : start + of], of - keep, dim=1, largest=False)[1]
        removed.scatter_(1, start + smallest, True)
    return ~removed


def published_sparsegpt(W: Tensor, gram: Tensor, sparsity: float, keep_of: tuple[int, int] | None) -> Tensor:
    """SparseGPT's column loop, block size 128, damping 0.01."""
    W, H, columns = W.clone(), gram.clone(), W.shape[1]
    H.diagonal().add_(0.01 * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, columns, 128):
        stop = min(start + 128, columns)
        W1, U1 = W[:, start:stop].clone(), U[start:stop, start:stop]
        Q1, errors, mask = torch.zeros_like(W1), torch.zeros_like(W1), torch.zeros_like(W1, dtype=torch.bool)
        if keep_of is None:
            score = W1**2 / U1.diagonal() ** 2
            mask = score <= torch.sort(score.flatten())[0][int(score.numel() * sparsity)]
        for i in range(stop - start):
            if keep_of is not None and i % keep_of[1] == 0:
                score = W1[:, i : i + keep_of[1]] ** 2 / U1.diagonal()[i : i + keep_of[1]] ** 2
                mask.scatter_(1, i + torch.topk(score, keep_of[1] - keep_of[0], dim=1, largest=False)[1], True)
            q = W1[:, i].clone()
            q[mask[:, i]] = 0
            Q1[:, i] = q
            errors[:, i] = (W1[:, i] - q) / U1[i, i]
            W1[:, i:] -= errors[:, i : i + 1].matmul(U1[i : i + 1, i:])
        W[:, start:stop] = Q1
        W[:, stop:] -= errors.matmul(U[start:stop, stop:])
    return W


def published_run(model: PreTrainedModel, batches: list[Tensor], criterion: str, sparsity: float) -> None:
    """A whole run in the style of Wanda's and SparseGPT's released code: one sequence at a time, no statistic shared
    between layers."""
    blocks = model.model.layers
    kwargs: dict[str, Any] = {}
    hidden: list[Tensor] = []

    def catch(_: torch.nn.Module, args: tuple[Any, ...], kw: dict[str, Any]) -> None:
        hidden.append(args[0])
        kwargs.update(kw)
        raise StopIteration

    hook = blocks[0].register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        with contextlib.suppress(StopIteration):
            model(batch, use_cache=False)
    hook.remove()
    for block in blocks:
        layers = {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
        rank = 2 if criterion == "sparsegpt" else 1
        statistics = {name: torch.zeros([module.in_features] * rank) for name, module in layers.items()}

        hooks = [
            module.register_forward_pre_hook(_observe(statistics[name], criterion)) for name, module in layers.items()
        ]
        for states in hidden:
            block(states, **kwargs)
        for hook in hooks:
            hook.remove()
        for name, module in layers.items():
            W = module.weight.data
            if criterion == "sparsegpt":
                module.weight.data = published_sparsegpt(W, statistics[name], sparsity, None)
            else:
                W[~published_rows(W.abs() * statistics[name].sqrt(), sparsity)] = 0
        hidden = [block(states, **kwargs) for states in hidden]


def _observe(total: Tensor, criterion: str) -> Callable[..., None]:
    def add(_: torch.nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].flatten(0, -2).float()
        total.add_(x.T @ x if criterion == "sparsegpt" else x.norm(dim=0).square())

    return add

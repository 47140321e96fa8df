"""Accumulated statistics equal those of all inputs at once, whatever the batches and the dtype."""

import os
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from billhook.errors import BillhookError, JobError
from billhook.methods.statistics import STATISTICS, Collector

ALL = tuple(STATISTICS)


def inputs(tokens: int = 60, features: int = 12) -> torch.Tensor:
    return torch.randn(tokens, features, generator=torch.Generator().manual_seed(0)) * torch.arange(features)


@pytest.mark.parametrize("names", [("input_norm",), ("gram",), ALL])
@pytest.mark.parametrize("batch", [1, 7, 60])
def test_statistics_of_batches_add_up(names: tuple[str, ...], batch: int) -> None:
    x = inputs()
    collector = Collector(names, 12)
    for part in x.split(batch):
        collector.add(part)
    stats = collector.stats()
    assert stats.tokens == 60
    assert stats.sequences == len(x.split(batch))
    if "input_norm" in names:
        torch.testing.assert_close(stats.input_norm, (x.double().norm(dim=0) / stats.sequences**0.5).float())
    else:
        assert stats.input_norm is None
    if "gram" in names:
        torch.testing.assert_close(stats.gram, (x.double().T @ x.double()).float(), rtol=1e-5, atol=1e-4)
    else:
        assert stats.gram is None
    assert all(value is None or value.dtype == torch.float32 for value in (stats.input_norm, stats.gram))


def test_sequences_are_counted_from_the_batch() -> None:
    collector = Collector(ALL, 12)
    collector.add(inputs().view(4, 15, 12))
    collector.add(inputs()[:5])
    collector.add(inputs()[:0])
    assert (collector.tokens, collector.sequences) == (65, 5)


def test_the_norm_does_not_depend_on_the_batch_size() -> None:
    one, four = Collector(("input_norm",), 12), Collector(("input_norm",), 12)
    x = inputs().view(4, 15, 12)
    four.add(x)
    for sequence in x:
        one.add(sequence[None])
    assert torch.equal(one.stats().input_norm, four.stats().input_norm)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    x = torch.full((1000, 4), 3e4, dtype=dtype)
    collector = Collector(ALL, 4)
    collector.add(x)
    value = float(x[0, 0])
    torch.testing.assert_close(collector.stats().gram, torch.full((4, 4), 1000 * value * value), rtol=1e-5, atol=0)
    torch.testing.assert_close(collector.stats().input_norm, torch.full((4,), 1000**0.5 * value), rtol=1e-5, atol=0)


def test_a_long_run_stays_accurate() -> None:
    collector = Collector(("input_norm",), 1)
    for _ in range(5000):
        collector.add(torch.full((1, 1), 0.3))
    torch.testing.assert_close(collector.stats().input_norm, torch.tensor([0.3]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("names", [("input_norm",), ("gram",)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_are_an_error(names: tuple[str, ...], bad: float) -> None:
    x = inputs()
    x[3, 5] = bad
    collector = Collector(names, 12)
    collector.add(x)
    with pytest.raises(JobError, match="NaN or infinity"):
        collector.stats()


def test_inputs_are_not_modified_and_no_graph_is_kept() -> None:
    x = inputs().requires_grad_()
    before = x.detach().clone()
    collector = Collector(ALL, 12)
    collector.add(x)
    assert torch.equal(x, before)
    assert not collector.stats().gram.requires_grad


def test_statistics_without_tokens_are_not_an_error() -> None:
    stats = Collector(ALL, 3).stats()
    assert stats.tokens == 0
    assert torch.equal(stats.input_norm, torch.zeros(3))


def test_notes_are_kept_once() -> None:
    collector = Collector(("gram",), 3)
    first, second = collector.stats(), collector.stats()
    first.note("damping raised")
    first.note("damping raised")
    assert (first.notes, second.notes) == (["damping raised"], [])


def test_unknown_statistics_and_shapes_are_refused() -> None:
    with pytest.raises(BillhookError, match="Did you mean 'gram'"):
        Collector(("grams",), 3)
    with pytest.raises(ValueError, match="4 input features"):
        Collector(ALL, 4).add(torch.zeros(2, 3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("names", [ALL, ("input_norm", "input_mean")])
@pytest.mark.parametrize("flat", [False, True])
def test_processes_with_unequal_shares_have_the_statistics_of_one(
    names: tuple[str, ...], flat: bool, tmp_path: Path
) -> None:
    """One process sees four of six sequences, the other two, in batches of two; `flat`, as experts see them."""
    x = inputs(6 * 10).view(6, 10, 12)
    dense = x + torch.arange(12)
    parts = [[slice(0, 2), slice(2, 4)], [slice(4, 6)]]

    def collected(slices: list[slice]) -> Collector:
        collector = Collector(names, 12)
        for part in slices:
            one, other = (value[part].flatten(0, 1) if flat else value[part] for value in (x, dense))
            collector.add(one, other)
        return collector

    def rank(number: int) -> None:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=number, world_size=2)
        collector = collected(parts[number])
        collector.merge()
        torch.save(asdict(collector.stats(rows=6)), tmp_path / f"{number}.pt")

    in_two_processes(rank)
    expected = asdict(collected(parts[0] + parts[1]).stats(rows=6))
    for number in range(2):
        found = torch.load(tmp_path / f"{number}.pt")
        assert (found["tokens"], found["sequences"]) == (60, 6)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-4)


def in_two_processes(work: Callable[[int], None]) -> None:
    """Do `work(rank)` in two copies of this process; both must succeed."""
    children = []
    for number in range(2):
        children.append(os.fork())
        if not children[-1]:
            try:
                work(number)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]

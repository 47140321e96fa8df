"""The mask of every selection is the one a stable full sort gives, with exactly the count that was asked for."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from billhook.errors import BillhookError
from billhook.methods.masks import Select, remove_smallest

GROUPS = ("row", "layer")
quick = settings(max_examples=25, deadline=None)


@st.composite
def scores(draw: st.DrawFn) -> torch.Tensor:
    """A small score matrix, sometimes full of ties, zeros and infinities."""
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    score = torch.randint(0, levels, (rows, columns), generator=generator).float() / 7
    if draw(st.booleans()):
        score[score == score.max()] = float("inf")
    return score.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])))


def slow_keep(score: torch.Tensor, zeros: int, group: str) -> torch.Tensor:
    """The specification: plain loops over Python's stable sort."""
    rows, columns = score.shape
    values = score.double().tolist()
    keep = torch.ones(rows, columns, dtype=torch.bool)
    if group == "layer":
        order = sorted(range(rows * columns), key=lambda i: values[i // columns][i % columns])
        for i in order[:zeros]:
            keep[i // columns, i % columns] = False
        return keep
    each, extra = divmod(zeros, rows)
    orders = [sorted(range(columns), key=row.__getitem__) for row in values]
    ranked = sorted(range(rows), key=lambda r: values[r][orders[r][each]]) if extra else []
    for r in range(rows):
        for c in orders[r][: each + (r in ranked[:extra])]:
            keep[r, c] = False
    return keep


def exact(score: torch.Tensor, zeros: int, group: str) -> torch.Tensor:
    return Select(tuple(score.shape), zeros / score.numel(), zeros, None, group)(score)


@quick
@given(scores(), st.floats(0, 1), st.sampled_from(GROUPS))
def test_the_mask_is_that_of_a_stable_sort(score: torch.Tensor, sparsity: float, group: str) -> None:
    zeros = round(sparsity * score.numel())
    before = score.clone()
    keep = exact(score, zeros, group)
    assert (keep.dtype, keep.shape) == (torch.bool, score.shape)
    assert (~keep).sum() == zeros
    assert torch.equal(keep, slow_keep(score, zeros, group))
    assert torch.equal(score, before)


@quick
@given(scores(), st.floats(0, 1), st.sampled_from(GROUPS))
def test_no_kept_weight_scores_less_than_a_removed_one_of_its_group(
    score: torch.Tensor, sparsity: float, group: str
) -> None:
    keep = exact(score, round(sparsity * score.numel()), group)
    groups = [(score.flatten(), keep.flatten())] if group == "layer" else list(zip(score, keep, strict=True))
    for values, kept in groups:
        if kept.any() and not kept.all():
            assert values[kept].min() >= values[~kept].max()


@quick
@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.floats(0, 1),
    st.sampled_from(GROUPS),
    st.lists(st.integers(0, 40), max_size=6),
)
def test_slices_of_columns_add_up(rows: int, columns: int, sparsity: float, group: str, cuts: list[int]) -> None:
    zeros = round(sparsity * rows * columns)
    score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(columns))
    select = Select((rows, columns), sparsity, zeros, None, group)
    edges = sorted({0, columns, *(c for c in cuts if c < columns)})
    removed = 0
    for a, b in pairwise(edges):
        removed += int((~select(score[:, a:b], a)).sum())
        assert abs(removed - zeros * b / columns) <= 0.5  # the nearest whole number to its share of the columns
    assert removed == zeros


@quick
@given(st.integers(1, 8), st.integers(1, 30), st.floats(0, 1), st.sampled_from(GROUPS), st.integers(0, 1000))
def test_order_of_rows_does_not_matter(rows: int, columns: int, sparsity: float, group: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randperm(rows * columns, generator=generator).view(rows, columns).float()
    order = torch.randperm(rows, generator=generator)
    zeros = round(sparsity * rows * columns)
    assert torch.equal(exact(score, zeros, group)[order], exact(score[order], zeros, group))


@quick
@given(
    st.integers(1, 8),
    st.integers(1, 30),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from(GROUPS),
    st.integers(0, 1000),
)
def test_more_sparsity_removes_more_of_the_same(
    rows: int, columns: int, a: float, b: float, group: str, seed: int
) -> None:
    score = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed)).view(rows, columns).float()
    less, more = (exact(score, round(s * rows * columns), group) for s in sorted((a, b)))
    assert not (more & ~less).any()


@quick
@given(scores(), st.floats(0, 1))
def test_floor_counts_are_the_published_ones(score: torch.Tensor, sparsity: float) -> None:
    rows, columns = score.shape
    keep = Select((rows, columns), sparsity, 0, None, "row", "floor")(score)
    assert torch.equal(keep, slow_keep(score, rows * int(columns * sparsity), "row"))
    keep = Select((rows, columns), sparsity, 0, None, "layer", "floor")(score)
    if 0 < sparsity < 1:
        threshold = torch.sort(score.flatten())[0][int(score.numel() * sparsity)]
        assert torch.equal(~keep, score <= threshold)
    else:
        assert keep.all() if sparsity == 0 else not keep.any()


@quick
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.data())
def test_n_of_m_keeps_the_largest_of_every_group(rows: int, groups: int, of: int, data: st.DataObject) -> None:
    keep_n = data.draw(st.integers(0, of))
    score = torch.randint(0, 4, (rows, groups * of), generator=torch.Generator().manual_seed(of * groups)).float()
    select = Select((rows, groups * of), 0.5, 0, (keep_n, of), data.draw(st.sampled_from(GROUPS)))
    keep = select(score)
    for r in range(rows):
        for start in range(0, groups * of, of):
            order = sorted(range(of), key=score[r, start : start + of].tolist().__getitem__)
            assert sorted(order[of - keep_n :]) == keep[r, start : start + of].nonzero().flatten().tolist()
    assert torch.equal(select(score[:, :of], 0), keep[:, :of])


@pytest.mark.parametrize("shape", [(1100, 1024), (1025, 1100)])
def test_large_layers_agree_with_a_full_sort(shape: tuple[int, int]) -> None:
    score = torch.randint(0, 5000, shape, generator=torch.Generator().manual_seed(0)).float()
    total = int(0.61 * score.numel()) + 7
    for groups in (score, score.reshape(1, -1)):
        removed = remove_smallest(groups, total)
        assert removed.sum() == total
        counts = removed.sum(1)
        order = torch.sort(groups, dim=1, stable=True).indices
        ranks = torch.empty_like(order).scatter_(1, order, torch.arange(groups.shape[1]).expand_as(order))
        assert torch.equal(removed, ranks < counts[:, None])
        assert counts.max() - counts.min() <= 1


def test_a_view_of_transposed_scores_is_read_in_its_own_order() -> None:
    score = torch.zeros(6, 4).t()
    assert (~exact(score, 7, "layer")).nonzero().tolist() == [[0, c] for c in range(6)] + [[1, 0]]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("keep_of", [None, (2, 4)])
def test_nan_scores_are_refused(group: str, keep_of: tuple[int, int] | None) -> None:
    score = torch.rand(3, 8)
    score[1, 5] = float("nan")
    with pytest.raises(BillhookError, match="NaN"):
        Select((3, 8), 0.5, 12, keep_of, group)(score)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": 1.5}, "between 0 and 1"),
        ({"sparsity": float("nan")}, "between 0 and 1"),
        ({"zeros": 25}, "Cannot remove 25 of the 24"),
        ({"zeros": -1}, "Cannot remove"),
        ({"keep_of": (2, 5)}, "multiple of 5 columns"),
        ({"keep_of": (5, 4)}, "no N:M pattern"),
        ({"group": "column"}, "must be row or layer"),
        ({"rounding": "up"}, "must be exact or floor"),
    ],
)
def test_impossible_selections_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(BillhookError, match=message):
        Select(**({"shape": (3, 8), "sparsity": 0.5, "zeros": 12} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "start"), [((2, 8), 0), ((3, 4), 5), ((3, 9), 0)])
def test_scores_of_another_shape_are_refused(shape: tuple[int, int], start: int) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        Select((3, 8), 0.5, 12)(torch.rand(shape), start)


@pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]
)
@pytest.mark.parametrize("group", GROUPS)
def test_the_accelerator_selects_the_same(device: str, group: str) -> None:
    score = torch.randint(0, 100, (257, 512), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(exact(score.to(device), 70001, group).cpu(), exact(score, 70001, group))


@pytest.mark.parametrize("model", ["stories260k", "babyllama-105", "c4gut-llama-8x128", "c4gut-llama-12x128"])
def test_published_magnitude_masks_and_row_counts(shared: Path, model: str) -> None:
    reference = json.loads((shared / "golden" / model / "reference.json").read_text())
    seen = 0
    with (
        safe_open(shared / "golden" / model / "masks.safetensors", "pt") as golden,
        safe_open(shared / "models" / model / "model.safetensors", "pt") as weights,
    ):
        for key in list(golden.keys()):
            tag, layer = key.split("|")
            sparsity = asked(tag, layer, reference)
            if sparsity is None:
                continue
            seen += 1
            W = weights.get_tensor(f"{layer}.weight").float()
            shape = (W.shape[0], W.shape[1])
            keep = torch.from_numpy(np.unpackbits(golden.get_tensor(key).numpy())[: W.numel()]).view(shape).bool()
            if tag.startswith("magnitude"):
                assert torch.equal(Select(shape, sparsity, 0, None, "layer", "floor")(W.abs()), keep), key
            else:
                assert torch.equal(Select(shape, sparsity, 0, None, "row", "floor")(W.abs()).sum(1), keep.sum(1)), key
    assert seen >= 9 * 35


def asked(tag: str, layer: str, reference: dict[str, Any]) -> float | None:
    """The sparsity that a published run asked of a layer; None where the files do not say (OWL) or counts are not
    comparable."""
    criterion, _, allocation = tag.partition("_")
    name, _, target = allocation.rpartition("_")
    if criterion == "gblm" or not name or name.startswith("owl"):
        return None
    if name.startswith("atp"):
        return float(reference["runs"][tag]["rates"][int(layer.split(".")[2])])
    if name.startswith("alpha"):
        return float(reference["alphapruning_ratios"][f"S{target}_eps0.3"][layer])
    return float(target)

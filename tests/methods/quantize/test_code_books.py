"""The search of code books, against all points with all signs."""

from itertools import product

import pytest
import torch

from billhook.methods.quantize.code_books import CodeBook, book
from billhook.methods.quantize.ggml import GGML

BOOKS = [grid for grid in GGML.values() if isinstance(grid, CodeBook)]


def every_code(grid):
    """All codes of a grid whose signs are stored with one vector, [codes, dim]."""
    signs = torch.tensor([s for s in product((1.0, -1.0), repeat=grid.dim) if not grid.even or s.count(-1) % 2 == 0])
    return (book(grid.name)[:, None] * signs).reshape(-1, grid.dim)


def error(x, codes, weight):
    return ((x - codes).square() @ weight).double()


@pytest.mark.parametrize("name", ["iq3_s", "iq2_xxs"])
def test_the_code_is_the_nearest_of_all_codes_or_with_even_signs_within_one_percent(name):
    grid, g = GGML[name], torch.Generator().manual_seed(0)
    x = torch.randn(300, grid.step, generator=g) * book(name).mean() * 1.3
    weight = torch.rand(grid.step, generator=g) * 3 + 0.1
    least = torch.stack([error(row, every_code(grid), weight).min() for row in x])
    found = error(x, grid.nearest(x, weight), weight)
    assert (found > least - 1e-3 * least.mean()).all()
    assert found.sum() < least.sum() * (1.01 if grid.even else 1.00001)


@pytest.mark.parametrize("grid", BOOKS, ids=lambda grid: grid.name)
def test_codes_are_points_of_the_book_and_signs_are_even_in_number_where_seven_are_stored(grid):
    x = torch.randn(100, 32, generator=torch.Generator().manual_seed(1)) * 30
    codes = grid.nearest(x)
    vectors = codes.view(-1, grid.dim)
    assert torch.equal(book(grid.name)[grid.index(vectors.long())[:, 0]], vectors.abs())
    if grid.even:
        assert ((codes.view(-1, 8) < 0).sum(1) % 2 == 0).all()
    else:
        assert torch.equal(codes < 0, x < 0)


@pytest.mark.parametrize("grid", BOOKS, ids=lambda grid: grid.name)
def test_the_weight_of_columns_lowers_the_weighted_error(grid):
    x = torch.randn(2000, grid.step, generator=torch.Generator().manual_seed(2)) * book(grid.name).mean()
    weight = torch.ones(grid.step)
    weight[0] = 20.0
    alike, weighed = (error(x, grid.nearest(x, w), weight).sum() for w in (None, weight))
    assert weighed < 0.93 * alike

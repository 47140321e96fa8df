"""The loops of the quantizers, for every instruction set that this processor has, against plain loops."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from billhook.errors import JobError
from billhook.methods.quantize.grids import grid_of
from billhook.methods.quantize.nearest import nearest as nearest_codes
from billhook.methods.statistics import LayerStats
from billhook.runtime import codes, library, plain_codes

POINTS: dict[str, Sequence[int]] = {"integers": range(-4, 4), "table": (-127, -65, -22, 1, 25, 53, 113)}
ROWS = [1, 15, 33]


@pytest.fixture(params=library.paths(), autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with library.forced(request.param):
        yield request.param


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_same_everywhere(path: str, found: Sequence[Tensor], function: object, *args: object, **kwargs: object):
    """All instruction sets, and any number of threads, give the same bits."""
    if path == "torch":
        return
    torch.set_num_threads(2)
    try:
        with library.forced("portable"):
            assert all(map(torch.equal, found, function(*args, **kwargs)))
    finally:
        torch.set_num_threads(1)


def nearest(x: Tensor, points: Sequence[int]) -> Tensor:
    """The nearest point by comparing with all."""
    table = torch.tensor(list(points)).to(x.dtype)
    return table[(x[..., None] - table).abs().argmin(-1)]


@pytest.mark.parametrize("kind", POINTS)
@pytest.mark.parametrize("rows", ROWS)
def test_sums_are_those_of_the_nearest_codes(path: str, kind: str, rows: int):
    x, weight, scale, offset = random(3, 16, rows), random(3, 16).abs() + 0.1, random(3, rows), random(3, rows)
    scale[0, 0] = 0
    for given in (None, offset):
        found = codes.code_sums(x, weight, codes.Values(scale, given, POINTS[kind]))
        inverse = scale.double().reciprocal().where(scale != 0, 0)
        code = nearest((x.double() - (0 if given is None else given[:, None])) * inverse[:, None], POINTS[kind])
        wanted = [(weight[:, :, None] * y).sum(1) for y in (code, code.square(), code * x)]
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-3)
        assert_same_everywhere(path, found, codes.code_sums, x, weight, codes.Values(scale, given, POINTS[kind]))


@pytest.mark.parametrize("kind", POINTS)
@pytest.mark.parametrize("mirrored", [False, True])
def test_the_best_scale_is_as_good_as_the_best_of_all_that_are_tried(path: str, kind: str, mirrored: bool):
    points = (1, 5, 9, 13) if mirrored else POINTS[kind]
    x, weight = random(4, 16, 21), random(4, 16).abs() + 0.1
    unit = x.abs().amax(1)
    tried = [sign / points[-1] * factor for factor in (0.7, 1.0) for sign in (1, -1)]
    scale, power = codes.search_scale(x, weight, unit, tried, points, mirrored=mirrored)

    def error(scale: Tensor) -> Tensor:
        values = x.double() / scale[:, None]
        code = nearest(values.abs(), points).copysign(values) if mirrored else nearest(values, points)
        return (weight[:, :, None] * (x - code * scale[:, None]).square()).sum(1)

    first = torch.stack([error(unit.double() * factor) for factor in tried]).amin(0)
    assert (error(scale.double()) <= first * 1.001).all()
    assert power.shape == scale.shape
    again = codes.search_scale, x, weight, unit, tried, points
    assert_same_everywhere(path, (scale, power), *again, mirrored=mirrored)


def test_the_best_range_fits_weights_of_the_grid_and_keeps_offsets_below_the_limit(path: str):
    code = torch.randint(0, 16, (4, 32, 19), generator=torch.Generator().manual_seed(0)).float()
    code[:, 0], code[:, 1] = 0, 15
    scale, offset = random(4, 19).abs() + 0.1, random(4, 19)
    x, weight, cuts = code * scale[:, None] + offset[:, None], random(4, 32).abs() + 0.1, [(0.0, 0.0), (-0.5, 1.0)]
    a, b, power = codes.search_range(x, weight, cuts, torch.inf, 15)
    torch.testing.assert_close(a, scale, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(b, offset, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(power, (weight[:, :, None] * code.square()).sum(1), rtol=1e-3, atol=1e-3)
    a, b, power = codes.search_range(x, weight, cuts, 0.0, 15)
    assert (b <= 0).all()
    assert (a >= 0).all()
    assert_same_everywhere(path, (a, b, power), codes.search_range, x, weight, cuts, 0.0, 15)
    equal = codes.search_range(torch.full((1, 32, 3), 2.5), weight[:1], cuts, torch.inf, 15)
    torch.testing.assert_close(equal[1] + 0 * equal[0], torch.full((1, 3), 2.5))


@pytest.mark.parametrize("kind", POINTS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("columns", [32, 320])
def test_columns_are_rounded_one_by_one_and_pass_their_errors_on(path: str, kind: str, rows: int, columns: int):
    x, scale, offset = random(columns, rows), random(columns // 16, rows), random(columns // 16, rows) / 4
    U = torch.triu(random(columns, columns)) / 16 + torch.eye(columns)
    zero = random(columns, rows) > 1
    scale[0, 0] = 0
    for shift, fixed in ((None, None), (offset, zero)):
        values = codes.Values(scale, shift, POINTS[kind])
        found, errors = codes.round_columns(x, U, values, fixed)
        wanted = torch.zeros(columns, rows, dtype=torch.float64)
        for c in range(
            columns
        ):  # with the errors that were found, so that one near tie does not change all that follows
            g = c // 16
            w = x[c].double() - U[:c, c].double() @ errors[:c].double() - (0 if shift is None else shift[g])
            wanted[c] = nearest(w * scale[g].double().reciprocal().where(scale[g] != 0, 0), POINTS[kind])
            wanted[c] *= (scale[g] != 0) & (True if fixed is None else ~fixed[c])
            torch.testing.assert_close(errors[c].double(), (w - found[c] * scale[g]) / U[c, c], rtol=1e-3, atol=1e-3)
        assert (found.double() == wanted).double().mean() > 0.99
        assert fixed is None or not found[fixed].any()
        assert not found[:16, 0].any()
        if columns <= 256:  # torch rounds more columns, and its sums depend on the number of threads
            assert_same_everywhere(path, (found, errors), codes.round_columns, x, U, values, fixed)


@pytest.mark.parametrize("kind", POINTS)
@pytest.mark.parametrize("rows", ROWS)
def test_codes_move_to_the_best_ones_and_the_loss_never_rises(path: str, kind: str, rows: int):
    columns, scale = 16, random(rows).abs() + 0.1
    A = random(columns, 64)
    gram, W = A @ A.t(), random(columns, rows) * scale * POINTS[kind][-1] / 2
    start = nearest(W / scale, POINTS[kind])
    free = (random(columns, rows) < 1).float()
    start *= free

    def moved() -> tuple[Tensor, Tensor]:
        found, change = start.clone(), torch.zeros_like(W)
        slope = gram @ (start * scale - W)
        codes.move_codes(found, slope, change, gram, codes.Values(scale, None, POINTS[kind]), free)
        return found, change

    def loss(code: Tensor) -> Tensor:
        D = (code * scale - W).double()
        return (D * (gram.double() @ D)).sum(0)

    found, change = moved()
    assert torch.isin(found[free > 0], torch.tensor(list(POINTS[kind])).float()).all()
    assert not found[free == 0].any()
    torch.testing.assert_close(change, (found - start) * scale, rtol=1e-4, atol=1e-4)
    assert (loss(found) <= loss(start) * (1 + 1e-5)).all()
    assert rows == 1 or float(loss(found).sum()) < float(loss(start).sum())
    assert_same_everywhere(path, (found, change), moved)


@pytest.mark.parametrize("name", ["q4_1", "q4_k", "q6_k", "iq4_nl", "int4/64"])
def test_a_weight_that_is_not_a_number_does_not_get_finite_scales(path: str, name: str):
    W = random(3, 256)
    W[1, 5] = torch.nan
    with pytest.raises(JobError, match="the scales are not finite"):
        nearest_codes(W, LayerStats(0, 0), grid_of(name))


def test_scales_next_to_nothing_give_code_zero_everywhere(path: str):
    scale = torch.tensor([[1e-31, 1e-42, 0.0]])
    found, errors = codes.round_columns(random(16, 3), torch.eye(16), codes.Values(scale, None, range(-4, 4)))
    assert not found.any()
    assert torch.isfinite(errors).all()


@pytest.mark.parametrize("dim", [4, 8])
@pytest.mark.parametrize(("vectors", "points"), [(0, 3), (1, 1), (17, 5), (1000, 256), (3, 1024)])
def test_the_closest_row_of_a_table_is_that_of_float64(path: str, dim: int, vectors: int, points: int):
    generator = torch.Generator().manual_seed(vectors + dim)
    x, table = (torch.randn(*shape, generator=generator) for shape in ((dim, vectors), (points, dim + 1)))
    found = codes.closest(x, table)
    values = table[:, :-1].double() @ x.double() + table[:, -1:].double()
    assert found.dtype == torch.int64
    torch.testing.assert_close(values.gather(0, found[None])[0], values.amax(0), rtol=1e-3, atol=1e-3)
    if path != "torch":
        assert (found == values.argmax(0)).float().mean() > 0.99 or not vectors
        with library.forced("portable"):
            assert torch.equal(codes.closest(x, table), found)
    assert torch.equal(codes.closest(x.t().contiguous().t(), table), found)
    assert torch.equal(codes.closest(x, table.double()), plain_codes.closest(x, table))
    with pytest.raises(ValueError, match="is no table for vectors of"):
        codes.closest(x, table[:, 1:])


def test_threads_find_the_same_rows(path: str):
    x, table = torch.randn(4, 3001), torch.randn(512, 5)
    alone = codes.closest(x, table)
    torch.set_num_threads(2)
    try:
        assert torch.equal(codes.closest(x, table), alone)
    finally:
        torch.set_num_threads(1)


def test_of_equal_rows_the_first_is_closest_and_nan_finds_some_row(path: str):
    x = torch.tensor([[1.0, torch.nan]]).expand(4, 2)
    found = codes.closest(x, torch.ones(5, 5))
    assert 0 <= int(found.min()) <= int(found.max()) < 5
    if path != "torch":
        assert found.tolist() == [0, 0]

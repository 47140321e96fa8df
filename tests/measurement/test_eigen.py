"""Eigenvalues of W^T W: within their bounds of the singular values, whatever the dtype, condition and layout."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_weights import gaussian, heavy
from torch import Tensor

from billhook.errors import BillhookError
from billhook.measurement import eigen
from billhook.measurement.eigen import _single, _smallest, eigenvalues, error_bound
from billhook.measurement.tails import Spectrum

seeds = st.integers(0, 10_000)


@settings(max_examples=60, deadline=None)
@given(
    seeds,
    st.integers(1, 60),
    st.integers(1, 200),
    st.sampled_from([gaussian, heavy]),
    st.sampled_from([1e-12, 1.0, 1e9]),
)
def test_gram_is_within_its_bound_of_svd(seed: int, rows: int, columns: int, kind: object, scale: float) -> None:
    W = kind(rows, columns, seed) * scale + scale  # type: ignore[operator]  # a common offset: one dominant direction
    exact, fast = eigenvalues(W, "svd"), eigenvalues(W, "gram")
    assert exact.dtype == fast.dtype == torch.float64
    assert exact.shape == fast.shape == (min(rows, columns),)
    assert float((exact - fast).abs().max()) <= error_bound((rows, columns), float(exact[-1]))
    for evals in (exact, fast):
        assert torch.cat([evals.new_zeros(1), evals]).diff().min() >= 0


@pytest.mark.gate
def test_gram_in_parts_equals_svd() -> None:
    """More rows than a panel, more columns than are converted at a time."""
    W = heavy(600, 2100).float()
    torch.testing.assert_close(eigenvalues(W, "gram"), eigenvalues(W, "svd"), rtol=1e-7, atol=0)


def with_singular_values(singular: Tensor) -> Tensor:
    size = len(singular)
    return torch.linalg.qr(gaussian(size, size)).Q * singular @ torch.linalg.qr(gaussian(size, size, 1)).Q


@pytest.mark.parametrize("doubtful", [1, 3, 20, 60])
def test_eigenvalues_lost_to_rounding_are_found_again(doubtful: int) -> None:
    """A few by inverse iteration, many by a singular value decomposition; the Gram matrix alone loses them."""
    singular = torch.cat(
        [
            torch.logspace(-9, -7, doubtful, dtype=torch.float64),
            torch.logspace(-5, 0, 200 - doubtful, dtype=torch.float64),
        ]
    )
    W = with_singular_values(singular)
    assert int((eigenvalues(W, "gram") == 0).sum()) >= min(doubtful, 3)
    assert _smallest(W, doubtful) is not None
    torch.testing.assert_close(eigenvalues(W).sqrt(), singular, rtol=1e-4, atol=0)


def test_well_conditioned_weights_need_no_more_than_the_gram_matrix() -> None:
    W = gaussian(30, 50)
    assert eigenvalues(W).equal(eigenvalues(W, "gram"))


@pytest.mark.parametrize("shape", [(400, 400), (300, 900), (900, 300)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float32_is_enough_for_alpha(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(eigen, "SINGLE", 300)
    W = heavy(*shape).to(dtype)
    exact, fast = eigenvalues(W.double(), "svd"), eigenvalues(W)
    assert not fast.equal(eigenvalues(W, "gram"))
    assert float((fast - exact).abs().max() / exact[-1]) < 1e-6
    torch.testing.assert_close(fast[0], exact[0], rtol=1e-4, atol=0)
    for cut in ("mid", "peak"):
        assert Spectrum(fast).fit(cut).alpha == pytest.approx(Spectrum(exact).fit(cut).alpha, rel=1e-4)


@pytest.mark.parametrize("smallest", [1e-8, 1e-6, 1e-4, 1e-2])
def test_the_smallest_eigenvalues_beside_a_float32_spectrum(smallest: float) -> None:
    """Below 1e-4 of the largest singular value the float32 Gram matrix does not know them at all."""
    singular = torch.cat(
        [torch.logspace(math.log10(smallest), -3.2, 6, dtype=torch.float64), torch.linspace(1e-2, 1, 194).double()]
    )
    W = with_singular_values(singular.sort().values).float()
    found, exact = _single(W), eigenvalues(W.double(), "svd")
    assert found is not None
    torch.testing.assert_close(found[0], exact[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[1:6], exact[1:6], rtol=5e-2, atol=0)


def test_weights_beyond_float32_are_computed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    W = heavy(120, 130).float()
    without_rows = W * (torch.arange(120) % 10 > 0)[:, None]
    steep = with_singular_values(torch.logspace(-6, 0, 120, dtype=torch.float64)).float()
    monkeypatch.setattr(eigen, "SINGLE", 100)
    for weight in (without_rows, steep, W * 0, W * 1e25, W * 1e-25, W.double()):
        if weight.dtype == torch.float32:
            assert _single(weight) is None
        assert eigenvalues(weight).equal(eigenvalues(weight.double()))
    with pytest.raises(BillhookError, match="NaN or inf"):
        eigenvalues(W / 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_eigenvalues_do_not_depend_on_dtype_and_layout(dtype: torch.dtype) -> None:
    W = heavy(20, 30).to(dtype)
    torch.testing.assert_close(eigenvalues(W), eigenvalues(W.double(), "svd"), rtol=1e-9, atol=0)
    torch.testing.assert_close(eigenvalues(W.T.contiguous().T), eigenvalues(W), rtol=1e-12, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how", ["auto", "gram", "svd"])
def test_weights_that_are_not_finite_are_refused(bad: float, how: str) -> None:
    W = gaussian(5, 7)
    W[2, 3] = bad
    with pytest.raises(BillhookError, match="NaN or inf"):
        eigenvalues(W, how)  # type: ignore[arg-type]


def test_squares_that_overflow_are_refused() -> None:
    with pytest.raises(BillhookError, match="overflow"):
        eigenvalues(gaussian(4, 4) * 1e200)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,), (2, 2, 2)])
def test_tensors_that_are_no_matrix_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BillhookError, match="matrix"):
        eigenvalues(torch.zeros(shape))

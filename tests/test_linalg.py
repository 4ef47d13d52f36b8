"""Eigenvalues, densities and trace estimators on dense matrices of known spectra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fpq_analysis import UserError
from fpq_analysis.linalg import (
    DenseMatrix,
    Lanczos,
    Sketch,
    deflated_hutchinson,
    eigenpairs,
    hutchinson,
    spectral_measure,
    xnystrace,
    xtrace,
)
from fpq_analysis.linalg.rows import PIECE, Basis, block_sums, inner, norms


def dice(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotated(eigenvalues: torch.Tensor, seed: int = 0) -> torch.Tensor:
    q, _ = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=dice(seed), dtype=torch.float64))
    a = (q * eigenvalues.double()) @ q.T
    return (a + a.T) / 2


class Mirrored:
    """H D H for a diagonal D and a reflection H: large, of known spectrum, with products in float32 and as noisy."""

    def __init__(self, eigenvalues: torch.Tensor, noise: float = 3e-7) -> None:
        self.d = eigenvalues.double()
        self.size = len(eigenvalues)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.noise, self.generator, self.n_products = noise, dice(7), 0
        u = torch.randn(self.size, generator=self.generator, dtype=torch.float64)
        self.u = u / u.norm()

    def exact(self, v: torch.Tensor) -> torch.Tensor:
        """In float64."""
        return self._mirror(self.d * self._mirror(v.double()))

    def products(self, v: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        self.n_products += len(v)
        y = self.exact(v)
        error = torch.randn(y.shape, generator=self.generator) / self.size**0.5
        y = (y + self.noise * y.norm(dim=1, keepdim=True) * error).float()
        return y if out is None else out.copy_(y)

    def _mirror(self, v: torch.Tensor) -> torch.Tensor:
        return v - 2 * (v @ self.u)[:, None] * self.u


ROWS = 100_000


def outliers() -> torch.Tensor:
    """Six eigenvalues that stand out from a bulk between -1 and 1."""
    bulk = 2 * torch.rand(ROWS - 6, generator=dice(3)) - 1
    return torch.cat([torch.tensor([39.0, 16.0, 12.0, 11.0, -30.0, -8.0]), bulk])


# --- Sums in float32 ---


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3 * PIECE), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=20)
def test_inner_products_of_rows(j, k, n, dtype):
    a, b = torch.randn(j, n, generator=dice(), dtype=dtype), torch.randn(k, n, generator=dice(1), dtype=dtype)
    bound = 2e-7 * n if dtype == torch.float32 else 1e-15 * n
    torch.testing.assert_close(inner(a, b), a.double() @ b.double().T, rtol=0, atol=bound)
    torch.testing.assert_close(norms(a), a.double().norm(dim=1), rtol=1e-6, atol=0)
    blocks = [slice(0, n // 2), slice(n // 2, n)]
    expected = torch.stack([(a[:1] * b[:1]).double()[:, block].sum(1) for block in blocks], 1)
    torch.testing.assert_close(block_sums(a[:1], b[:1], blocks), expected, rtol=0, atol=bound)


def test_long_sums_keep_the_accuracy_of_float32():
    """BLAS and `Tensor.norm` add up one by one: they are off by 2e-4 here, and by 2 % at eleven million."""
    v = torch.randn(3, 1_000_003, generator=dice())
    exact = v.double() @ v.double().T
    scale = float(exact.diagonal().mean())
    torch.testing.assert_close(inner(v, v), exact, rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(inner(v, v[:1]), exact[:, :1], rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(norms(v), exact.diagonal().sqrt(), rtol=1e-6, atol=0)


def test_a_vector_almost_inside_the_basis_comes_out_orthogonal():
    """All but a millionth is taken away, as of the residuals at the end of an eigenvalue problem."""
    v = torch.randn(6, ROWS, generator=dice())
    new = v[5:] / norms(v[5:]).to(v)
    basis = Basis(ROWS, v.dtype, v.device)
    basis.extend(v[:5])
    inside = torch.randn(1, 5, generator=dice(1)) @ basis.rows
    basis.extend(inside + 1e-5 * new)
    whole = basis.rows.double()
    torch.testing.assert_close(whole @ whole.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)


def test_room_for_rows_is_taken_by_bytes_and_grows():
    """Sixty-four rows of a large network do not fit on many devices before there are any."""
    long = Basis(2**28, torch.float32, torch.device("meta"))
    assert long.room().shape == (1, 2**28)
    assert long._memory.nbytes <= 2**31
    short = Basis(200, torch.float64, torch.device("cpu"), capacity=2, most=5)
    rooms = []
    for row in torch.randn(5, 1, 200, generator=dice(), dtype=torch.float64):
        short.extend(row.clone())
        rooms.append(len(short._memory))
    assert rooms == [2, 2, 4, 4, 5]
    torch.testing.assert_close(short.rows @ short.rows.T, torch.eye(5).double(), rtol=0, atol=1e-12)


# --- Eigenvalues ---


@pytest.mark.parametrize(("n", "seed", "which", "k"), [(33, 512, "LA", 2), (20, 444, "LM", 1), (32, 37, "LM", 2)])
def test_wanted_pairs_that_are_invariant_before_the_others_are_no_asymmetry(n, seed, which, k):
    """The fresh vector then is coupled to the others, which a symmetric matrix was refused for."""
    values = torch.randn(n, generator=dice(seed), dtype=torch.float64)
    found = eigenpairs(DenseMatrix(rotated(values, seed)), k, which=which, tol=1e-9, generator=dice())
    truth = values[(-values.abs() if which == "LM" else -values).argsort()][:k]
    torch.testing.assert_close(found.values, truth, rtol=1e-9, atol=0)


@given(st.integers(1, 40), st.integers(0, 1000), st.sampled_from(["LA", "SA", "LM"]), st.booleans(), st.data())
@settings(max_examples=60)
def test_eigenvalues_equal_the_dense_ones(n, seed, which, low_rank, data):
    k = data.draw(st.integers(1, min(n, 5)))
    values = torch.randn(n, generator=dice(seed), dtype=torch.float64)
    if low_rank:
        values[3:] = 0
    a = rotated(values, seed)
    matrix = DenseMatrix(a)
    found = eigenpairs(matrix, k, which=which, tol=1e-9, generator=dice())
    key = {"LA": -values, "SA": values, "LM": -values.abs()}[which]
    truth = values[key.argsort()][:k]
    if low_rank and which == "LM":
        found_values, truth = found.values.abs(), truth.abs()
    else:
        found_values = found.values
    torch.testing.assert_close(found_values, truth, rtol=1e-8, atol=1e-8)
    assert found.converged.all()
    assert found.n_products == matrix.n_products <= n + 1
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-10)
    true_residuals = (found.vectors @ a - found.values[:, None] * found.vectors).norm(dim=1)
    torch.testing.assert_close(found.residuals, true_residuals, rtol=1e-6, atol=1e-12)


def test_a_small_basis_restarts_and_finds_the_same():
    values = torch.cat([torch.tensor([10.0, 9.5, 9.0, -20.0]), torch.linspace(-1, 1, 300)])
    matrix = DenseMatrix(rotated(values))
    found = eigenpairs(matrix, 3, tol=1e-8, generator=dice(), max_basis=8)
    torch.testing.assert_close(found.values, torch.tensor([10, 9.5, 9]).double(), rtol=1e-10, atol=0)
    assert found.n_products > 8
    assert found.converged.all()


@pytest.mark.parametrize("max_basis", [None, 10])
@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_a_tight_tolerance_is_reached_in_float32(which, max_basis):
    """With bases that were orthonormal to 1e-4 alone, the residuals stood still at 1e-3 and then grew to 10."""
    matrix = Mirrored(outliers())
    k, truth = {"LA": (3, [39, 16, 12]), "SA": (2, [-30, -8]), "LM": (3, [39, -30, 16])}[which]
    found = eigenpairs(matrix, k, which=which, tol=1e-5, generator=dice(), n_products=60, max_basis=max_basis)
    assert found.converged.all()
    assert found.n_products == matrix.n_products
    # A Ritz value is as good as the square of its residual, but for the rounding of products.
    torch.testing.assert_close(found.values, torch.tensor(truth).double(), rtol=0, atol=40 * 1e-6)
    vectors = found.vectors.double()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(k).double(), rtol=0, atol=1e-6)
    rounding = 50 * torch.finfo(torch.float32).eps * 39
    true_residuals = (matrix.exact(vectors) - found.values[:, None] * vectors).norm(dim=1)
    torch.testing.assert_close(found.residuals, true_residuals, rtol=1e-3, atol=rounding / 4)
    assert (true_residuals <= torch.clamp(1e-5 * found.values.abs(), min=rounding)).all()


def test_further_products_in_float32_do_no_harm():
    """A tolerance out of reach costs some more products, and pairs as good as they can be come back."""
    found = eigenpairs(Mirrored(outliers()), 2, tol=1e-12, generator=dice(), n_products=40)
    torch.testing.assert_close(found.values, torch.tensor([39.0, 16.0]).double(), rtol=1e-6, atol=0)
    assert found.converged.all()  # within rounding


def test_too_few_products_say_so():
    found = eigenpairs(DenseMatrix(rotated(torch.linspace(0, 1, 200))), 4, tol=1e-8, generator=dice(), n_products=10)
    assert not found.converged.any()
    assert found.n_products == 10


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_what_stands_behind_a_zero_that_occurs_many_times_is_not_called_an_eigenvalue_there(which):
    """Lanczos sees one copy: the third smallest of this matrix was called 0.5, and converged."""
    truth = torch.cat([torch.tensor([-1.0]), torch.zeros(150), torch.tensor([0.5]), torch.linspace(1, 2, 60)]).double()
    found = eigenpairs(DenseMatrix(truth.diag()), 3, which=which, tol=1e-3, generator=torch.Generator().manual_seed(0))
    wanted = {"LA": truth.flip(0), "SA": truth, "LM": truth[(-truth.abs()).argsort()]}[which][:3]
    assert bool(found.converged[0])
    torch.testing.assert_close(found.values[found.converged], wanted[found.converged], rtol=1e-3, atol=1e-9)
    assert bool(found.converged.all()) or which == "SA"


def test_a_warm_start_saves_products_and_finds_the_same():
    values = torch.cat([torch.tensor([10.0, 8.0, 7.0, 6.5, 6.0]), torch.linspace(-1, 3, 300)])
    a = rotated(values)
    nudge = torch.randn(305, 305, generator=dice(5), dtype=torch.float64)
    before = eigenpairs(DenseMatrix(a), 5, generator=dice())
    b = a + 3e-4 * (nudge + nudge.T)
    cold = eigenpairs(DenseMatrix(b), 5, generator=dice())
    warm = eigenpairs(DenseMatrix(b), 5, generator=dice(), start=before.start)
    assert warm.n_products < cold.n_products
    assert (abs(warm.values - cold.values) <= warm.residuals + cold.residuals).all()


def test_a_warm_start_does_not_shut_out_a_new_direction():
    """The old top vectors stay exact eigenvectors, and a larger eigenvalue appears orthogonally to them."""
    values = torch.zeros(50)
    values[:3] = torch.tensor([5.0, 4.0, 3.0])
    a = rotated(values)
    before = eigenpairs(DenseMatrix(a), 3, generator=dice())
    new = torch.randn(50, generator=dice(9), dtype=torch.float64)
    new -= before.vectors.T @ (before.vectors @ new)
    b = a + 20 * torch.outer(new, new) / new.square().sum()
    after = eigenpairs(DenseMatrix(b), 3, generator=dice(), start=before.start)
    torch.testing.assert_close(after.values, torch.tensor([20, 5, 4]).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), "not symmetric"),
        (torch.full((2, 2), float("nan")), "not finite"),
    ],
)
def test_what_is_no_symmetric_matrix_is_refused(a, message):
    with pytest.raises(UserError, match=message):
        eigenpairs(DenseMatrix(a.double()), 2, generator=dice())
    with pytest.raises(UserError, match=message):
        spectral_measure(DenseMatrix(a.double()), generator=dice())


def test_a_zero_matrix_has_zero_eigenvalues():
    found = eigenpairs(DenseMatrix(torch.zeros(6, 6, dtype=torch.float64)), 2, generator=dice())
    assert found.values.abs().max() == 0
    assert found.converged.all()


@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=40)
def test_orthonormal_rows_span_what_was_given(n, m, k, seed):
    m = min(m, n)
    basis = Basis(n, torch.float64, torch.device("cpu"), capacity=1)
    given_rows = torch.randn(m, n, generator=dice(seed), dtype=torch.float64)
    basis.extend(given_rows.clone())
    v = torch.randn(k, n, generator=dice(seed + 1), dtype=torch.float64)
    v[k // 2 :] = v[:1]  # dependent rows
    r = basis.extend(v.clone())
    q = basis.rows
    torch.testing.assert_close(q @ q.T, torch.eye(len(q)).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(r.T @ q, v, rtol=0, atol=1e-12)
    if len(q) > 1:
        turn = torch.linalg.qr(torch.randn(len(q), len(q), generator=dice(seed), dtype=torch.float64))[0][:-1]
        wanted = turn @ q
        basis.keep(turn)
        torch.testing.assert_close(basis.rows, wanted, rtol=0, atol=1e-12)


# --- Density ---


def test_full_runs_of_lanczos_give_the_moments_to_their_error():
    values = torch.cat([torch.tensor([30.0, 12.0, -5.0]), 0.1 * torch.randn(197, generator=dice(1))]).double()
    inside = {1: 0, 2: 0}
    for seed in range(100):
        measure = spectral_measure(DenseMatrix(rotated(values)), generator=dice(seed), n_draws=10, n_steps=8)
        assert measure.n_products == 80
        np.testing.assert_allclose(measure.weights.sum(1), 1, rtol=1e-10)
        assert measure.moment(0)[0] == pytest.approx(200)
        for power in inside:
            value, sem = measure.moment(power)
            inside[power] += abs(value - float((values**power).sum())) < 1.96 * sem
    assert min(inside.values()) >= 88  # Binomial(100, 0.95): 87 or fewer has a probability of 0.2 %


def test_one_run_to_the_end_is_the_spectral_measure_of_its_vector():
    a = rotated(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    lanczos = Lanczos(DenseMatrix(a), start=torch.ones(4, dtype=torch.float64))
    lanczos.extend(10)
    nodes, weights = lanczos.quadrature()
    torch.testing.assert_close(nodes, torch.tensor([1.0, 2.0, 4.0, 8.0]).double())
    _, vectors = torch.linalg.eigh(a)
    torch.testing.assert_close(weights, (vectors.T @ torch.ones(4).double() / 2).square())


def test_lanczos_in_float32_is_as_good_as_in_float64():
    """The basis is orthonormal, and the largest node the largest eigenvalue, to the accuracy of float32."""
    lanczos = Lanczos(Mirrored(outliers()), generator=dice())
    lanczos.extend(25)
    q = lanczos.q.double()
    torch.testing.assert_close(q @ q.T, torch.eye(25).double(), rtol=0, atol=1e-6)
    nodes, weights = lanczos.quadrature()
    assert float(nodes[-1]) == pytest.approx(39, rel=1e-6)
    assert float(weights.sum()) == pytest.approx(1, rel=1e-10)


def test_the_smoothed_density_integrates_to_one_and_sees_the_outlier():
    values = torch.cat([torch.tensor([10.0]), torch.zeros(99)])
    measure = spectral_measure(DenseMatrix(rotated(values)), generator=dice(), n_draws=30, n_steps=10)
    grid = np.linspace(-3, 13, 4001)
    density, error = measure.density(grid, 0.2)
    assert np.trapezoid(density, grid) == pytest.approx(1, rel=1e-6)
    near = grid > 8
    assert np.trapezoid(density[near], grid[near]) == pytest.approx(0.01, abs=0.01)
    assert (error >= 0).all()
    alone = spectral_measure(DenseMatrix(rotated(values)), generator=dice(), n_draws=1, n_steps=10)
    assert np.isnan(alone.density(grid, 0.2)[1]).all()  # not known, which is not none


# --- Traces ---

SPECTRA = {
    "fast": 0.8 ** torch.arange(100),
    "flat": torch.linspace(0.5, 1.5, 100),
    "negative": torch.where(torch.arange(100) % 4 == 0, 1.0, -1.5) / (1 + torch.arange(100)).sqrt(),
    "cancelling": torch.where(torch.arange(100) % 2 == 0, 1.06, -1.0) / (1 + torch.arange(100) // 2),
}


def estimate(method: str, a: torch.Tensor, seed: int, tol: float | None):
    matrix, blocks = DenseMatrix(a), [slice(0, 30), slice(30, len(a))]
    common = {"generator": dice(seed), "tol": tol, "max_products": 3000}
    if method == "hutchinson":
        found = hutchinson(matrix, blocks, n_products=40, **common)
    elif method == "deflated":
        found = deflated_hutchinson(matrix, blocks, Lanczos(matrix, generator=common["generator"]), **common)
    elif method == "hutch++":
        found = deflated_hutchinson(matrix, blocks, Sketch(matrix, generator=common["generator"]), **common)
    else:
        found = (xtrace if method == "xtrace" else xnystrace)(matrix, blocks, **common)
    assert found.n_products == matrix.n_products
    assert float(found.blocks.sum()) == pytest.approx(found.value, rel=1e-8, abs=1e-9)
    return found


@pytest.mark.simulation
@pytest.mark.parametrize("tol", [None, 0.1], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("spectrum", list(SPECTRA))
@pytest.mark.parametrize("method", ["hutchinson", "deflated", "hutch++", "xtrace", "xnystrace"])
def test_stated_intervals_hold_the_truth(method, spectrum, tol):
    values = SPECTRA[spectrum].double()
    if method == "xnystrace" and values.min() < 0:
        pytest.skip("for positive semidefinite matrices")
    if spectrum == "cancelling" and tol:
        tol = 0.5  # of a trace that is 3 % of the sum of the eigenvalues' magnitudes
    a, truth = rotated(values, 1), float(values.sum())
    found = [estimate(method, a, seed, tol) for seed in range(200)]
    covered = sum(abs(e.value - truth) <= e.half_width() + 1e-9 for e in found) / 200
    low, high = stats.binom.interval(0.998, 200, 0.95)  # a thousandth on either side, for each of 36 cases
    assert low <= 200 * covered <= high, covered
    assert tol is None or all(e.converged and e.sem <= tol * abs(e.value) for e in found)


@pytest.mark.parametrize("method", ["deflated", "hutch++", "xtrace", "xnystrace"])
def test_a_matrix_of_low_rank_is_exact(method):
    """More vectors than the matrix has dimensions: XTrace counted some twice, and missed by six standard errors."""
    values = torch.zeros(80, dtype=torch.float64)
    values[:21] = torch.linspace(1, 5, 21)
    found = estimate(method, rotated(values), 0, 1e-6)
    assert found.value == pytest.approx(float(values.sum()), rel=1e-6)


def test_hutchinson_on_a_known_matrix():
    """Mean and spread in closed form: the variance of a probe is twice the squared norm of the off-diagonal part."""
    a = rotated(torch.randn(40, generator=dice()))
    found = hutchinson(DenseMatrix(a), [slice(0, 10), slice(10, 40)], generator=dice(), n_products=20_000)
    spread = float((2 * (a - a.diagonal().diag()).square().sum()).sqrt())
    assert found.sem * 20_000**0.5 == pytest.approx(spread, rel=0.03)
    for value, sem, block in zip(found.blocks, found.block_sems, (slice(0, 10), slice(10, 40)), strict=True):
        assert abs(float(value - a.diagonal()[block].sum())) < 4 * float(sem)

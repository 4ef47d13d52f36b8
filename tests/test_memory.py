"""Where memory runs out, micro-batches, kept graphs and bases become smaller, and the answer stays."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fpq_analysis import UserError, hessian_eigs, hessian_trace, spectral_density
from fpq_analysis.curvature import HessianOperator
from fpq_analysis.errors import NoMemoryError, explained
from fpq_analysis.linalg import eigs, rows
from fpq_analysis.linalg.eigs import eigenpairs
from fpq_analysis.linalg.hutchinson import deflated_hutchinson
from fpq_analysis.linalg.hutchpp import Sketch
from fpq_analysis.linalg.lanczos import Lanczos
from fpq_analysis.linalg.matrix import DenseMatrix
from fpq_analysis.linalg.rows import Basis
from fpq_analysis.linalg.slq import spectral_measure
from tests.nets import tiny
from tests.test_operator import Hungry

OUT = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"


@pytest.fixture
def room(monkeypatch):
    """Set the most rows that memory holds."""

    def limit(most, kept=lambda: 0):
        plain = Basis._empty

        def empty(self, rows):
            if rows > most - kept():
                raise RuntimeError(OUT)
            return plain(self, rows)

        monkeypatch.setattr(Basis, "_empty", empty)

    return limit


def dense(n=60):
    """A matrix whose spectrum decays as that of a network, with a negative end."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    values = torch.cat([0.8 ** torch.arange(n - 2, dtype=torch.float64), torch.tensor([-0.3, -0.1]).double()])
    return DenseMatrix(q @ values.diag() @ q.T), values


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
@pytest.mark.parametrize("most", [9, 14, 30])
def test_eigenvalues_come_from_as_many_vectors_as_there_is_room_for(which, most, room):
    matrix, values = dense()
    k = 4 if which != "SA" else 2
    order = {"LA": -values, "SA": values, "LM": -values.abs()}[which].argsort()
    room(most)
    found = eigenpairs(matrix, k, which=which, tol=1e-8, generator=torch.Generator().manual_seed(0))
    assert bool(found.converged.all())
    torch.testing.assert_close(found.values, values[order[:k]], rtol=1e-8, atol=1e-8)


def test_a_basis_that_is_too_small_is_an_error_in_words(room):
    matrix, _ = dense()
    room(7)
    with pytest.raises(UserError, match=r"no memory for more than \d vectors of 60 numbers"):
        eigenpairs(matrix, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=r"no memory for more than \d vectors"):
        spectral_measure(matrix, generator=torch.Generator().manual_seed(0), n_steps=20)
    room(0)
    with pytest.raises(UserError, match="no memory for more than 0 vectors"):
        Lanczos(matrix, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [Lanczos, Sketch])
@pytest.mark.parametrize("tol", [None, 0.05])
def test_traces_deflate_as_many_vectors_as_there_is_room_for(kind, tol, room):
    matrix, values = dense()
    room(6)
    generator = torch.Generator().manual_seed(0)
    found = deflated_hutchinson(
        matrix, [slice(0, 60)], kind(matrix, generator=generator), generator=generator, n_products=400, tol=tol
    )
    assert abs(found.value - float(values.sum())) < 5 * found.sem
    assert tol is None or found.converged


def network():
    torch.manual_seed(0)
    model = tiny(4).double().eval()
    return model, (torch.randn(12, 1, 8, 8, dtype=torch.float64), torch.randint(4, (12,)))


def test_kept_graphs_give_way_to_the_basis(room):
    model, data = network()
    operator = HessianOperator(model, F.cross_entropy, [data], dict(model.named_parameters()))
    truth = eigenpairs(operator, 3, tol=1e-8, generator=torch.Generator().manual_seed(0)).values
    assert operator.graph_bytes > 0
    room(30, kept=lambda: 22 if operator.graph_bytes else 0)
    found = eigenpairs(operator, 3, tol=1e-8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.values, truth, rtol=1e-7, atol=1e-10)
    assert operator.graph_bytes == 0
    assert not operator.release()


def test_measurements_give_the_same_with_little_memory(room, monkeypatch):
    model, data = network()
    monkeypatch.setattr(eigs, "GUARDS", 1)
    wanted = hessian_eigs(model, data, 2, tol=1e-7).values
    trace = hessian_trace(model, data, method="exact").value
    room(16)
    hungry = Hungry(3).double().eval()
    hungry.body = model
    found = hessian_eigs(hungry, data, 2, tol=1e-7).values
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), rtol=1e-7, atol=1e-9)
    assert hessian_trace(hungry, data, method="exact").value == pytest.approx(trace, rel=1e-10)
    with pytest.raises(UserError, match="no memory for more than"):
        spectral_density(model, data, n_draws=1, n_steps=20)


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_the_basis_gives_way_to_the_products(which, monkeypatch):
    matrix, values = dense()
    wanted = values.sort(descending=which == "LA").values[:2]
    sizes = []

    def products(v, out=None):
        if len(found_basis[-1]._memory) > 14:  # and no memory is left
            raise NoMemoryError("There is not enough memory for a single sample.")
        sizes.append(len(found_basis[-1]))
        return DenseMatrix.products(matrix, v, out)

    found_basis = []
    plain = Basis.__init__
    monkeypatch.setattr(
        Basis, "__init__", lambda self, *args, **how: found_basis.append(self) or plain(self, *args, **how)
    )
    monkeypatch.setattr(rows, "FIRST_CAPACITY", 8)
    monkeypatch.setattr(matrix, "products", products)
    found = eigenpairs(matrix, 2, which=which, tol=1e-8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.values, wanted, rtol=1e-8, atol=1e-8)
    assert max(sizes) <= 14


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_eigenvectors_are_made_in_the_basis_where_there_is_no_other_room(which, monkeypatch):
    matrix, _ = dense()

    def find():
        return eigenpairs(matrix, 3, which=which, tol=1e-8, generator=torch.Generator().manual_seed(0))

    wanted, calls = find(), []

    def combined(coefficients, basis):
        calls.append(len(coefficients))
        if len(calls) == 1:
            raise RuntimeError(OUT)
        return rows.combined(coefficients, basis)

    monkeypatch.setattr("fpq_analysis.linalg.eigs.combined", combined)
    found = find()
    assert calls == [3, 1]
    torch.testing.assert_close(found.values, wanted.values)
    torch.testing.assert_close(found.vectors, wanted.vectors, rtol=0, atol=1e-12)


def test_a_lack_of_memory_is_no_fault_of_the_program():
    for error in (RuntimeError(OUT), MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert "out of memory. Measure on fewer" in str(explained(error))
    assert "fault of the program" in str(explained(ValueError("cannot allocate memory for x")))

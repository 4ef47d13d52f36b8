"""Every loss of the table, and a user's own, against autograd and the dense Hessian in float64."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fpq_analysis import QuantSpec, UserError, calibrate, hessian_trace, noise_response, quantize, sharpness
from fpq_analysis.curvature import GaussNewtonOperator, HessianOperator
from fpq_analysis.doctor import diagnose
from fpq_analysis.errors import UnfitError
from fpq_analysis.losses import LOSSES, Loss, check_factor, check_mean, draw_uniforms, resolve_loss
from tests.nets import networks, tiny


def huber(outputs, targets):
    return F.huber_loss(outputs, targets, reduction="none").sum(1)


def huber_factor(outputs, targets):
    """The identity where the error is below one, nothing elsewhere: it does depend on the targets."""
    inside = ((outputs - targets).abs() < 1).to(outputs)
    return torch.diag_embed(inside).movedim(1, 0)


HUBER = Loss("huber", huber, huber_factor)
ALL = {**LOSSES, "huber": HUBER}
every_loss = pytest.mark.parametrize("loss", ALL.values(), ids=ALL)


def targets_for(loss, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if loss.name == "cross_entropy":
        return torch.randint(outputs.shape[1], (len(outputs),), generator=generator)
    return 2 * torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)


def problem(loss, b=5, c=4, seed=0):
    z = 2 * torch.randn(b, c, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return z, targets_for(loss, z, seed)


def at_outputs(loss, z, y):
    """(B, C, C) Hessians by autograd."""
    pairs = zip(z.split(1), y.split(1), strict=True)
    hessian = torch.autograd.functional.hessian
    return torch.stack([hessian(lambda z, y=y: loss.per_sample(z, y)[0], z)[0, :, 0] for z, y in pairs])


@every_loss
@given(c=st.integers(1, 7), seed=st.integers(0, 1000))
@settings(max_examples=20)
def test_the_factor_is_that_of_the_hessian_in_the_outputs(loss, c, seed):
    z, y = problem(loss, c=c, seed=seed)
    columns = loss.output_factor(z, y)
    assert columns.shape[1:] == z.shape
    torch.testing.assert_close(torch.einsum("kbc,kbd->bcd", columns, columns), at_outputs(loss, z, y))
    check_factor(loss, z, y)


@every_loss
def test_drawn_vectors_have_it_as_their_second_moment(loss):
    z, y = problem(loss, b=2)
    uniforms = draw_uniforms(2, 40_000, torch.Generator().manual_seed(0))
    drawn = loss.drawn_factor(z, y, uniforms)
    found = torch.einsum("mbc,mbd->bcd", drawn, drawn) / len(drawn)
    truth = at_outputs(loss, z, y)
    assert (found - truth).abs().max() < 0.02 * truth.abs().max()
    lengths = drawn.norm(dim=2)
    assert (lengths.std(0) < 1e-6 * lengths.mean(0) + 1e-12).all()  # all of one length, for the least variance


@every_loss
def test_it_is_the_mean_of_its_samples(loss):
    z, y = problem(loss)
    torch.testing.assert_close(check_mean(loss, z, y), loss.sample_losses(z, y))
    torch.testing.assert_close(loss(z, y), loss.sample_losses(z, y).mean())
    assert loss.sample_losses(z.float(), y).dtype == torch.float64
    if loss.equivalents[0]:
        torch.testing.assert_close(loss(z, y), loss.equivalents[0](z, y))
    assert pickle.loads(pickle.dumps(loss)).name == loss.name


@every_loss
@given(made=networks())
@settings(max_examples=15)
def test_the_exact_trace_is_that_of_the_dense_hessian(loss, made):
    model, x, _ = made
    y = targets_for(loss, model(x))
    found = hessian_trace(model, (x, y), loss=loss, method="exact", micro_batch=3)
    dense = HessianOperator(model, loss, [(x, y)], dict(model.named_parameters())).dense()
    torch.testing.assert_close(found.value, float(dense.trace()), rtol=1e-10, atol=1e-12)
    assert found.sem == 0


@every_loss
def test_drawn_traces_are_about_the_exact_one(loss):
    model = tiny(3).double().eval()
    x = torch.randn(12, 1, 8, 8, dtype=torch.float64)
    y = targets_for(loss, model(x))
    exact = hessian_trace(model, (x, y), loss=loss)
    drawn = hessian_trace(model, (x, y), loss=loss, method="sampled", n_labels=400)
    assert exact.method == "exact"
    assert abs(drawn.value - exact.value) < 5 * drawn.sem + 1e-12
    assert drawn.sem < 0.1 * exact.value


@every_loss
def test_what_asks_for_the_curvature_of_the_loss(loss):
    """The probes that go by sample, on any loss with a factor."""
    torch.manual_seed(0)
    model = quantize(tiny(3).double(), QuantSpec.parse("W4A4"))
    x = torch.rand(6, 1, 8, 8, dtype=torch.float64)
    calibrate(model, x, "mse")
    y = targets_for(loss, model(x))
    frame = sharpness(model, (x, y), loss=loss, n_draws=2, n_flips=2).frame()
    assert set(frame.loc[frame["quantity"] == "scaled_trace", "estimator"]) == {"exact"}
    frame = noise_response(model, (x, y), loss=loss, n_draws=2).frame()
    traces = frame[frame["quantity"] == "trace"]
    assert set(traces["estimator"]) == {"exact"}
    assert "linear_1" in set(frame["quantity"])


@every_loss
def test_fisher(loss):
    model, x = nn.Linear(6, 3).double(), torch.randn(8, 6, dtype=torch.float64)
    y = targets_for(loss, model(x))
    if loss.draw is None:
        with pytest.raises(UserError, match="no labels to draw"):
            hessian_trace(model, (x, y), loss=loss, operator="fisher")
        return
    found = hessian_trace(model, (x, y), loss=loss, operator="fisher", method="hutchinson", n_products=50)
    truth = GaussNewtonOperator(model, loss, [(x, y)], dict(model.named_parameters())).dense().trace()
    assert 0.2 * truth < found.value < 5 * truth


def test_pytorchs_own_are_recognised_with_their_defaults_only():
    for loss in LOSSES.values():
        function, module = loss.equivalents
        assert all(resolve_loss(form) is loss for form in (loss.name, loss, function, module()))
    for other in (nn.CrossEntropyLoss(label_smoothing=0.1), nn.MSELoss(reduction="sum"), F.l1_loss, lambda z, y: z):
        found = resolve_loss(other)
        assert found.output_factor is None
        assert found.mean is other
    assert resolve_loss(F.l1_loss).name == "torch.nn.functional:l1_loss"
    with pytest.raises(UserError, match="did you mean 'squared_error'"):
        resolve_loss("square_error")


def test_a_regression():
    """One output for each input; and a shape that PyTorch would broadcast, to something else, is refused."""
    model, x, y = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(9, 6), torch.randn(9, 1)
    found = hessian_trace(model, (x, y), loss=nn.MSELoss())
    assert (found.method, found.n_products) == ("exact", 1)
    with pytest.raises(UserError, match="a target for each output"):
        hessian_trace(model, (x, y[:, 0]), loss="squared_error")
    with pytest.raises(UserError, match="a target for each output"):
        hessian_trace(model, (x, y > 0), loss="squared_error")


WRONG = {
    "fails": replace(HUBER, output_factor=lambda z, y: 1 / 0),
    "gives a NoneType": replace(HUBER, output_factor=lambda z, y: None),
    "not one of its Hessian": replace(HUBER, output_factor=lambda z, y: 2 * huber_factor(z, y)),
    "of type torch.complex128": replace(HUBER, output_factor=lambda z, y: huber_factor(z, y).to(torch.complex128)),
    "of shape": replace(HUBER, output_factor=lambda z, y: huber_factor(z, y)[0]),
    "mean of its samples": replace(HUBER, per_sample=lambda z, y: huber(z - z.mean(0), y), output_factor=None),
    "one number for each sample": replace(HUBER, per_sample=lambda z, y: F.huber_loss(z, y, reduction="none")),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_loss_that_is_not_what_it_says_is_refused(said):
    model, x, y = nn.Linear(6, 3), torch.randn(9, 6), torch.randn(9, 3)
    with pytest.raises(UserError, match=said):
        hessian_trace(model, (x, y), loss=WRONG[said])


def test_a_factor_that_is_wrong_for_one_sample_of_many_is_refused():
    model, x, y = nn.Linear(6, 3), torch.randn(40, 6), torch.randn(40, 3)
    y[11] = 0
    wrong = replace(HUBER, output_factor=lambda z, y: huber_factor(z, y) * (1 + (y == 0).all(1))[:, None])
    with pytest.raises(UserError, match="not one of its Hessian"):
        hessian_trace(model, (x, y), loss=wrong)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_a_saturated_loss_is_not_called_wrong(scale):
    """Where the Hessian in the outputs is all rounding error there is nothing to compare."""
    own = replace(LOSSES["cross_entropy"], name="own", check=None)
    check_factor(own, scale * torch.randn(8, 3), torch.arange(8) % 3)


def test_the_doctor_says_what_has_no_closed_form():
    model, x, y = nn.Linear(6, 3).eval(), torch.randn(9, 6), torch.randn(9, 3)
    rows = {loss: diagnose(model, (x, y), loss=loss).set_index("check") for loss in (HUBER, F.l1_loss)}
    assert rows[HUBER].loc["exact trace", "status"] == "ok"
    assert "not known in closed form" in rows[F.l1_loss].loc["exact trace", "finding"]
    with pytest.raises(UnfitError, match="whole-number"):
        LOSSES["cross_entropy"].check(torch.randn(9, 3), y)

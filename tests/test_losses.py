"""Every loss of the table, and a user's own, against autograd and the dense Hessian in float64."""

from __future__ import annotations

import pickle
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from fpq_analysis import (
    HessianTrace,
    QuantSpec,
    UserError,
    calibrate,
    hessian_trace,
    measure,
    noise_response,
    quantize,
    sharpness,
)
from fpq_analysis.cli import app
from fpq_analysis.curvature import FisherOperator, GaussNewtonOperator, HessianOperator, exact_traces, sampled_traces
from fpq_analysis.doctor import diagnose
from fpq_analysis.errors import UnfitError
from fpq_analysis.intervals import half_interval
from fpq_analysis.losses import (
    LOSSES,
    Loss,
    binary_cross_entropy,
    by_sample,
    check_factor,
    check_mean,
    combined,
    cross_entropy,
    distillation,
    draw_uniforms,
    resolve_loss,
    tokens,
    weighted,
)
from fpq_analysis.nests import joined, mapped, split
from fpq_analysis.quantizers import variables, view
from fpq_analysis.records.queries import totals
from tests.nets import dense_hessian, networks, tiny
from tests.words import words


def huber(outputs, targets):
    return F.huber_loss(outputs, targets, reduction="none").sum(1)


def huber_factor(outputs, targets):
    """The identity where the error is below one, nothing elsewhere: it does depend on the targets."""
    inside = ((outputs - targets).abs() < 1).to(outputs)
    return torch.diag_embed(inside).movedim(1, 0)


HUBER = Loss("huber", huber, huber_factor)
TOKENS = ("causal_lm", "token_classification")  # their outputs are (B, T, V)
ALL = {**{name: loss for name, loss in LOSSES.items() if name not in TOKENS}, "huber": HUBER}
PYTORCHS = {
    "cross_entropy": F.cross_entropy,
    "squared_error": F.mse_loss,
    "binary_cross_entropy": F.binary_cross_entropy_with_logits,
}
every_loss = pytest.mark.parametrize("loss", ALL.values(), ids=ALL)


def targets_for(loss, outputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if loss.name == "cross_entropy":
        return torch.randint(outputs.shape[1], (len(outputs),), generator=generator)
    if loss.name == "binary_cross_entropy":
        return torch.rand(outputs.shape, generator=generator, dtype=outputs.dtype)
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
    whole = torch.cat(list(loss.factors(z, y)))
    assert len(whole) == loss.n_factors(z, y)
    torch.testing.assert_close(torch.einsum("kbc,kbd->bcd", whole, whole), at_outputs(loss, z, y))
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
    if loss.name in PYTORCHS:
        torch.testing.assert_close(loss(z, y), PYTORCHS[loss.name](z, y))
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


def test_pytorchs_own_are_recognised_with_their_settings():
    modules = {"cross_entropy": nn.CrossEntropyLoss, "squared_error": nn.MSELoss}
    for name, module in {**modules, "binary_cross_entropy": nn.BCEWithLogitsLoss}.items():
        loss = LOSSES[name]
        found = [resolve_loss(form) for form in (loss, name, PYTORCHS[name], module(), partial(PYTORCHS[name]))]
        assert {one.name for one in found} == {name}
        assert all(one.output_factor is not None for one in found)
    w = torch.tensor([0.5, 1.0, 2.0])
    for form in (nn.CrossEntropyLoss(w, label_smoothing=0.1), partial(F.cross_entropy, weight=w, label_smoothing=0.1)):
        assert resolve_loss(form).name == "cross_entropy(weight=[0.5,1,2], label_smoothing=0.1)"
    assert resolve_loss(nn.CrossEntropyLoss(ignore_index=255)).name == "cross_entropy(ignore_index=255)"
    assert resolve_loss(nn.BCEWithLogitsLoss(pos_weight=w)).name == "binary_cross_entropy(pos_weight=[0.5,1,2])"
    assert resolve_loss("torch.nn.functional:mse_loss") is LOSSES["squared_error"]
    for other in (
        nn.MSELoss(reduction="sum"),
        F.l1_loss,
        lambda z, y: z,
        nn.BCEWithLogitsLoss(weight=torch.ones(2, 3)),
    ):
        found = resolve_loss(other)
        assert found.output_factor is None
        assert found.mean is other
    assert resolve_loss(F.l1_loss).name == "torch.nn.functional:l1_loss"


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("square_error", "did you mean 'squared_error'"),
        ("no.such:loss", "Cannot import the loss"),
        ("torch.nn:NoLoss", "Cannot import the loss"),
        (3, "The loss is a int"),
        (torch.nn.CrossEntropyLoss(torch.tensor([1.0, -1.0])), "none below zero"),
        (partial(F.cross_entropy, label_smoothing=2.0), "a share"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss, said):
    with pytest.raises(UserError, match=said):
        resolve_loss(loss)


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


def test_the_page_does_what_it_says(capsys):
    """`docs/losses.md`: its code runs by itself, and prints the numbers in its comments."""
    page = Path(__file__).parent.parent.joinpath("docs", "losses.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for block in blocks:
        assert len(block.splitlines()) < 40
        exec(compile(block, "docs/losses.md", "exec"), {"__name__": "page"})
        assert capsys.readouterr().out.splitlines() == re.findall(r"^# (.*)$", block, re.MULTILINE)
    assert len(blocks) == 3
    table = page.partition("## Which mean")[0]
    assert all(f"`{name}`" in table for name in LOSSES)


# --- Positions, weights, sums: against PyTorch's loss of all data in one batch ---

B, C, S = 5, 3, (3, 2)
W = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)


def segmenter():
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, C, (2, 1), padding=(1, 0))).double()


class Tagger(nn.Module):
    """Tokens (B, T, 4) to logits (B, T, V)."""

    def __init__(self):
        super().__init__()
        self.first, self.mix, self.head = nn.Linear(4, 3), nn.Conv1d(3, 3, 3, padding=1), nn.Linear(3, C)

    def forward(self, x):
        h = torch.relu(self.first(x)).transpose(1, 2)
        return self.head(torch.relu(self.mix(h)).transpose(1, 2))


def masked(generator, shape, ignored=-100):
    """Classes, of which about a third is ignored, all of one sample's among them."""
    y = torch.randint(C, shape, generator=generator)
    y[torch.rand(shape, generator=generator) < 0.35] = ignored
    y[1] = ignored
    y[0].view(-1)[-1] = 1
    return y


def softened(z, t):
    return F.kl_div((z / 3).log_softmax(1), (t / 3).softmax(1), reduction="none").sum(1).mean() * 9


def shifted(z, y):
    return F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten())


def own_means(z, y):
    sums = F.cross_entropy(z, y, reduction="none").flatten(1).sum(1)
    return (sums / (y >= 0).flatten(1).sum(1)).mean()


def weighed(z, y):
    sums = F.cross_entropy(z, y[0], reduction="none").flatten(1).sum(1)
    return (y[1] * sums).sum() / (y[1] * (y[0] >= 0).flatten(1).sum(1)).sum()


# Of ours, of what makes targets of a generator, and PyTorch's of all data.
CE = F.cross_entropy
DENSE = {
    "pixels": (LOSSES["cross_entropy"], lambda g: torch.randint(C, (B, *S), generator=g), CE),
    "ignored": (nn.CrossEntropyLoss(), lambda g: masked(g, (B, *S)), CE),
    "another ignored": (
        nn.CrossEntropyLoss(ignore_index=1),
        lambda g: masked(g, (B, *S), 1),
        partial(CE, ignore_index=1),
    ),
    "weights": (nn.CrossEntropyLoss(W), lambda g: masked(g, (B, *S)), partial(CE, weight=W)),
    "smoothed": (
        nn.CrossEntropyLoss(W, label_smoothing=0.2),
        lambda g: masked(g, (B, *S)),
        partial(CE, weight=W, label_smoothing=0.2),
    ),
    "a class without weight": (
        nn.CrossEntropyLoss(W * (W > 0.5), label_smoothing=0.2),
        lambda g: masked(g, (B, *S)),
        partial(CE, weight=W * (W > 0.5), label_smoothing=0.2),
    ),
    "soft": (LOSSES["cross_entropy"], lambda g: torch.randn(B, C, *S, generator=g).double().softmax(1), CE),
    "soft, weights, smoothed": (
        cross_entropy(W, label_smoothing=0.2),
        lambda g: torch.randn(B, C, *S, generator=g).double().softmax(1),
        partial(CE, weight=W, label_smoothing=0.2),
    ),
    "by sample": (
        by_sample(cross_entropy()),
        lambda g: masked(g, (B, *S)).index_fill(0, torch.tensor([1]), 2),
        own_means,
    ),
    "labels": (
        binary_cross_entropy(),
        lambda g: torch.randint(2, (B, C, *S), generator=g),
        lambda z, y: F.binary_cross_entropy_with_logits(z, y.double()),
    ),
    "labels, weights": (
        nn.BCEWithLogitsLoss(weight=W[:2], pos_weight=W[1:]),
        lambda g: torch.rand(B, C, *S, generator=g),
        partial(F.binary_cross_entropy_with_logits, weight=W[:2], pos_weight=W[1:]),
    ),
    "squares": (nn.MSELoss(), lambda g: torch.randn(B, C, *S, generator=g).double(), F.mse_loss),
    "distillation": (distillation(3.0), lambda g: torch.randn(B, C, *S, generator=g).double(), softened),
    "sum": (
        combined((0.3, cross_entropy(W)), (0.7, distillation(3.0)), (2.0, LOSSES["squared_error"])),
        lambda g: (masked(g, (B, *S)), *torch.randn(2, B, C, *S, generator=g).double()),
        lambda z, y: 0.3 * CE(z, y[0], W) + 0.7 * softened(z, y[1]) + 2 * F.mse_loss(z, y[2]),
    ),
    "weighted samples": (
        weighted(cross_entropy()),
        lambda g: (masked(g, (B, *S)), torch.rand(B, generator=g).double()),
        weighed,
    ),
    "tokens": (LOSSES["token_classification"], lambda g: masked(g, (B, 4)), lambda z, y: CE(z.movedim(2, 1), y)),
    "causal": (tokens(shift=True), lambda g: masked(g, (B, 4)), shifted),
}
every_form = pytest.mark.parametrize("form", DENSE)


def dense_problem(form, seed):
    torch.manual_seed(seed)
    ours, targets, theirs = DENSE[form]
    generator = torch.Generator().manual_seed(seed)
    of_tokens = form in ("tokens", "causal")
    model = Tagger().double() if of_tokens else segmenter()
    x = torch.randn(B, 4, 4) if of_tokens else torch.randn(B, 2, 2, 2)
    return model, x.double(), targets(generator), ours, theirs


@every_form
@given(seed=st.integers(0, 1000), micro=st.integers(1, 5))
@settings(max_examples=3)
def test_the_exact_trace_of_positions_is_that_of_all_data_in_one_batch(form, seed, micro):
    model, x, y, ours, theirs = dense_problem(form, seed)
    found = hessian_trace(model, [(x, y)], loss=ours, method="exact", micro_batch=micro)
    truth = float(dense_hessian(model, list(model.parameters()), x, y, theirs).trace())
    assert found.value == pytest.approx(truth, rel=1e-10)
    assert found.loss == pytest.approx(float(theirs(model(x), y).detach()))
    assert found.per_sample.mean() == pytest.approx(found.value)
    assert sum(found.per_layer.values()) == pytest.approx(found.value)


@every_form
def test_the_factor_of_positions(form):
    model, x, y, ours, _ = dense_problem(form, 0)
    loss = resolve_loss(ours).for_targets([y])
    z = model(x).detach()
    check_factor(loss, z, y)
    assert pickle.loads(pickle.dumps(loss)).name == loss.name
    whole = torch.cat(list(loss.factors(z, y))).flatten(2)
    assert len(whole) == loss.n_factors(z[:1], mapped(lambda t: t[:1], y))
    truth = torch.einsum("kbc,kbd->bcd", whole, whole)
    drawn = loss.drawn_factor(z, y, draw_uniforms(B, 8_000, torch.Generator().manual_seed(1))).flatten(2)
    found = torch.einsum("mbc,mbd->bcd", drawn, drawn) / len(drawn)
    assert (found - truth).abs().max() < 0.1 * truth.abs().max()


@every_form
def test_draws_do_not_depend_on_micro_batches(form):
    model, x, y, ours, _ = dense_problem(form, 0)
    one, other = (hessian_trace(model, [(x, y)], loss=ours, method="sampled", micro_batch=m) for m in (2, 5))
    assert one.value == pytest.approx(other.value, rel=1e-12)


@pytest.mark.simulation
@pytest.mark.parametrize("form", ["weights", "labels", "sum", "causal"])
def test_intervals_of_drawn_traces_cover(form):
    model, x, y, ours, _ = dense_problem(form, 3)
    data, parameters = [joined([(x, y)] * 6)], dict(model.named_parameters())
    loss = resolve_loss(ours)
    truth = exact_traces(model, loss, data, parameters).value()
    hits = 0
    for seed in range(200):
        found = sampled_traces(model, loss, data, parameters, generator=torch.Generator().manual_seed(seed))
        hits += abs(found.value() - truth) <= half_interval(found.sem(), 6 * B * 3)
    assert 0.92 <= hits / 200 <= 0.98


def test_the_operator_is_that_of_all_data_too():
    model, x, y, ours, theirs = dense_problem("weights", 0)
    batches = split((x, y), 2)
    parameters = dict(model.named_parameters())
    truth = dense_hessian(model, list(model.parameters()), x, y, theirs)
    torch.testing.assert_close(HessianOperator(model, resolve_loss(ours), batches, parameters).dense(), truth)


@pytest.mark.parametrize("form", ["weights", "labels", "causal"])
def test_the_fisher_matrix_of_positions_is_that_of_drawn_labels(form):
    model, x, y, ours, _ = dense_problem(form, 0)
    loss, of = resolve_loss(ours), (split((x, y), 2), dict(model.named_parameters()))
    truth = GaussNewtonOperator(model, loss, *of).dense()
    found = FisherOperator(model, loss, *of, n_labels=300).dense()
    assert (found - truth).norm() < 0.2 * truth.norm()


# --- The Gauss-Newton trace, which needs no second derivative ---


class Transformer(nn.Module):
    """A small one: an embedding that is the head too, positions, attention, LayerNorm."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(C, 4), nn.Parameter(torch.randn(5, 4))
        self.block = nn.TransformerEncoderLayer(4, 2, 5, activation="gelu", dropout=0.0, batch_first=True)

    def forward(self, tokens):
        h = self.embedding(tokens) + self.positions[: tokens.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=h.dtype)
        return self.block(h, src_mask=mask) @ self.embedding.weight.T


def outside(kind):
    torch.manual_seed(2)
    if kind == "transformer":
        tokens = torch.randint(C, (B, 4))
        return Transformer().double(), tokens, tokens.clone().index_fill(0, torch.tensor([1]), -100), "causal_lm"
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(12, C)).double()
    return model, torch.randn(B, 2, 3, 3).double(), torch.randint(C, (B,)), "cross_entropy"


@pytest.mark.parametrize("kind", ["transformer", "smooth"])
def test_the_gauss_newton_trace_of_any_network(kind):
    model, x, y, loss = outside(kind)
    truth = GaussNewtonOperator(model, resolve_loss(loss), [(x, y)], dict(model.named_parameters())).dense().trace()
    exact, drawn = (
        hessian_trace(model, (x, y), loss=loss, operator="gauss-newton", method=method, n_labels=200, micro_batch=2)
        for method in ("exact", "sampled")
    )
    assert exact.value == pytest.approx(float(truth), rel=1e-10)
    assert sum(exact.per_layer.values()) == pytest.approx(exact.value)
    assert abs(drawn.value - exact.value) < 4 * drawn.sem
    assert exact.sem == 0 < exact.sem_data
    by_itself = hessian_trace(model, (x, y), loss=loss, operator="gauss-newton")
    assert by_itself.method == "exact"
    assert "squared gradients" in by_itself.reason
    assert hessian_trace(model, (x, y), loss=loss, n_products=2).method == "deflated"  # the Hessian's


@pytest.mark.parametrize("definition", ["dequantized", "latent", "float"])
def test_the_gauss_newton_trace_of_a_quantized_network(definition):
    model, x, y, _ = outside("smooth")
    model = quantize(model, QuantSpec.parse("W4A4", edge_bits=4))
    calibrate(model, x, "mse")
    found = hessian_trace(model, (x, y), definition=definition, operator="gauss-newton")
    seen = view(model, definition)
    truth = GaussNewtonOperator(seen, LOSSES["cross_entropy"], [(x, y)], variables(seen)).dense().trace()
    assert found.method == "exact"
    assert found.value == pytest.approx(float(truth), rel=1e-9)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.EmbeddingBag(5, 4), nn.Linear(4, C)

    def forward(self, x):
        return self.head(self.first(x).tanh())


def test_a_network_without_second_derivatives_has_a_number():
    torch.manual_seed(0)
    model, x, y = Fused().double(), torch.randint(5, (B, 3)), torch.randint(C, (B,))
    with pytest.raises(UserError, match="embedding_bag.*operator='gauss-newton'"):
        hessian_trace(model, (x, y))
    found = hessian_trace(model, (x, y), operator="gauss-newton")
    assert found.method == "exact"
    rows = torch.stack([row for one, _ in zip(x, y, strict=True) for row in jacobian(model, one[None])])
    z = model(x).detach()
    columns = torch.cat(list(LOSSES["cross_entropy"].factors(z, y)))
    truth = torch.einsum("kbc,bcp->kbp", columns, rows.view(B, C, -1)).square().sum() / B
    assert found.value == pytest.approx(float(truth), rel=1e-10)


def jacobian(model, x):
    gradients = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in model(x)[0]]
    return [torch.cat([g.flatten() for g in row]) for row in gradients]


def test_a_tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=7, n_positions=6, n_embd=4, n_layer=1, n_head=2, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).double().eval()
    tokens = torch.randint(7, (4, 5))
    labels = tokens.masked_fill(torch.rand(4, 5) < 0.3, -100)
    data = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}
    theirs = model(**data).loss
    found = hessian_trace(model, data, loss="causal_lm", operator="gauss-newton", method="exact")
    assert found.loss == pytest.approx(float(theirs.detach()))
    drawn = hessian_trace(model, data, loss="causal_lm", operator="gauss-newton", n_labels=40)
    assert drawn.method == "sampled"
    assert abs(drawn.value - found.value) < 5 * drawn.sem


def test_checkpoints_are_measured_with_a_loss_that_is_named(tiny_runs, tmp_path):
    runs = shutil.copytree(tiny_runs, tmp_path / "runs")
    common = {"n_data": 16, "epochs": "last", "model": "tests.nets:tiny"}
    frame = measure(runs / "fp", HessianTrace(), loss="tests.nets:SMOOTHED", **common)
    assert set(frame["loss"]) == {"tests.nets:SMOOTHED"}
    rows = totals(frame)
    assert set(rows["estimator"]) == {"exact"}
    plain = measure(runs / "fp", HessianTrace(), **common)
    losses = [float(one.loc[one["quantity"] == "loss", "value"].iloc[0]) for one in (frame, plain)]
    assert abs(losses[0] - losses[1]) > 1e-3
    where = ["--ckpt-dir", runs / "fp", "--n-data", 16, "--epochs", "last", "--model", common["model"], "--dry-run"]
    for loss, said in (("tests.nets:SMOOTHED", "1 done, 0 to do"), ("squared_eror", "did you mean 'squared_error'")):
        result = CliRunner().invoke(app, ["hessian", "--loss", loss, *map(str, where)])
        assert said in words(result.output)


def test_an_error_over_the_data_knows_what_it_is_divided_by():
    """Samples of one curvature a position have a mean without an error, however many positions count in each."""
    model, x = nn.Conv1d(1, 2, 1, bias=False).double(), torch.ones(40, 1, 6, dtype=torch.float64)
    y = torch.zeros(40, 6, dtype=torch.long)
    for n in range(40):
        y[n, : n % 6] = -100
    assert hessian_trace(model, (x, y), method="exact").sem_data < 1e-12
    by_sample_itself = hessian_trace(model, (x, y), loss=by_sample(cross_entropy()), method="exact")
    assert by_sample_itself.sem_data < 1e-12


def one_class():
    return torch.zeros(B, *S, dtype=torch.long)


REFUSED = {
    "one a sample or position": (cross_entropy(), lambda: torch.zeros(B, 4, dtype=torch.long)),
    "2 weights for 3 classes": (cross_entropy(W[:2]), one_class),
    "No target counts": (cross_entropy(), lambda: torch.full((B, *S), -100)),
    "no position that counts": (by_sample(cross_entropy()), lambda: masked(torch.Generator(), (B, *S))),
    "one weight for each sample": (weighted(cross_entropy()), one_class),
    "not below zero": (weighted(cross_entropy()), lambda: (one_class(), torch.tensor([1.0, 2, 3, 4, -1]))),
    "the teacher's logits": (distillation(), lambda: torch.zeros(B, *S)),
    "hold NaN": (distillation(), lambda: torch.full((B, C, *S), torch.nan)),
    "a label from 0 to 1": (binary_cross_entropy(), lambda: torch.full((B, C, *S), 2.0)),
    "pos_weight has 3 numbers": (binary_cross_entropy(W), lambda: torch.zeros(B, C, *S)),
    "wants targets for each": (combined((1.0, cross_entropy()), (1.0, distillation())), one_class),
    "tokens wants logits": ("causal_lm", lambda: torch.zeros(B, 2, dtype=torch.long)),
}


@pytest.mark.parametrize("said", REFUSED)
def test_targets_that_do_not_fit_are_refused(said):
    loss, targets = REFUSED[said]
    with pytest.raises(UserError, match=said):
        hessian_trace(segmenter(), [(torch.randn(B, 2, 2, 2).double(), targets())], loss=loss)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: by_sample(LOSSES["squared_error"]), "a mean over samples as it is"),
        (lambda: weighted(combined((1.0, cross_entropy()))), "weigh the losses"),
        (lambda: combined((-1.0, cross_entropy())), "below zero"),
        (combined, "wants terms"),
        (lambda: distillation(0.0), "above zero"),
    ],
)
def test_losses_that_cannot_be_made(make, said):
    with pytest.raises(UserError, match=said):
        make()


@pytest.mark.parametrize(
    ("outputs", "targets", "cure"),
    [
        ((4, 3), torch.tensor([1, 2, 3, 1]), "y - 1"),
        ((4, 3), torch.tensor([0, 2, 7, 1]), "have the same classes"),
        ((4, 3), torch.tensor([0.0, 2.0, 1.0, 1.0]), "y.long()"),
        ((4,), torch.tensor([0.0, 2.0, 1.0, 1.0]), "squared_error"),
        ((4, 3), torch.eye(3, dtype=torch.long)[[0, 1, 2, 0]], "y.argmax(1)"),
        ((4, 3), torch.tensor([[0], [1], [2], [0]]), "y.squeeze(1)"),
        ((4, 7, 3), torch.zeros(4, 7, dtype=torch.long), "causal_lm"),
        ((4, 3), torch.zeros(4, 9, dtype=torch.long), "number of each sample's class"),
    ],
)
def test_what_to_do_about_targets_that_do_not_fit(outputs, targets, cure):
    with pytest.raises(UnfitError) as caught:
        cross_entropy().check(torch.zeros(outputs), targets)
    assert cure in caught.value.cure


def test_targets_that_are_broadcast_are_named():
    def squares(outputs, targets):
        return (outputs - targets).square().mean()

    with pytest.raises(UnfitError, match=r"\(8, 1\), and targets \(8,\), of which .* different samples"):
        check_mean(squares, torch.randn(8, 1), torch.randn(8))

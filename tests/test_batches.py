"""Batches of any form and networks of any call: the same numbers to the bit, and a word where one is not understood."""

from __future__ import annotations

import dataclasses
import functools
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fpq_analysis import (
    QuantSpec,
    UserError,
    calibrate,
    feature_drift,
    feature_statistics,
    gradient_norms,
    hessian_eigs,
    hessian_trace,
    landscape,
    noise_response,
    output_variance,
    quantize,
    sharpness,
    spectral_density,
)
from fpq_analysis.batch import as_batch
from fpq_analysis.compat.pyhessian import hessian as Hessian
from fpq_analysis.curvature import HessianOperator, as_batches, check_samples_apart
from fpq_analysis.curvature.batches import merged
from fpq_analysis.doctor import diagnose, forecast_measurements
from fpq_analysis.forward import Forward, with_forward
from fpq_analysis.losses import resolve_loss
from fpq_analysis.losses.cross_entropy import CROSS_ENTROPY
from fpq_analysis.nests import alike, device_of, joined, leaves, mapped, moved, named_leaves, size, split, take
from fpq_analysis.quantizers import view
from tests.nets import dense_hessian, tiny

X, Y = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(12) % 10


@dataclasses.dataclass
class Outputs:
    logits: torch.Tensor
    hidden: torch.Tensor
    loss: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Inputs:
    image: torch.Tensor
    shown: bool = True


Named = namedtuple("Named", ["image"])


class Renamed(nn.Sequential):
    """The network under another signature, with outputs as `form` makes them."""

    def __init__(self, *layers, form=lambda z, h: z):
        super().__init__(*layers)
        self.form = form

    def forward(self, image, other=None, shown=True):
        if isinstance(image, Inputs):
            image = image.image
        hidden = image
        for layer in list(self)[:-1]:
            hidden = layer(hidden)
        return self.form(self[-1](hidden), hidden)


def net(form=None, quantized=True):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()]
    model = Renamed(*layers, nn.Linear(144, 10), form=form or (lambda z, h: z)).eval()
    if quantized:
        model = quantize(model, QuantSpec.parse("W4A4"))
        calibrate(model, X, "minmax")
    return model.eval()


ROUTES = {
    "tuple": ((X,), None),
    "list": ([X, None], None),
    "namedtuple": (Named(X), None),
    "dict": ({"image": X}, None),
    "mapping": (UserDict(image=X, other=None, shown=True), None),
    "dataclass": (Inputs(X), None),
    "array": (X.numpy(), None),
    "nested": ({"all": (X, Y)}, lambda model, inputs: model(inputs["all"][0])),
    "by a function": ({"image": X, "index": Y}, lambda model, inputs: model(inputs["image"])),
}
FORMS = {
    "dict": lambda z, h: {"hidden": h, "logits": z},
    "only one": lambda z, h: {"out": z, "cache": None},
    "dataclass": lambda z, h: Outputs(z, h),
    "tuple": lambda z, h: (z, "a word"),
}
MEASURES = {
    "trace": functools.partial(hessian_trace, method="exact"),
    "latent": functools.partial(hessian_trace, definition="latent"),
    "sampled": functools.partial(hessian_trace, method="sampled", tol=0.3),
    "deflated": functools.partial(hessian_trace, method="deflated", n_products=8),
    "fisher": functools.partial(hessian_trace, operator="fisher", n_products=8),
    "eigs": functools.partial(hessian_eigs, k=1, tol=0.1),
    "density": functools.partial(spectral_density, n_draws=1, n_steps=4),
    "sharpness": functools.partial(sharpness, n_draws=2, n_flips=2),
    "gradnorm": functools.partial(gradient_norms, n_draws=2, batch_size=5),
    "noise": functools.partial(noise_response, n_draws=2),
    "variance": functools.partial(output_variance, n_draws=3),
    "features": feature_statistics,
    "landscape": functools.partial(landscape, points=3, dim=1),
    "drift": lambda model, batches, **options: feature_drift(model, net(), batches, **options),
}


def rows(found):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in found.rows()]


@functools.cache
def expected(measure):
    return repr(rows(MEASURES[measure](net(), (X, Y))))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("measure", ["trace", "deflated", "variance"])
def test_every_route_of_the_inputs_gives_the_same_bits(measure, route):
    inputs, forward = ROUTES[route]
    found = MEASURES[measure](net(), [(inputs, Y)], forward=forward)
    assert repr(rows(found)) == expected(measure)


@pytest.mark.parametrize("measure", MEASURES)
def test_every_measurement_takes_a_dict_and_gives_the_same_bits(measure):
    model = net(FORMS["dataclass"])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    batch = {"image": X, "index": Y, "labels": Y}
    found = MEASURES[measure](model, batch, forward=lambda model, inputs: model(inputs["image"]))
    assert repr(rows(found)) == expected(measure)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_outputs_gives_the_same_bits(form):
    assert repr(rows(hessian_trace(net(FORMS[form]), (X, Y), method="exact"))) == expected("trace")


@pytest.mark.parametrize("labels", ["labels", "label", "targets", "target"])
def test_a_batch_may_be_a_mapping_with_its_targets(labels):
    found = hessian_trace(net(), [{"image": X[:5], labels: Y[:5]}, UserDict({labels: Y[5:], "image": X[5:]})])
    assert found.value == pytest.approx(hessian_trace(net(), (X, Y)).value, rel=1e-5)


def test_a_batch_may_be_a_dataclass_with_its_targets():
    Batch = dataclasses.make_dataclass("Batch", ["image", "labels"])  # noqa: N806
    assert repr(rows(hessian_trace(net(), Batch(X, Y), method="exact"))) == expected("trace")


def test_doctor_and_pyhessian_s_class_take_them_too():
    batch = ({"image": X}, Y)
    plain, other = diagnose(net(), (X, Y)), diagnose(net(FORMS["dict"]), batch)
    assert (plain["status"] == other["status"]).all()
    assert len(forecast_measurements(net(FORMS["dict"]), batch)) == 4
    one, two = (
        Hessian(net(form), F.cross_entropy, data=data) for form, data in ((None, (X, Y)), (FORMS["dict"], batch))
    )
    assert one.trace() == two.trace()
    assert all(torch.equal(a, b) for a, b in zip(one.gradsH, two.gradsH, strict=True))


def test_a_network_that_is_a_single_layer_keeps_its_names():
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    x, y = torch.randn(9, 6), torch.arange(9) % 3
    plain = hessian_trace(layer, (x, y))
    for inputs, forward in (((x,), None), ({"a": x}, lambda model, inputs: model(inputs["a"]))):
        found = hessian_trace(layer, [(inputs, y)], forward=forward)
        assert found.per_layer == plain.per_layer
        assert found.method == plain.method == "exact"
    rows_of = [sharpness(layer, data, n_draws=2).rows() for data in ((x, y), [((x,), y)])]
    assert repr(rows_of[0]) == repr(rows_of[1])


def test_the_wrapped_network_is_the_network():
    model = net()
    wrapped = with_forward(view(model, "latent"))
    assert isinstance(wrapped, Forward)
    assert with_forward(wrapped) is wrapped
    for kind in ("named_modules", "named_parameters", "named_buffers"):
        assert [name for name, _ in getattr(wrapped, kind)()] == [name for name, _ in getattr(model, kind)()]
    assert list(wrapped.state_dict()) == list(model.state_dict())
    assert wrapped.get_submodule("0") is wrapped.network[0]
    twin = view(wrapped, "dequantized").double()
    assert {p.dtype for p in twin.parameters()} == {torch.float64} == {twin.network[0].weight.dtype}
    assert twin(X.double()).dtype == torch.float64
    assert wrapped(X).dtype == torch.float32
    assert wrapped.train().network.training
    assert not wrapped.eval().network[1].training
    values = {"6.bias": torch.ones(10)}
    found = torch.func.functional_call(wrapped, values, (X,))
    assert torch.allclose(found, model(X) - model[6].bias + 1, atol=1e-5)


class Sentences(nn.Module):
    """Sequences of any length, to the mean over those places that the mask counts."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x, mask):
        return {"logits": self.head((self.first(x).relu() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))}


def sentences(length, n, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(1, length + 1, (n, 1), generator=generator)
    return {
        "x": torch.randn(n, length, 2, generator=generator),
        "mask": mask.double(),
        "labels": torch.randint(3, (n,), generator=generator),
    }


def test_batches_of_several_lengths_equal_the_dense_hessian():
    torch.manual_seed(0)
    model = Sentences().double()
    batches = [sentences(5, 4, 1), sentences(3, 6, 2), sentences(5, 2, 3)]
    blocks = []
    for batch in batches:
        z = model(batch["x"].double(), batch["mask"])["logits"]
        own = list(model.parameters())
        slope = torch.cat(
            [g.flatten() for g in torch.autograd.grad(F.cross_entropy(z, batch["labels"]), own, create_graph=True)]
        )
        found = [torch.autograd.grad(g, own, retain_graph=True, materialize_grads=True) for g in slope]
        blocks.append(torch.stack([torch.cat([h.flatten() for h in row]) for row in found]) * len(z) / 12)
    dense = sum(blocks)
    assert hessian_trace(model, batches, method="exact").value == pytest.approx(float(dense.trace()), rel=1e-10)
    top = float(torch.linalg.eigvalsh(dense)[-1])
    assert hessian_eigs(model, batches, k=1, tol=1e-10).values[0] == pytest.approx(top, rel=1e-8)
    drawn = [hessian_trace(model, batches, method="sampled", tol=0.05, seed=seed) for seed in range(20)]
    far = [abs(one.value - float(dense.trace())) / one.sem for one in drawn if one.sem > 0]
    assert sum(gap > 3 for gap in far) <= 2


class Segmenting(nn.Module):
    """A class a pixel, of an image and a map beside it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 1)

    def forward(self, image, depth):
        return {"out": self.head((self.first(image) + self.second(depth)).relu())}


class Regression(nn.Module):
    """Two numbers of two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 4), nn.Linear(2, 4), nn.Linear(4, 2)

    def forward(self, left, right):
        return self.head((self.a(left) + self.b(right)).relu())


@pytest.mark.parametrize("case", ["segmentation", "regression"])
def test_segmentation_and_regression_equal_the_dense_hessian(case):
    torch.manual_seed(0)
    double = {"dtype": torch.float64}
    if case == "segmentation":
        model, loss = Segmenting().double(), "cross_entropy"
        inputs = {"image": torch.randn(4, 1, 4, 4, **double), "depth": torch.randn(4, 2, 4, 4, **double)}
        targets = torch.randint(3, (4, 4, 4))
    else:
        model, loss = Regression().double(), "squared_error"
        inputs = torch.randn(6, 3, **double), torch.randn(6, 2, **double)
        targets = torch.randn(6, 2, **double)
    wrapped = with_forward(model)
    dense = dense_hessian(wrapped, list(model.parameters()), inputs, targets, resolve_loss(loss))
    found = hessian_trace(model, [(inputs, targets)], loss=loss, method="exact", micro_batch=2)
    assert found.value == pytest.approx(float(dense.trace()), rel=1e-10)
    top = float(torch.linalg.eigvalsh(dense)[-1])
    assert hessian_eigs(model, [(inputs, targets)], k=1, loss=loss, tol=1e-10).values[0] == pytest.approx(top, rel=1e-8)


def test_samples_that_mix_are_found_in_any_field():
    class Mixing(nn.Linear):
        def forward(self, a, b):
            return super().forward(a) + b.mean(0)

    batches = as_batches([({"a": torch.randn(8, 3), "b": torch.randn(8, 2)}, torch.zeros(8).long())])
    with pytest.raises(UserError, match="depends on the others"):
        check_samples_apart(with_forward(Mixing(3, 2)), batches)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([(X, Y, Y)], "a tuple of 3 parts"),
        ([X], "a Tensor"),
        (X, "The data are a Tensor"),
        (3, "The data are a int"),
        ("data", r"The data are a str\. Data are"),
        (X.numpy(), r"The data are a ndarray\. Data are"),
        (torch.utils.data.TensorDataset, r"The data are a type\. Data are"),
        ([(X.to_sparse(), Y)], "inputs of a batch is a tensor of layout sparse_coo, and must be dense"),
        ([{"image": X, "label": Y, "labels": Y}], r"several \(labels, label\)"),
        ([{"image": X, "answer": Y}], "'image', 'answer'"),
        ([{"labels": Y}], "no inputs"),
        ([(X, Y[:5])], "12 inputs and 5 targets"),
        ([({"a": X, "b": Y[:5]}, Y)], r"5 samples in inputs\['b'\]"),
        ([({"a": X, "words": ["x"] * 12}, Y)], r"inputs\['words'\]\[0\] of a batch is a str"),
        ([({"a": X, "n": 3}, Y)], r"inputs\['n'\] of a batch is a int"),
        ([({"a": X, "n": torch.tensor(3)}, Y)], r"inputs\['n'\] of a batch is a single number"),
        ([(X, list(range(12)))], r"targets\[0\] of a batch is a int"),
        ([(X, None)], "The targets of a batch hold no tensor"),
        ([(np.array(["a", "b"]), Y[:2])], "inputs of a batch is a ndarray of type <U1"),
        (((X[:6], Y[:6]), (X[6:], Y[6:])), "single batch"),
        (({"a": X, "labels": Y}, {"a": X, "labels": Y}), "single batch"),
        (torch.utils.data.TensorDataset(X, Y), "DataLoader"),
        ([], "no data"),
        (iter([]), "no data"),
        ([(X[:0], Y[:0])], "no data"),
    ],
)
def test_what_is_no_batch_is_named(batches, said):
    with pytest.raises(UserError, match=said):
        as_batches(batches)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (lambda z, h: (z, h), r"gives a tuple.*0 \(12x10\), 1 \(12x144\).*forward="),
        (lambda z, h: {"out": z, "aux": h}, r"gives a dict.*out \(12x10\), aux"),
        (lambda z, h: None, "gives a NoneType.*no tensor"),
        (lambda z, h: {"loss": z.mean(), "score": z}, r"loss \(a number\)"),
    ],
)
def test_outputs_that_are_not_understood_are_named(form, said):
    with pytest.raises(UserError, match=said):
        hessian_trace(net(form), (X, Y), micro_batch=12)
    assert diagnose(net(form), (X, Y))["status"].iloc[-1] != "ok"


def test_a_field_that_the_model_does_not_take_is_named():
    with pytest.raises(UserError, match=r"\['index'\].*unexpected keyword argument 'index'.*forward="):
        hessian_trace(net(), {"image": X, "index": Y, "labels": Y})


def test_a_function_that_fails_or_is_none_is_told():
    batch = {"image": X, "labels": Y}
    with pytest.raises(UserError, match=r"cannot be run on these inputs.*KeyError: 'picture'"):
        hessian_trace(net(), batch, forward=lambda model, inputs: model(inputs["picture"]))
    with pytest.raises(UserError, match="ZeroDivisionError"):
        hessian_trace(net(), batch, forward=lambda model, inputs: 1 / 0)
    with pytest.raises(UserError, match="forward is a int; give a function"):
        hessian_trace(net(), batch, forward=3)
    with pytest.raises(UserError, match="names no forward function"):
        hessian_trace(net(), batch, forward="image")
    assert hessian_trace(net(), batch, forward="fpq_analysis.forward:call", method="exact").n_data == 12


def test_inputs_that_want_gradients_are_data_all_the_same():
    found = hessian_trace(net(), (X.clone().requires_grad_(), Y))
    assert found.method == "exact"
    assert found.value == hessian_trace(net(), (X, Y)).value


def test_samples_of_several_shapes_have_no_common_statistics():
    torch.manual_seed(0)
    one, other = (
        nn.Sequential(nn.BatchNorm1d(1), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(1, 3)) for _ in "ab"
    )
    batches = [(torch.randn(4, 1, n), torch.arange(4) % 3) for n in (5, 7)]
    with pytest.raises(UserError, match="samples of several shapes make none"):
        landscape(one, batches, plane="checkpoints", dim=1, points=3, auxiliary=[other], batchnorm="re-estimate")


def test_noise_is_for_the_one_input_of_real_numbers():
    x = torch.rand(4, 3)
    for inputs, said in ((x.long(), "torch.int64"), ((x, x), "several")):
        with pytest.raises(UserError, match=f"exactly one input of real numbers.*{said}"):
            output_variance(tiny(), [(inputs, Y[:4])])


@st.composite
def nests(draw, n=5):
    def grow(depth):
        kind = draw(st.sampled_from(["tensor", "tuple", "list", "dict", "none"] if depth else ["tensor"]))
        if kind == "tensor":
            return torch.rand(n, *draw(st.lists(st.integers(1, 3), max_size=2)))
        if kind == "none":
            return None
        parts = [grow(depth - 1) for _ in range(draw(st.integers(1, 3)))]
        return {"tuple": tuple, "list": list, "dict": lambda parts: dict(enumerate(parts))}[kind](parts)

    return (grow(0), grow(3))


@settings(max_examples=50, deadline=None)
@given(nests(), st.integers(1, 7))
def test_what_is_split_is_joined_again(nest, most):
    parts = split(nest, most)
    assert [size(part) for part in parts] == [min(most, 5 - start) for start in range(0, 5, most)]
    whole = joined(parts)
    assert [name for name, _ in named_leaves(whole)] == [name for name, _ in named_leaves(nest)]
    assert all(torch.equal(a, b) for a, b in zip(leaves(whole), leaves(nest), strict=True))
    assert alike(parts[0], nest)
    assert all(torch.equal(a, b[2:4]) for a, b in zip(leaves(take(nest, slice(2, 4))), leaves(nest), strict=True))
    assert {t.dtype for t in leaves(moved(nest, device_of(nest), torch.float64))} == {torch.float64}
    assert merged([(part, None) for part in parts], 5)[0][1] is None
    assert mapped(len, nest)[0] == 5


def test_neighbours_are_merged_where_they_are_alike():
    batches = as_batches([sentences(5, 4, 1), sentences(5, 4, 1), sentences(3, 4, 2)], 2)
    assert [size(batch) for batch in merged(batches)] == [8, 4]
    assert not alike(as_batch(sentences(5, 4, 1)), as_batch(sentences(3, 4, 1)))


def test_memory_that_runs_out_halves_any_nest(monkeypatch):
    model = net(quantized=False)
    batches = [({"image": X}, Y)]
    whole = HessianOperator(with_forward(model), CROSS_ENTROPY, batches, dict(model.named_parameters()))
    v = torch.ones(whole.size)
    product = whole.matvec(v)
    asked = []

    def small(self, batch):
        asked.append(size(batch))
        if size(batch) > 3:
            raise torch.OutOfMemoryError
        return HessianOperator._graph(self, batch)

    halved = HessianOperator(with_forward(model), CROSS_ENTROPY, batches, dict(model.named_parameters()))
    monkeypatch.setattr(halved, "_graph", functools.partial(small, halved))
    assert torch.allclose(halved.matvec(v), product, rtol=1e-4, atol=1e-6)
    assert asked == [12, 6, 3, 3, 3, 3]

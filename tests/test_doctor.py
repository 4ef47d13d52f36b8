"""Each illness is named, and its cure works."""

from __future__ import annotations

import copy
import json
import shutil

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner

from fpq_analysis import QuantSpec, UserError, calibrate, quantize
from fpq_analysis.cli import app
from fpq_analysis.doctor import COLUMNS, advice, diagnose, forecast_measurements, forecast_workers
from fpq_analysis.doctor.functions import check_functions
from fpq_analysis.doctor.model_under_test import prepare, same_random_state
from fpq_analysis.doctor.workers import WORKERS_COLUMNS
from tests.nets import FunctionalGelu, Tied, tiny
from tests.words import words

IMAGES, LABELS = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 10
VECTORS, CLASSES = torch.randn(12, 6, generator=torch.Generator().manual_seed(2)), torch.arange(12) % 3


def findings(model, x=VECTORS, y=CLASSES, **options):
    frame = diagnose(model, (x, y), **options)
    assert list(frame.columns) == COLUMNS
    assert set(frame["status"]) <= {"ok", "note", "fault"}
    assert frame.loc[frame["status"] == "fault", "cure"].ne("").all()
    assert frame["finding"].str.endswith(".").all()
    return frame.set_index("check")


def faults(frame):
    return list(frame.index[frame["status"] == "fault"])


def around(middle):
    """A small network with `middle` in it."""
    return nn.Sequential(nn.Linear(6, 5), middle, nn.Linear(5, 3)).eval()


class Asymmetric(torch.autograd.Function):
    """Its backward, a smooth field, is the gradient of nothing."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 + x.roll(1, -1) ** 2)


class Forgetful(torch.autograd.Function):
    """The right first derivative, from numbers that autograd does not see."""

    @staticmethod
    def forward(ctx, x):
        ctx.slope = 2 * x.detach()
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.slope


class Once(torch.autograd.Function):
    """`once_differentiable` raises in `backward()`; `autograd.grad` towards parameters goes past it, and gets zero."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * x


class Refuses(Once):
    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("first derivatives only")
        return grad * 2 * ctx.saved_tensors[0]


class Round(torch.autograd.Function):
    """A straight-through estimator: nothing wrong with it."""

    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, grad):
        return grad


class Clipped(torch.autograd.Function):
    """A straight-through estimator for seven steps up and down, of which the largest weight is often on the last."""

    @staticmethod
    def forward(ctx, w, step):
        ctx.save_for_backward(w, step)
        return (w / step).round().clamp(-7, 7) * step

    @staticmethod
    def backward(ctx, grad):
        w, step = ctx.saved_tensors
        return grad * ((w / step).abs() <= 7), None


class Quantized(nn.Linear):
    """With its largest weight on the edge that gradients pass, and half of them near it."""

    def forward(self, x):
        edge = self.weight.abs().max().detach()
        return F.linear(x, Clipped.apply(self.weight, edge / 7))


class Square(torch.autograd.Function):
    """Correct, in the newer form with `setup_context`."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * x


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function.apply  # a reference taken early, as many do

    def forward(self, x):
        return self.function(x)


class Reentrant(nn.Module):
    """The older form of activation checkpointing, which takes no part in `autograd.grad`."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(checkpoint(self.body, x.clone().requires_grad_(), use_reentrant=True))


class Attention(nn.Module):
    """A transformer block over (N, T, 8) sequences."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(x).mean(1))


def test_a_healthy_network():
    frame = findings(tiny().eval(), IMAGES, LABELS)
    assert (frame["status"] == "ok").all(), frame
    assert (frame["cure"] == "").all()


def test_a_healthy_quantized_network():
    model = quantize(tiny(), QuantSpec.parse("W4A4"))
    calibrate(model, IMAGES, "mse")
    frame = findings(model.eval(), IMAGES, LABELS)
    assert (frame["status"] == "ok").all(), frame
    assert "8 quantizers are calibrated" in frame.loc["quantizers", "finding"]


def test_nothing_is_left_changed():
    model = around(nn.Sequential(Apply(Asymmetric), nn.Dropout(0.5), nn.BatchNorm1d(5))).train()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    rng, forward = torch.random.get_rng_state(), vars(Asymmetric)["forward"]
    first = findings(model)
    assert first.equals(findings(model))
    forecast_measurements(model, (VECTORS, CLASSES))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(rng, torch.random.get_rng_state())
    assert vars(Asymmetric)["forward"] is forward


def test_dropout_in_training_mode():
    model = around(nn.Dropout(0.5)).train()
    row = findings(model).loc["mode"]
    assert row["status"] == "fault"
    assert "'1' (Dropout)" in row["finding"]
    assert "model.eval()" in row["cure"]
    assert faults(findings(model.eval())) == []


def test_batchnorm_in_training_mode():
    row = findings(around(nn.BatchNorm1d(5)).train()).loc["mode"]
    assert "'1' (BatchNorm1d)" in row["finding"]
    assert "model.eval()" in row["cure"]


def test_nan_weights():
    model = tiny().eval()
    model[3].weight.data[0, 0, 0, 0] = torch.nan
    frame = findings(model, IMAGES, LABELS)
    assert faults(frame) == ["weights"]
    assert "'3.weight'" in frame.loc["weights", "finding"]
    assert "earlier epoch" in frame.loc["weights", "cure"]


def test_buffers_may_be_infinite():
    model = around(nn.ReLU())
    model.register_buffer("mask", torch.tensor([-torch.inf]))
    assert faults(findings(model)) == []
    model.mask.fill_(torch.nan)
    assert "'mask'" in findings(model).loc["weights", "finding"]


def test_an_asymmetric_function():
    frame = findings(around(Apply(Asymmetric)))
    row = frame.loc["symmetric"]
    assert row["status"] == "fault"
    assert "'Asymmetric' in '1' (Apply)" in row["finding"]
    assert "derivative of one function" in row["cure"]
    model = around(nn.Tanh())
    assert faults(findings(model)) == []
    model[1].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0].clamp(-1e-3, 1e-3),))
    assert "backward hook" in findings(model).loc["symmetric", "cure"]


@pytest.mark.parametrize("function", [Forgetful, Once])
def test_a_function_whose_second_derivative_is_silently_zero(function):
    row = findings(around(Apply(function))).loc["Functions"]
    assert row["status"] == "fault"
    assert f"'{function.__name__}' in '1' (Apply) is silently wrong: autograd gives 0 where" in row["finding"]
    assert "ctx.saved_tensors" in row["cure"]


def test_a_function_that_refuses():
    frame = findings(around(Apply(Refuses)))
    assert faults(frame) == ["Functions", "differentiable twice"]
    row = frame.loc["differentiable twice"]
    assert "'Refuses' in '1' (Apply)" in row["finding"]
    assert "once_differentiable" in row["cure"]


@pytest.mark.parametrize("function", [Round, Square])
def test_functions_that_are_right(function):
    frame = findings(around(Apply(function)))
    assert faults(frame) == []
    assert f"'{function.__name__}' in '1' (Apply)" in frame.loc["Functions", "finding"]


@pytest.mark.parametrize("inputs", [20, 4000])
def test_a_straight_through_estimator_with_weights_on_its_edge(inputs):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(Quantized(inputs, 200)).eval(), torch.randn(4, inputs), torch.arange(4)
    with torch.no_grad():
        weight = model[0].weight
        weight[::2] = weight.abs().max() * weight[::2].sign() * (1 - 1e-5 * torch.rand_like(weight[::2]))
    assert findings(model, x, y).loc["Functions", "status"] == "ok"


class Kinky(torch.autograd.Function):
    """softplus(x) with a slope that jumps everywhere: a step of all of many entries goes over a kink of some."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.softplus(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.sigmoid() + (20 * x).floor() / 20)


class KinkyAndWrong(Kinky):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.detach().sigmoid() + (20 * x).floor() / 20)


def single(kind):
    """The same for float32 alone, as some kernels are."""

    class Single(kind):
        @staticmethod
        def forward(ctx, x):
            if x.dtype != torch.float32:
                raise RuntimeError("float32 only")
            return kind.forward(ctx, x)

    return Single


class Coarse(Kinky):
    """Computes in float32, whatever it is given."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (grad.float() * (x.float().sigmoid() + (20 * x.float()).floor() / 20)).to(grad)


class Steep(Kinky):
    """Its gradient is nothing but jumps."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.sigmoid() + 1e12 * x).sin()


@pytest.mark.parametrize(
    ("function", "status"),
    [
        (Kinky, "fine"),
        (KinkyAndWrong, "wrong"),
        (single(Kinky), "fine"),
        (single(KinkyAndWrong), "wrong"),
        (Coarse, "fine"),
        (Steep, "unknown"),
    ],
)
def test_a_wrong_second_derivative_shows_among_kinks_and_in_float32(function, status):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20_000), Apply(function), nn.Linear(20_000, 3)).eval()
    tested = prepare(model, (VECTORS, CLASSES), "cross_entropy", None, 0)
    with same_random_state(tested.device):
        (verdict,) = check_functions(tested.precise)
    assert verdict.status == status, verdict.detail


def test_a_function_on_the_inputs_too():
    """Its first call there has nothing to differentiate."""
    model = nn.Sequential(Apply(Square), *around(Apply(Square))).eval()
    assert "could not be checked" not in findings(model).loc["Functions", "finding"]
    model = nn.Sequential(Apply(Forgetful), *around(Apply(Forgetful))).eval()
    assert findings(model).loc["Functions", "status"] == "fault"


def test_in_place_activation():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 10)
    )
    row = findings(model.eval(), IMAGES, LABELS).loc["in place"]
    assert row["status"] == "note"
    assert "'2' (ReLU) overwrites the output of '1' (BatchNorm2d)" in row["finding"]
    assert "inplace=False" in row["cure"]
    assert "output.clone()" in row["cure"]
    model[2].inplace = False
    assert findings(model, IMAGES, LABELS).loc["in place", "status"] == "ok"


def test_fused_attention():
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(12, 5, 8)
    row = findings(model, x).loc["differentiable twice"]
    assert row["status"] != "ok"  # a note where measurements choose the kernel themselves
    assert "'block.self_attn' (MultiheadAttention)" in row["finding"]
    assert "fused attention" in row["finding"]
    assert "SDPBackend.MATH" in row["cure"]
    with sdpa_kernel(SDPBackend.MATH):  # the cure
        frame = findings(model, x)
    assert faults(frame) == []
    assert frame.loc["differentiable twice", "status"] == frame.loc["symmetric", "status"] == "ok"
    assert frame.loc["exact trace", "status"] == "note"


def test_a_cure_is_printed_whole(capsys, monkeypatch):
    from fpq_analysis.cli.doctor import _print_findings

    monkeypatch.setenv("COLUMNS", "80")
    frame = diagnose(around(nn.Hardsigmoid()), (VECTORS, CLASSES))
    frame.loc[0, "cure"] = "a" * 200 + " [bold]"
    _print_findings(frame)
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines())
    assert text.count("a" * 40) >= 4
    assert "[bold]" in text
    for cure in frame["cure"][1:]:
        assert "".join(cure.split()) in "".join(text.split())


def test_other_models_without_a_second_derivative():
    row = findings(around(nn.Hardsigmoid())).loc["differentiable twice"]
    assert row["status"] == "fault"
    assert "'1' (Hardsigmoid) uses 'hardsigmoid'" in row["finding"]
    assert "relu6" in row["cure"]
    row = findings(Reentrant()).loc["Functions"]
    assert row["status"] == "fault"
    assert "'CheckpointFunction'" in row["finding"]
    assert "use_reentrant=False" in row["cure"]


def test_random_numbers_in_eval_mode():
    class Noisy(nn.Module):
        def forward(self, x):
            return F.dropout(x)

    frame = findings(around(Noisy()))
    assert faults(frame) == ["repeatable"]
    row = frame.loc["repeatable"]
    assert "'1' (Noisy)" in row["finding"]
    assert "training=self.training" in row["cure"]


def test_mixed_samples():
    row = findings(around(nn.BatchNorm1d(5, track_running_stats=False))).loc["samples apart"]
    assert row["status"] == "fault"
    assert "'1' (BatchNorm1d)" in row["finding"]
    assert "GroupNorm" in row["cure"]


def test_outside_the_exact_condition():
    row = findings(FunctionalGelu().eval()).loc["exact trace"]
    assert row["status"] == "note"
    assert "'gelu' in '(model)' (FunctionalGelu)" in row["finding"]
    assert "deflated" in row["cure"]
    assert findings(FunctionalGelu(), loss=lambda z, y: z.square().mean()).loc["exact trace", "status"] == "note"


def test_tied_and_unused_weights():
    assert "'first.weight' and 'second.weight'" in findings(Tied()).loc["variables", "finding"]
    row = findings(Spare()).loc["used"]
    assert row["status"] == "note"
    assert "'spare.weight' (and 1 more)" in row["finding"]


def test_weights_without_gradient():
    class Rounded(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, (10 * self.weight).round() / 10, self.bias)

    row = findings(nn.Sequential(nn.Flatten(), Rounded(64, 10)), IMAGES, LABELS).loc["used"]
    assert row["status"] == "note"
    assert "The gradient of '1.weight' is zero" in row["finding"]
    assert "straight through" in row["cure"]


def test_probabilities_where_logits_are_wanted():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    row = findings(nn.Sequential(net, nn.Softmax(1)), IMAGES, LABELS).loc["fit"]
    assert row["status"] == "note"
    assert "probabilities already" in row["finding"]
    for other in (net, nn.Sequential(net, nn.LogSoftmax(1))):
        assert "probabilities" not in findings(other, IMAGES, LABELS).loc["fit", "finding"]


class Spare(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.spare = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)


def test_quantizers():
    frame = findings(quantize(tiny(), QuantSpec.parse("W4A4")).eval(), IMAGES, LABELS)
    assert faults(frame) == ["quantizers"]
    assert "'0'" in frame.loc["quantizers", "finding"]
    assert "calibrate" in frame.loc["quantizers", "cure"]
    model = quantize(tiny(), QuantSpec.parse("W4A32"))
    for p in model.parameters():
        p.data *= 0.5 if p.ndim == 4 and p.shape[1:] == (1, 1, 1) else 1
    row = findings(model.eval(), IMAGES, LABELS).loc["quantizers"]
    assert row["status"] == "note"
    assert "clipped" in row["finding"]
    assert "dequantized" in row["cure"]


def test_bad_data():
    model = around(nn.ReLU())
    assert "NaN" in findings(model, VECTORS / 0).loc["finite", "finding"]
    assert "0 to C - 1" in findings(model, VECTORS, CLASSES + 1).loc["finite", "finding"]
    assert "cannot be computed" in findings(model, VECTORS[:, :4]).loc["finite", "finding"]
    with pytest.raises(UserError, match="Unknown loss"):
        diagnose(model, (VECTORS, CLASSES), loss="mse")


def test_no_weights_and_coarse_ones():
    assert faults(findings(around(nn.ReLU()).requires_grad_(False))) == ["variables"]
    row = findings(around(nn.ReLU()).bfloat16(), VECTORS.bfloat16()).loc["dtype"]
    assert (row["status"], row["cure"]) == ("note", "Use model.float().")


def test_forecast():
    images, labels = IMAGES.repeat(6, 1, 1, 1), LABELS.repeat(6)
    frame = forecast_measurements(tiny().eval(), (images[:32], labels[:32]))
    twice = forecast_measurements(tiny().eval(), (images[:64], labels[:64]))
    assert list(frame.columns) == ["measurement", "seconds", "peak MB"]
    assert (frame.drop(columns="measurement") > 0).all(axis=None)
    assert twice["peak MB"].iloc[0] == pytest.approx(2 * frame["peak MB"].iloc[0])
    product, eigenvalues, density = frame["seconds"][1:]
    assert product < eigenvalues < density
    curved = forecast_measurements(FunctionalGelu(), (VECTORS, CLASSES))
    assert curved["seconds"].isna().tolist() == [True, False, False, False]


def test_forecast_of_several_processes(monkeypatch):
    monkeypatch.setattr("fpq_analysis.doctor.workers.cores", lambda: 8)
    before = torch.get_num_threads()
    frame = forecast_workers(tiny().eval(), (IMAGES, LABELS), device="cpu")
    assert torch.get_num_threads() == before
    assert [tuple(row) for row in frame[["device", "processes", "threads"]].to_numpy()] == [
        ("cpu", 1, 8),
        ("cpu", 4, 2),
        ("cpu", 8, 1),
    ]
    assert frame["memory MB"].is_monotonic_increasing
    smooth = forecast_workers(FunctionalGelu(), (VECTORS, CLASSES), device="cpu")
    assert smooth["seconds"].notna().all()


def test_advice(monkeypatch):
    monkeypatch.setattr("fpq_analysis.doctor.workers.shutil.which", lambda name: None)

    def said(*rows):
        return advice(pd.DataFrame(rows, columns=WORKERS_COLUMNS))

    one, four = ("cpu", 1, 8, 4.0, 500.0, 3000.0), ("cpu", 4, 2, 1.5, 2000.0, 3000.0)
    assert "--device cpu --jobs 4 (4 processes, 1.5 s a checkpoint, 2000 of 3000 MB)" in said(one, four)
    assert "--device cpu (one process, 4 s" in said(one, ("cpu", 4, 2, 1.5, 3500.0, 3000.0))  # no room for four
    assert "--device cpu (one process" in said(one, ("cpu", 4, 2, 3.9, 2000.0, 3000.0))  # not worth it
    assert "--device cuda:0" in said(("cuda:0", 1, 8, 0.1, 500.0, 80000.0), one, four)
    assert "Not one process fits: it would take 500 MB on cpu, of which 400 are free" in said((*one[:5], 400.0))
    monkeypatch.setattr("fpq_analysis.doctor.workers.shutil.which", lambda name: "/usr/bin/sbatch")
    assert "--executor slurm" in said(one, four)


def call(*arguments, code=0):
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)], env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result


OPTIONS = ["--model", "tests.nets:tiny", "--n-data", 32, "--device", "cpu"]


def test_command_on_a_good_run(tiny_runs):
    result = call(tiny_runs / "fp", *OPTIONS)
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    assert "0 faults" in words(result.stderr)
    assert "Hessian-vector product" in words(result.stdout)
    assert "For many checkpoints: --device cpu" in words(result.stdout)
    lines = call(tiny_runs / "fpq-w4a4" / "epoch_0001.pt", *OPTIONS, "--json").stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    assert {row["status"] for row in rows if "check" in row} <= {"ok", "note"}  # of many clipped weights, if need be
    assert next(row["measurement"] for row in rows if "measurement" in row) == "trace (exact)"


def test_command_on_nan_weights(tiny_runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_runs / "fp", run)
    (run / "manifest.json").unlink()
    content = torch.load(run / "epoch_0002.pt", weights_only=True)
    content["state_dict"]["3.weight"].fill_(torch.nan)
    torch.save(content, run / "epoch_0002.pt")
    text = " ".join(call(run, *OPTIONS, code=1).stdout.split())
    assert "'3.weight' holds NaN" in text
    assert "Cure: The training diverged" in text


def test_command_misused(tmp_path):
    for path, said in ((tmp_path, "holds no checkpoint"), (tmp_path / "a.pt", "No checkpoint")):
        assert said in words(call(path, code=1).stderr)

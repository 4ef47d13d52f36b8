"""Training: the loop, its regularisers, and resuming after a kill."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn

from fpq_analysis import QuantSpec, TrainConfig, UserError, calibrate, load, quantize, train
from fpq_analysis.data import Dataset, load_dataset
from fpq_analysis.files import read_jsonl
from fpq_analysis.quantizers import clipped_fraction, quantizer_parameters, quantizers
from fpq_analysis.runs import Run
from fpq_analysis.runs.checkpoint import read_checkpoint
from fpq_analysis.training.csd import EPS, CSDLoss, Features, StandardizedDistance, check_pair, csd_loss
from fpq_analysis.training.loop import cosine
from fpq_analysis.training.sfp import StochasticFeaturePerturbation
from tests.nets import Residual, tiny


def quiet(line: str) -> None:
    pass


def test_what_a_run_leaves(tiny_runs):
    run = tiny_runs / "fpq-w4a4"
    assert list(Run(run).checkpoints) == [0, 1, 2]
    assert set(Run(run).manifest) == {f"epoch_{i:04d}.pt" for i in range(3)}
    assert not (run / "resume.pt").exists()  # only an unfinished run needs it
    rows = read_jsonl(run / "train.jsonl")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert all(0 <= row["test_accuracy"] <= 1 for row in rows)
    assert rows[1]["loss"] == pytest.approx(rows[1]["loss_ce"] + rows[1]["loss_csd"], rel=1e-5)
    assert rows[1]["loss_csd"] > 0
    assert json.loads((run / "run.json").read_text())["config"]["method"] == "fpq"
    assert "loss_csd" not in read_jsonl(tiny_runs / "lsq-w4a4" / "train.jsonl")[1]


@pytest.mark.parametrize("method", ["fp", "lsq", "lsq+", "pact"])
def test_a_step_of_training_goes_down_the_gradient_of_the_loss(method, tiny_runs, tmp_path):
    """One step on all images: by -lr (g + weight decay), g the gradient of the checkpoint before it, by autograd."""
    options = {"bits": "W8A8", "init": str(tiny_runs / "fp")} if method != "fp" else {}
    config = TrainConfig(
        model="tests.nets:tiny", method=method, epochs=1, batch_size=10_000, lr=0.01, augment=False, **options
    )
    train(config, tmp_path / "run", device="cpu", log=quiet)
    before, after = (load(tmp_path / "run" / f"epoch_000{i}.pt", model="tests.nets:tiny") for i in (0, 1))
    digits = load_dataset("digits")
    loss = nn.functional.cross_entropy(before.train()(digits.normalize(digits.train.images)), digits.train.labels)
    row = read_jsonl(tmp_path / "run" / "train.jsonl")[1]
    assert row["loss_ce"] == pytest.approx(float(loss.detach()), rel=1e-3)
    loss.backward()
    scales = {id(p) for p in quantizer_parameters(before)}
    moves, gradients = [], []
    for p, q in zip(before.parameters(), after.parameters(), strict=True):
        if id(p) not in scales:
            moves.append((q - p).detach().flatten() / -config.lr)
            gradients.append((p.grad + config.weight_decay * p).detach().flatten())
    move, gradient = torch.cat(moves), torch.cat(gradients)
    # Not to the last digit: another layout rounds otherwise, and may put features on the next level.
    assert float((move - gradient).norm()) < 0.01 * float(gradient.norm()) > 0


def test_everything_learnable_moves(tiny_runs):
    start, end = (read_checkpoint(tiny_runs / "fpq-w4a4" / f"epoch_000{i}.pt").state_dict for i in (0, 2))
    for name, before in start.items():
        if "zero_point" in name:
            assert torch.equal(before, end[name])  # fixed during training
        else:
            assert not torch.equal(before, end[name]), name
        if "step_size" in name:
            assert (end[name] > 0).all()


def test_the_student_starts_as_its_calibrated_teacher(tiny_runs):
    teacher = load(tiny_runs / "fp" / "epoch_0002.pt", model="tests.nets:tiny")
    student = load(tiny_runs / "lsq-w4a4" / "epoch_0000.pt", model="tests.nets:tiny")
    for name, p in teacher.named_parameters():
        mine = dict(student.named_parameters())
        assert torch.equal(
            p, mine[name] if name in mine else mine[name.replace(".weight", ".parametrizations.weight.original")]
        )
    assert torch.equal(teacher[1].running_mean, student[1].running_mean)


def test_same_seed_same_weights_other_seed_others(tmp_path):
    config = {"model": "tests.nets:tiny", "epochs": 1}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(TrainConfig(seed=seed, **config), tmp_path / name, device="cpu", log=quiet)
    a, b, c = (read_checkpoint(tmp_path / name / "epoch_0001.pt") for name in "abc")
    assert a.sha256 == b.sha256
    assert not torch.equal(a.state_dict["0.weight"], c.state_dict["0.weight"])


KILLED = """
import sys
from fpq_analysis import TrainConfig, train
config = TrainConfig(
    model="tests.nets:tiny", method="fpq", bits="W4A4", init=sys.argv[1], epochs=4, batch_size=64, lr=0.02
)
train(config, sys.argv[2], device="cpu", resume=True)
"""


def test_killed_and_resumed_is_bit_identical(tiny_runs, tmp_path):
    """SIGKILL at random moments, until a run of it gets through; the last checkpoint is readable every time."""
    command = [sys.executable, "-c", KILLED, str(tiny_runs / "fp")]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start = time.monotonic()
    subprocess.run([*command, str(whole)], check=True, stdout=subprocess.DEVNULL)
    duration = time.monotonic() - start
    dice = random.Random(0)
    kills = 0
    while kills < 8:
        process = subprocess.Popen([*command, str(broken)], stdout=subprocess.DEVNULL)
        # From before the first checkpoint to just before the end, most of them while epochs are written.
        time.sleep(duration * dice.uniform(0.3, 1.0))
        if process.poll() is not None:
            assert process.returncode == 0
            if kills:
                break
            # It got through before the first kill: the timed run had met a busier machine.
            shutil.rmtree(broken)
            duration *= 0.7
            continue
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        for path in Run(broken).checkpoints.values() if broken.exists() else []:
            read_checkpoint(path)
    subprocess.run([*command, str(broken)], check=True, stdout=subprocess.DEVNULL)
    for epoch in range(5):
        a, b = (read_checkpoint(run / f"epoch_{epoch:04d}.pt") for run in (whole, broken))
        assert a.sha256 == b.sha256
    timeless = [
        [
            {k: v for k, v in row.items() if k not in ("seconds", "images_per_s")}
            for row in read_jsonl(run / "train.jsonl")
        ]
        for run in (whole, broken)
    ]
    assert timeless[0] == timeless[1]


def test_a_kill_between_any_two_writes_is_made_good(tiny_runs, tmp_path, monkeypatch):
    """Every write of an epoch fails once, in turn; the resumed run ends the same."""
    from fpq_analysis.training import resume

    config = TrainConfig(
        model="tests.nets:tiny", method="lsq", bits="W4A4", init=str(tiny_runs / "fp"), epochs=2, batch_size=256
    )
    train(config, tmp_path / "whole", device="cpu", log=quiet)
    truth = [read_checkpoint(p).sha256 for p in Run(tmp_path / "whole").checkpoints.values()]
    places = [
        (resume.ckpt, "save_checkpoint"),
        (resume, "append_jsonl"),
        (resume, "atomic_write"),
        (resume, "write_json"),
    ]
    for owner, name in places:
        for nth in (1, 2):
            run = tmp_path / f"{name}-{nth}"
            original, calls = getattr(owner, name), []

            def dying(*args, original=original, calls=calls, nth=nth, **kwargs):
                calls.append(1)
                if len(calls) == nth:
                    raise KeyboardInterrupt
                return original(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, dying)
                try:
                    train(config, run, device="cpu", resume=True, log=quiet)
                except KeyboardInterrupt:
                    pass
                else:
                    assert name == "write_json"  # called once only
            train(config, run, device="cpu", resume=True, log=quiet)
            assert [read_checkpoint(p).sha256 for p in Run(run).checkpoints.values()] == truth
            assert [row["epoch"] for row in read_jsonl(run / "train.jsonl")] == [0, 1, 2]


def test_resuming_with_other_settings_is_refused(tiny_runs):
    with pytest.raises(UserError, match="lr = 0.1"):
        train(TrainConfig(model="tests.nets:tiny", epochs=2, batch_size=32), tiny_runs / "fp", resume=True)
    with pytest.raises(UserError, match="--resume"):
        train(TrainConfig(model="tests.nets:tiny", epochs=2, batch_size=32, lr=0.1), tiny_runs / "fp")


def test_resume_never_throws_a_run_away(tiny_runs, tmp_path):
    """Without the optimiser's state it cannot go on; it used to start anew, over everything."""
    run = tmp_path / "run"
    shutil.copytree(tiny_runs / "fp", run)
    (run / "epoch_0002.pt").unlink()
    config = TrainConfig(model="tests.nets:tiny", epochs=2, batch_size=32, lr=0.1)
    with pytest.raises(UserError, match="cannot go on"):
        train(config, run, device="cpu", resume=True, log=quiet)
    assert list(Run(run).checkpoints) == [0, 1]


def test_overwrite_checks_before_it_destroys(tiny_runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_runs / "lsq-w4a4", run)
    (run / "records").mkdir()
    common = {"model": "tests.nets:tiny", "method": "lsq", "bits": "W4A4", "epochs": 1}
    with pytest.raises(UserError, match="No run"):
        train(TrainConfig(init="typo", **common), run, device="cpu", overwrite=True)
    assert list(Run(run).checkpoints) == [0, 1, 2]
    train(TrainConfig(init=str(tiny_runs / "fp"), **common), run, device="cpu", overwrite=True, log=quiet)
    assert list(Run(run).checkpoints) == [0, 1]
    assert not (run / "records").exists()


def test_to_resume_and_to_overwrite_is_not_to_overwrite(tiny_runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_runs / "fp", run)
    config = TrainConfig(model="tests.nets:tiny", epochs=2, batch_size=32, lr=0.1)
    with pytest.raises(UserError, match="leave one of them out"):
        train(config, run, device="cpu", resume=True, overwrite=True, log=quiet)
    assert list(Run(run).checkpoints) == [0, 1, 2]


def test_the_teacher_must_be_finished_and_the_same(tiny_runs, tmp_path):
    teacher = tmp_path / "fp"
    shutil.copytree(tiny_runs / "fp", teacher)
    config = TrainConfig(model="tests.nets:tiny", method="lsq", bits="W4A4", init=str(teacher), epochs=2)
    train(config, tmp_path / "run", device="cpu", log=quiet)
    # As if killed in the second epoch, with the teacher exchanged since.
    (tmp_path / "run" / "epoch_0002.pt").unlink()
    torch.save({"epoch": 1, "optimizer": {}}, tmp_path / "run" / "resume.pt")
    again = TrainConfig(model="tests.nets:tiny", epochs=2, batch_size=32, lr=0.2)
    train(again, teacher, device="cpu", overwrite=True, log=quiet)
    with pytest.raises(UserError, match="another teacher"):
        train(config, tmp_path / "run", device="cpu", resume=True, log=quiet)
    (teacher / "epoch_0002.pt").unlink()
    with pytest.raises(UserError, match="epoch 1 of 2"):
        train(config, tmp_path / "new", device="cpu", log=quiet)


def test_seeds_share_one_split(tiny_runs, tmp_path):
    """The test images of a student are never among its teacher's training images, whatever the seeds."""
    config = TrainConfig(
        model="tests.nets:tiny", method="lsq", bits="W4A4", init=str(tiny_runs / "fp"), epochs=1, seed=7
    )
    train(config, tmp_path / "run", device="cpu", log=quiet)
    a, b = (read_checkpoint(run / "epoch_0000.pt").data for run in (tiny_runs / "fp", tmp_path / "run"))
    assert a["fingerprint"] == b["fingerprint"]


def test_weights_that_diverge_in_the_last_step_are_not_saved(tmp_path, monkeypatch):
    """The loss is seen before the step, so the last step's damage shows in the weights only."""
    from fpq_analysis.training import loop

    original = loop.make_optimizer

    def poisoned(config, model):
        optimizer = original(config, model)
        step = optimizer.step
        counter = []

        def last(*args, **kwargs):
            step(*args, **kwargs)
            counter.append(1)
            if len(counter) == 5:  # 1,442 images in batches of 256
                optimizer.param_groups[0]["params"][0].data.fill_(torch.nan)

        optimizer.step = last
        return optimizer

    monkeypatch.setattr(loop, "make_optimizer", poisoned)
    with pytest.raises(UserError, match="weights became"):
        train(TrainConfig(model="tests.nets:tiny", epochs=2), tmp_path / "run", device="cpu", log=quiet)
    assert list(Run(tmp_path / "run").checkpoints) == [0]


def test_a_layer_that_does_not_run_cannot_be_calibrated():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.extra = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            return self.main(x)

    model = quantize(Auxiliary(), QuantSpec.parse("W4A4"))
    with pytest.raises(UserError, match="'extra'"):
        calibrate(model, torch.randn(5, 4), "mse")


def test_a_folder_that_is_no_run_is_not_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match="not a run"):
            train(TrainConfig(epochs=1), tmp_path, device="cpu", **options)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_diverged_loss_stops_and_keeps_the_last_checkpoint(tmp_path):
    config = TrainConfig(model="tests.nets:tiny", epochs=3, lr=1e12, batch_size=64, weight_decay=1.0)
    with pytest.raises(UserError, match=r"epoch 1, step \d+, learning rate \d.*smaller --lr"):
        train(config, tmp_path / "run", device="cpu", log=quiet)
    assert load(tmp_path / "run" / "epoch_0000.pt", model="tests.nets:tiny") is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lsqq"}, "did you mean 'lsq'"),
        ({"method": "lsq", "init": "x"}, "needs a bit width"),
        ({"method": "lsq", "bits": "W4A4"}, "starts from a trained float network"),
        ({"bits": "W4A4"}, "not quantized"),
        ({"method": "fpq", "bits": "W0A4", "init": "x"}, "0-bit weights"),
        ({"sfp_p": 1.5}, "probability"),
        ({"epochs": 0}, "above zero"),
        ({"weight_calibration": "max"}, "Known: mse, minmax"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**options)


def test_bad_teachers(tiny_runs, tmp_path):
    common = {"method": "lsq", "bits": "W4A4", "epochs": 1}
    (tmp_path / "empty").mkdir()
    cases = [
        ({"init": str(tmp_path / "nowhere"), "model": "tests.nets:tiny"}, "No run"),
        ({"init": str(tmp_path / "empty"), "model": "tests.nets:tiny"}, "no checkpoint"),
        ({"init": str(tiny_runs / "lsq-w4a4"), "model": "tests.nets:tiny"}, "quantized run"),
        ({"init": str(tiny_runs / "fp"), "model": "resnet20"}, "same network"),
    ]
    for options, message in cases:
        with pytest.raises(UserError, match=message):
            train(TrainConfig(**common, **options), tmp_path / "out", device="cpu")


def test_cosine():
    assert cosine(0.1, 0, 10) == pytest.approx(0.1)
    assert cosine(0.1, 5, 10) == pytest.approx(0.05)
    assert cosine(0.1, 10, 10) == pytest.approx(0)


def test_standardization_and_distillation_in_plain_numpy():
    """Eq. 15-17, written out."""
    s, t = (np.random.default_rng(i).normal(1.5, 2, (6, 3, 4, 5)) for i in (0, 1))
    standard = [(z - z.mean((0, 2, 3), keepdims=True)) / np.sqrt(z.var((0, 2, 3), keepdims=True) + EPS) for z in (s, t)]
    truth = ((standard[0] - standard[1]) ** 2).sum()
    a, b = torch.from_numpy(s), torch.from_numpy(t)
    assert float(csd_loss([a], [b], "sum")) == pytest.approx(truth, rel=1e-5)
    assert float(csd_loss([a, a], [b, b])) == pytest.approx(2 * truth / s.size, rel=1e-5)
    assert float(csd_loss([a], [a])) == pytest.approx(0, abs=1e-6)


def test_the_closed_gradient_of_distillation():
    """Against autograd through the standardisation; one channel nearly constant, one constant."""
    scale = torch.tensor([1.0, 2.0, 0.1, 1e-3, 0.0], dtype=torch.float64).view(1, -1, 1, 1)
    s = (scale * torch.randn(8, 5, 6, 6, dtype=torch.float64)).requires_grad_()
    t = torch.randn(8, 5, 6, 6, dtype=torch.float64)
    standard = (nn.functional.batch_norm(z, None, None, training=True, eps=EPS) for z in (s, t))
    plain = nn.functional.mse_loss(*standard)
    closed = StandardizedDistance.apply(s, t)
    assert float(closed.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(loss, s)[0] for loss in (closed, plain)), rtol=1e-9, atol=1e-12)


def test_distillation_wants_one_network():
    with pytest.raises(UserError, match="another network"):
        check_pair(tiny(), nn.Sequential(Residual(nn.Conv2d(1, 1, 1))))


def test_features_survive_in_place_layers_downstream():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True))
    x = torch.randn(2, 1, 8, 8)
    with Features(model) as features:
        model(x)
        (kept,) = features.take()
    assert torch.equal(kept, model[0](x))
    assert not model[0]._forward_hooks


def perturbed(p: float, training: bool = True, seed: int = 0):
    """(input of each convolution without noise, with it, its step size)."""
    model = quantize(tiny(), QuantSpec.parse("W4A4"))
    x = torch.randn(64, 1, 8, 8)
    calibrate(model, x, "mse")
    model.train(training)
    seen: list[torch.Tensor] = []
    hooks = []

    def record():
        # Registered last, so it sees what the convolution gets.
        hooks.extend(
            model[i].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())) for i in (0, 3, 6, 11)
        )

    record()
    model(x)
    for hook in hooks:
        hook.remove()
    generators = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    with StochasticFeaturePerturbation(model, p, *generators):
        record()
        model(x)
    steps = [float(q.step_size.detach()) for _, q, is_weight in quantizers(model) if not is_weight]
    return list(zip(seen[:4], seen[4:], steps, strict=True))


def test_noise_is_uniform_in_half_a_step():
    """Eq. 9, at the first convolution, where nothing before it differs."""
    clean, noisy, step = perturbed(1.0)[0]
    d = (noisy - clean) / step
    assert d.abs().max() <= 0.5 + 1e-4
    n = d.numel()
    assert abs(float(d.mean())) < 4 * math.sqrt(1 / 12 / n)
    assert float(d.var()) == pytest.approx(1 / 12, rel=0.1)
    assert len(d.unique()) > n / 2  # element-wise


def test_noise_sites():
    changed = [not torch.equal(clean, noisy) for clean, noisy, _ in perturbed(1.0)]
    assert changed[:3] == [True, True, True]
    # The classifier's own input gets none: what it sees lies on its quantizer's grid.
    _, last, step = perturbed(1.0)[3]
    torch.testing.assert_close(last / step, (last / step).round(), atol=1e-3, rtol=0)
    assert not any(not torch.equal(clean, noisy) for clean, noisy, _ in perturbed(1.0, training=False))
    assert not any(not torch.equal(clean, noisy) for clean, noisy, _ in perturbed(0.0))


def test_noise_gates_are_independent_with_probability_p():
    model = quantize(tiny(), QuantSpec.parse("W4A4"))
    x = torch.randn(2, 1, 8, 8)
    calibrate(model, x, "mse")
    model.train()
    fired = []
    generators = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    with StochasticFeaturePerturbation(model, 0.3, *generators) as sfp:
        assert len(sfp.sites) == 3
        for _ in range(400):
            row = []
            handles = []
            for layer, quantizer in sfp.sites:

                def after(_, args, row=row, quantizer=quantizer):
                    k = args[0] / quantizer.step_size
                    row.append(bool((k - k.round()).abs().max() > 1e-2))

                handles.append(layer.register_forward_pre_hook(after))
            model(x)
            for handle in handles:
                handle.remove()
            fired.append(row)
    rates = np.array(fired, dtype=float)
    np.testing.assert_allclose(rates.mean(0), 0.3, atol=0.08)
    assert abs(np.corrcoef(rates.T)[0, 1]) < 0.15


def without_statistics(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, num_classes))


def test_a_batch_in_parts_is_the_batch(tmp_path):
    trained = []
    for parts in (1, 3):
        config = TrainConfig(model=f"{__name__}:without_statistics", epochs=1, lr=0.1, batch_size=500, accumulate=parts)
        row = train(config, tmp_path / str(parts), device="cpu", log=quiet).iloc[-1]
        state = load(tmp_path / str(parts) / "epoch_0001.pt", model=config.model).state_dict()
        trained.append([torch.tensor([row["loss"], row["train_accuracy"]]), *state.values()])
    for whole, divided in zip(*trained, strict=True):
        torch.testing.assert_close(whole, divided.to(whole), rtol=1e-3, atol=1e-5)
    with pytest.raises(UserError, match="fewer than 2 images"):
        TrainConfig(batch_size=3, accumulate=2)


def compiled_by(call, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", call(self._call_impl)))


@pytest.mark.parametrize("method", ["fp", "lsq"])
def test_a_compiled_network_is_trained_alike(method, tiny_runs, tmp_path, monkeypatch):
    """Of Inductor's kernels, which round in another way and take a minute, nothing is tested here."""
    calls = []
    compiled_by(lambda call: calls.append(call) or torch.compile(call, backend="eager"), monkeypatch)
    quantized = {"bits": "W4A4", "init": str(tiny_runs / "fp")} if method == "lsq" else {}
    for compile_ in (False, True):
        config = TrainConfig(
            model="tests.nets:tiny", method=method, epochs=1, batch_size=240, lr=0.01, compile=compile_, **quantized
        )
        train(config, tmp_path / str(compile_), device="cpu", log=quiet)
    one, other = (read_checkpoint(tmp_path / name / "epoch_0001.pt").state_dict for name in ("False", "True"))
    assert len(calls) == 1
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_network_that_cannot_be_compiled_is_told_so(tmp_path, monkeypatch):
    def fail(*given):
        raise torch._dynamo.exc.TorchDynamoException("no compiler is here")

    compiled_by(lambda call: fail, monkeypatch)
    with pytest.raises(UserError, match=r"cannot be compiled here \(no compiler is here\)\. Leave --compile out"):
        train(TrainConfig(model="tests.nets:tiny", epochs=1, compile=True), tmp_path, device="cpu", log=quiet)


def test_bf16_trains(tiny_runs, tmp_path, monkeypatch):
    """Convolutions are computed in bfloat16; weights and what is kept of them are in float32."""
    seen = set()
    forward = nn.Conv2d.forward

    def watched(self, x):
        out = forward(self, x)
        if self.training:
            seen.add((self.weight.dtype, out.dtype))
        return out

    monkeypatch.setattr(nn.Conv2d, "forward", watched)
    config = TrainConfig(
        model="tests.nets:tiny",
        method="fpq",
        bits="W4A4",
        init=str(tiny_runs / "fp"),
        epochs=1,
        bf16=True,
        batch_size=128,
    )
    train(config, tmp_path / "run", device="cpu", log=quiet)
    assert seen == {(torch.float32, torch.bfloat16)}
    start, end = (read_checkpoint(tmp_path / "run" / f"epoch_000{i}.pt").state_dict for i in (0, 1))
    assert all(value.dtype == start[name].dtype for name, value in end.items())
    for name, value in end.items():
        assert value.dtype == torch.float32 or not value.is_floating_point()
        assert "zero_point" in name or not torch.equal(start[name], value), name


def test_clipped_fraction_is_recorded(tiny_runs):
    model = load(tiny_runs / "lsq-w4a4" / "epoch_0002.pt", model="tests.nets:tiny")
    assert read_jsonl(tiny_runs / "lsq-w4a4" / "train.jsonl")[-1]["clipped_fraction"] == clipped_fraction(model)


def test_embedded_data_is_used_without_download():
    data = load_dataset("digits")
    assert isinstance(data, Dataset)
    assert len(data.train) + len(data.test) == 1797


# FPQ's parts in a loop of one's own -----------------------------------------------------------------------------------


def test_the_parts_in_a_plain_loop_are_those_of_the_trainer():
    """Noise from the generators of a seed, and the distance, against both written out."""
    teacher = tiny().eval()
    model = quantize(teacher, QuantSpec.parse("W4A4"))
    x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    calibrate(model, x, "mse")
    model.train()
    state = torch.get_rng_state()
    with StochasticFeaturePerturbation(model, p=0.5, seed=7), CSDLoss(model, teacher) as csd:
        loss = nn.functional.cross_entropy(model(x), y) + csd(x)
    assert torch.equal(state, torch.get_rng_state())
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())

    generators = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    with StochasticFeaturePerturbation(model, 0.5, *generators), Features(model) as ours, Features(teacher) as theirs:
        logits = model(x)
        teacher(x)
        wanted = nn.functional.cross_entropy(logits, y) + csd_loss(ours.take(), theirs.take())
    assert float(loss.detach()) == float(wanted.detach())


def test_noise_for_another_package_has_the_steps_it_is_told():
    """A function is asked each time, as a step size may be learned."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)).train()
    x, step, seen = torch.randn(64, 1, 8, 8), torch.tensor(0.0), []
    with StochasticFeaturePerturbation(model, p=1.0, step_sizes={"0": lambda: step}) as noise:
        assert [layer for layer, _ in noise.sites] == [model[0]]
        model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for size in (0.25, 1.0):
            step.fill_(size)
            model(x)
            assert 0.49 * size < float((seen[-1] - x).abs().max()) <= 0.5 * size + 1e-6


def test_a_copy_of_a_network_under_noise_is_not_perturbed_and_draws_nothing():
    model = quantize(tiny(), QuantSpec.parse("W4A4"))
    x = torch.randn(8, 1, 8, 8)
    calibrate(model, x, "mse")
    model.train()
    clean = copy.deepcopy(model)(x)
    with StochasticFeaturePerturbation(model, p=1.0) as noise, CSDLoss(model, tiny().eval()) as csd:
        states = [g.get_state() for g in (noise.generator, noise.gate_generator)]
        assert torch.equal(copy.deepcopy(model)(x), clean)
        assert all(map(torch.equal, states, (g.get_state() for g in (noise.generator, noise.gate_generator))))
        assert not csd.pair[0].outputs
        assert not torch.equal(model(x), clean)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StochasticFeaturePerturbation(tiny(), 0.1), "nothing would get noise"),
        (lambda: StochasticFeaturePerturbation(tiny(), 1.5), "p is 1.5"),
        (lambda: StochasticFeaturePerturbation(tiny(), step_sizes={"conv1": torch.ones(())}), "no layer 'conv1'"),
        (lambda: StochasticFeaturePerturbation(tiny(), site="before", step_sizes={}), "before one of this package"),
        (lambda: CSDLoss(tiny(), nn.Sequential(nn.Linear(2, 2))), "another network"),
        (lambda: CSDLoss(nn.Linear(2, 2), nn.Linear(2, 2)), "no convolution"),
        (lambda: CSDLoss(tiny(), tiny(), "max"), "known are mean and sum"),
        (lambda: CSDLoss(tiny(), tiny())(torch.zeros(2, 1, 8, 8)), "training mode"),
        (lambda: CSDLoss(tiny(), tiny().eval())(torch.zeros(2, 1, 8, 8)), "has not run"),
    ],
)
def test_parts_that_cannot_work_say_so(make, message):
    with pytest.raises(UserError, match=message):
        make()

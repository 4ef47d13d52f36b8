"""Checkpoints of other programs: what is read, what is refused, and that it is measured as it was trained."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from fpq_analysis import (
    ForeignRuns,
    LandscapeSettings,
    QuantSpec,
    UserError,
    calibrate,
    hessian_trace,
    measure,
    measure_landscapes,
    quantize,
    records,
)
from fpq_analysis.cli import app
from fpq_analysis.data import load_dataset, parse_normalization, training_sample
from fpq_analysis.models import build_model
from fpq_analysis.pipeline.plan import plan
from fpq_analysis.pipeline.task import Sampling
from fpq_analysis.plots import figure5
from fpq_analysis.probes import HessianTrace
from fpq_analysis.records.comparison import by_epoch
from fpq_analysis.runs.foreign import ForeignCheckpoint, foreign_epochs, left_out
from fpq_analysis.runs.inspection import inspect_checkpoint, inspect_run
from fpq_analysis.runs.states import find_state
from tests.nets import dense_hessian, tiny
from tests.test_files import Canary
from tests.words import words

NET = "tests.nets:tiny"
FAST = {"n_data": 16, "device": "cpu"}


def save(path, content=None, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    torch.save(tiny().state_dict() if content is None else content, path)
    return path


def state_of(path, **settings):
    """The state of the network that is built from a file, by the names of `tiny`."""
    runs = ForeignRuns(path.parent, NET, "digits", **settings)
    return runs.read_checkpoint(path).build().state_dict()


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output + repr(result.exception)
    assert "Traceback" not in result.output
    return result


# ---- which file is which epoch


@pytest.mark.parametrize(
    ("name", "epoch"),
    [
        ("epoch_3.pth", 3),
        ("epoch_0012.pt", 12),
        ("resnet18-cifar10-epoch7-acc93.25.pth.tar", 7),
        ("epoch=4-step=1560.ckpt", 4),
        ("Ep5.ckpt", 5),
        ("checkpoint_20.pth.tar", 20),
        ("model-3-0.75.pt", 3),
        ("step_200.safetensors", 200),
        ("resnet18-f37072fd.pth", None),
        ("best.pth", None),
    ],
)
def test_epochs_by_name(tmp_path, name, epoch):
    touch(tmp_path, name, "0.pt")
    assert foreign_epochs(tmp_path).get(epoch, tmp_path / "best.pth").name == (
        name if epoch is not None else "best.pth"
    )


def test_names_without_numbers(tmp_path):
    assert foreign_epochs(touch(tmp_path / "a", "early.pt", "late.pt", "notes.txt")) == {
        0: tmp_path / "a" / "early.pt",
        1: tmp_path / "a" / "late.pt",
    }
    run = touch(tmp_path / "b", "epoch_1.pth", "epoch_10.pth", "epoch_9.pth", "best.pth")
    assert list(foreign_epochs(run)) == [1, 9, 10]
    assert left_out(run) == [run / "best.pth"]


def test_two_files_of_one_epoch(tmp_path):
    touch(tmp_path, "epoch_3.pth", "epoch_3.safetensors")
    with pytest.raises(UserError, match=r"'epoch_3.pth' and 'epoch_3.safetensors' .* both of epoch 3"):
        foreign_epochs(tmp_path)


def test_a_file_that_says_another_epoch_than_its_name(tmp_path):
    for epoch, inside in ((1, 1), (2, 7)):
        save(tmp_path / f"epoch_{epoch}.pt", {"epoch": inside, "state_dict": tiny().state_dict()})
    source = ForeignRuns(tmp_path, NET, "digits")
    with warnings.catch_warnings(action="error"):
        assert source.read_checkpoint(tmp_path / "epoch_1.pt").epoch == 1
    with pytest.warns(UserWarning, match=r"epoch_2.pt' says that it is of epoch 7, .* of 2\. The name counts"):
        assert source.read_checkpoint(tmp_path / "epoch_2.pt").epoch == 2
    assert inspect_checkpoint(tmp_path / "epoch_2.pt").set_index("field")["value"]["epoch"] == "7"


def test_a_run_of_ours_with_a_strange_file(tiny_runs, tmp_path):
    run = shutil.copytree(tiny_runs / "fp", tmp_path / "fp")
    (run / "epoch_0002.safetensors").touch()  # an export
    assert list(foreign_epochs(run)) == [0, 1, 2]
    (run / "best.pth").touch()
    with pytest.raises(UserError, match=r"another program too \('best.pth'\)"):
        foreign_epochs(run)


# ---- what a file may look like


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"epoch": 3, "state_dict": s, "best_acc1": 0.5, "optimizer": {"lr": 0.1}},
        lambda s: {"model": s, "epoch": 1},
        lambda s: {"model_state_dict": s},
        lambda s: {"net": s, "acc": 93.1},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
        lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
        lambda s: {
            "pytorch-lightning_version": "2.4.0",
            "state_dict": {**{f"model.{k}": v for k, v in s.items()}, "criterion.weight": torch.ones(10)},
        },
        lambda s: {"state_dict": {f"net.{k}": v for k, v in s.items()}},
        lambda s: {"n_averaged": torch.tensor(3), **{f"module.{k}": v for k, v in s.items()}},  # AveragedModel
        lambda s: OrderedDict((k, nn.Parameter(v, requires_grad=False)) for k, v in s.items()),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_usual_forms(tmp_path, wrap, legacy):
    state = tiny().state_dict()
    path = tmp_path / "epoch_1.pth.tar"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=not legacy)
    assert same(state_of(path), state)


def test_old_files_lack_counters(tmp_path):
    state = tiny().state_dict()
    old = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    assert same(state_of(save(tmp_path / "a.pth", old)), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(tmp_path, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny().state_dict().items()}
    found = state_of(save(tmp_path / "a.pth", state))
    assert {t.dtype for t in found.values()} == {torch.float32, torch.int64}
    assert all(torch.equal(found[k], state[k].float()) for k in found if found[k].is_floating_point())


def test_safetensors(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    state, path = tiny().state_dict(), tmp_path / "epoch_2.safetensors"
    safetensors.save_file(state, path)
    assert same(state_of(path), state)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short or damaged"):
        state_of(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"pip install 'fpq-analysis\[export\]'"):
        state_of(path)


# ---- what is refused


def test_nothing_in_a_file_is_run(tmp_path):
    canary = tmp_path / "canary"
    save(tmp_path / "epoch_1.ckpt", {"state_dict": tiny().state_dict(), "callbacks": Canary(canary)})
    with pytest.raises(UserError, match=r"would have to run code to load. Nothing was run"):
        state_of(tmp_path / "epoch_1.ckpt")
    save(tmp_path / "epoch_2.pt", tiny())  # a whole module
    with pytest.raises(UserError, match="save its state_dict"):
        state_of(tmp_path / "epoch_2.pt")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3, "lr": 0.1}, r"no state dict, alone or under one of state_dict, .*: it holds 'epoch', 'lr'"),
        ([1, 2], "it holds a list"),
        ({}, "it holds nothing"),
        (tiny(7).state_dict(), r"1.* of another shape .*'11.weight' is \(7, 16\) .* to give 10 classes"),
        ({k: v for k, v in tiny().state_dict().items() if k != "3.weight"}, r"1 tensor missing.*'3.weight'"),
        ({**tiny().state_dict(), "12.bias": torch.ones(1)}, r": 1 tensor unknown.*'12.bias'"),
        ({**tiny().state_dict(), "0.weight": torch.full((8, 1, 3, 3), torch.nan)}, "NaN or infinity in 1 of"),
        ({**tiny().state_dict(), "3.weight": torch.ones(8, 8, 3, 3, dtype=torch.uint8)}, "'3.weight' as uint8"),
        (
            {f"{net}.{k}": v for net in ("student", "teacher") for k, v in tiny().state_dict().items()},
            "several networks of this form, under 'student.' and 'teacher.'",
        ),
        (quantize(tiny(), QuantSpec.parse("W4A4")).state_dict(), "say its widths: --bits W4A4"),
    ],
)
def test_files_that_do_not_fit(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as raised:
        state_of(save(tmp_path / "epoch_1.pt", content))
    assert "epoch_1.pt" in str(raised.value) or "NaN" in message


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match="No checkpoint"):
        state_of(tmp_path / "a.pt")
    with pytest.raises(UserError, match="No checkpoint"):
        state_of(tmp_path / "a.safetensors")
    path = save(tmp_path / "a.pt")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="cut short or damaged"):
        state_of(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet2"}, "did you mean 'resnet20'"),
        ({"normalize": "imagnet"}, "did you mean 'imagenet'"),
        ({"normalize": "0.5,0.5/0.2"}, "no normalisation"),
        ({"normalize": "0.5/0"}, "no normalisation"),
        ({"image_size": 0}, "image size is 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        ForeignRuns(**{"folder": "runs", "model": NET, "data": "digits", **settings})


def test_data_that_are_not_there_are_one_error(tmp_path):
    save(tmp_path / "epoch_1.pt")
    with pytest.raises(UserError, match="Unknown data set 'digit'"):
        plan(ForeignRuns(tmp_path, NET, "digit"), HessianTrace())
    with pytest.raises(UserError, match="2 channels, and the images of 'digits' have 1"):
        plan(ForeignRuns(tmp_path, NET, "digits", normalize="0.5,0.5/0.2,0.2"), HessianTrace())


# ---- factories


class Strict(nn.Linear):
    def __init__(self, num_classes):
        super().__init__(4, num_classes)


def any_keyword(**keywords):
    return Strict(**keywords)


def broken(num_classes, **keywords):
    raise TypeError("got an unexpected keyword argument 'num_classes'")


def broken_inside(**keywords):
    return len(3)


def test_factories_get_what_they_take():
    assert build_model("torchvision.models:resnet18", 7, 3).fc.out_features == 7
    assert build_model("tests.test_foreign:any_keyword", 7, 3).out_features == 7
    assert build_model("tests.test_foreign:Strict", 7, 3).out_features == 7
    with pytest.raises(UserError, match="failed: TypeError: got an unexpected keyword argument 'num_classes'"):
        build_model("tests.test_foreign:broken", 7, 3)  # named in its signature: an error of its own
    with pytest.raises(UserError, match=r"failed: TypeError: object of type 'int' has no len"):
        build_model("tests.test_foreign:broken_inside", 7, 3)


class Fails(nn.Module):
    """A network of the state of `tiny` that does not run, or gives something else."""

    def __init__(self, how):
        super().__init__()
        for name, module in tiny().named_children():
            self.add_module(name, module)
        self.how = how

    def forward(self, x):
        if self.how == "size":
            return F.linear(x.flatten(1), torch.ones(10, 784))
        return (torch.ones(len(x), 10),) * 2 if self.how == "tuple" else torch.ones(len(x), 3)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("size", r"fails on an image of 'digits', 1 x 8 x 8 .*--image-size"),
        ("tuple", r"gives a tuple, .*0 \(1x10\), 1 \(1x10\)"),
        ("few", r"gives \(1, 3\) for one image"),
    ],
)
def test_networks_that_do_not_run(tmp_path, how, message):
    save(tmp_path / "epoch_1.pt")
    with pytest.raises(UserError, match=message):
        measure(ForeignRuns(tmp_path, lambda: Fails(how), "digits"), HessianTrace(), **FAST)


# ---- how images are prepared


def test_images_as_another_program_fed_them():
    from torchvision.transforms.functional import resize

    digits = load_dataset("digits")
    prepared = digits.prepared(image_size=16, channels=3, normalize="imagenet")
    raw = digits.train.images[:5]
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in parse_normalization("imagenet"))
    expected = (resize(raw.float() / 255, [16, 16], antialias=True).repeat(1, 3, 1, 1) - mean) / std
    assert torch.allclose(prepared.normalize(raw), expected, atol=1e-6)
    assert (prepared.channels, prepared.size, prepared.fingerprint != digits.fingerprint) == (3, 16, True)
    plain = digits.prepared(image_size=8, channels=1, normalize="data")
    assert plain.fingerprint == digits.fingerprint  # so that they can be compared with runs of ours
    none = digits.prepared(image_size=None, channels=1, normalize="none").normalize(raw)
    assert torch.equal(none, raw.float() / 255)
    numbers = digits.prepared(image_size=None, channels=1, normalize="0.5/0.5")
    assert numbers.fingerprint == digits.prepared(image_size=None, channels=1, normalize="half").fingerprint
    assert parse_normalization("0.1,0.2,0.3/1,2,3") == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


def test_measured_as_trained(tmp_path):
    """The record is the trace that Python gives for the same network, images, size and normalisation."""
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    net = squeezenet1_1(num_classes=10).eval()
    save(tmp_path / "epoch_1.pth", {"state_dict": {f"module.{k}": v.half() for k, v in net.state_dict().items()}})
    runs = ForeignRuns(
        tmp_path, "torchvision.models:squeezenet1_1", "digits", image_size=32, normalize="0.4,0.5,0.6/0.2,0.3,0.4"
    )
    row = measure(runs, HessianTrace(), n_data=4, device="cpu").iloc[-1]
    net.load_state_dict({k: v.half().float() for k, v in net.state_dict().items()})
    images, labels = training_sample(load_dataset("digits"), 4, 0)
    digits = load_dataset("digits")
    images = (images * digits.std[0] + digits.mean[0]).repeat(1, 3, 1, 1)  # back to [0, 1]
    images = F.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    expected = hessian_trace(net, ((images - mean) / std, labels))
    assert row["value"] == pytest.approx(expected.value, rel=1e-4)
    assert (row["estimator"], row["model"], row["dataset"]) == ("exact", "torchvision.models:squeezenet1_1", "digits")


# ---- from a folder to Figure 5


def test_a_folder_of_state_dicts(tmp_path):
    for epoch in (0, 1, 2):
        save(tmp_path / "own" / f"epoch_{epoch}.pth", seed=epoch)
    runs = ForeignRuns(tmp_path, tiny, "digits")
    frame = measure(runs, HessianTrace(), **FAST)
    totals = frame[(frame["layer"] == "all") & (frame["quantity"] == "trace")]
    assert totals["epoch"].tolist() == [0, 1, 2]
    first = totals.iloc[0]
    assert (first["run"], first["method"], first["bits"], first["train_seed"]) == ("own", "fp", "FP", "unknown")
    assert first["model"] == NET
    model = tiny()
    model.load_state_dict(torch.load(tmp_path / "own" / "epoch_2.pth"))
    expected = hessian_trace(model, training_sample(load_dataset("digits"), 16, 0)).value
    assert totals["value"].iloc[-1] == pytest.approx(expected, rel=1e-5)
    assert (tmp_path / "own" / "records" / "hessian_trace.jsonl").exists()
    assert figure5(records.load(tmp_path, "hessian_trace")).axes[0].lines[0].get_xdata().tolist() == [0, 1, 2]
    # Measured once; as another network, with other images or another file it is another measurement.
    assert not plan(runs, HessianTrace(), Sampling(16)).measurements
    for other in ({"model": "tests.test_foreign:leaky"}, {"normalize": "none"}, {"image_size": 9}):
        settings = {"folder": tmp_path, "model": NET, "data": "digits", **other}
        assert len(plan(ForeignRuns(**settings), HessianTrace(), Sampling(16)).measurements) == 3
    save(tmp_path / "own" / "epoch_2.pth", seed=7)
    assert len(plan(runs, HessianTrace(), Sampling(16)).measurements) == 1


def leaky(num_classes=10):
    net = tiny(num_classes)
    net[2] = nn.LeakyReLU()
    return net


def test_beside_a_run_of_ours(tiny_runs, tmp_path):
    shutil.copytree(tiny_runs / "fp", tmp_path / "ours")
    for epoch in (1, 2):
        state = torch.load(tmp_path / "ours" / f"epoch_000{epoch}.pt")["state_dict"]
        save(tmp_path / "theirs" / f"{epoch}.pt", state)
    own = measure(tmp_path / "ours", HessianTrace(), model=NET, **FAST)
    runs = ForeignRuns(tmp_path, NET, "digits")
    assert len(plan(runs, HessianTrace(), Sampling(16, model=NET)).done) == 3  # ours keep their key
    frame = measure(runs, HessianTrace(), model=NET, **FAST)
    totals = frame[(frame["layer"] == "all") & (frame["quantity"] == "trace")]
    assert sorted(totals["train_seed"].unique()) == ["0", "unknown"]
    differences = by_epoch(*(totals[totals["run"] == run] for run in ("theirs", "ours")))
    assert [(d.epoch, d.value, d.sem, d.paired) for d in differences] == [(1, 0, 0, True), (2, 0, 0, True)]
    assert len(own) < len(frame)


def test_our_files_without_their_run_file(tiny_runs, tmp_path):
    shutil.copy(tiny_runs / "lsq-w4a4" / "epoch_0002.pt", tmp_path)
    content = ForeignRuns(tmp_path, NET, "digits").read_checkpoint(tmp_path / "epoch_0002.pt")
    assert content.quant is not None
    assert not isinstance(content, ForeignCheckpoint)


def test_a_quantized_network_of_ones_own(tmp_path):
    torch.manual_seed(0)
    batch = training_sample(load_dataset("digits"), 16, 0)
    net = quantize(tiny(), QuantSpec.parse("W4A4"))
    calibrate(net, batch[0], "mse")
    save(tmp_path / "epoch_1.pt", {"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}})
    runs = ForeignRuns(tmp_path, NET, "digits", quant=QuantSpec.parse("W4A4"))
    for definition in ("dequantized", "latent"):
        row = measure(runs, HessianTrace(definition), **FAST).iloc[-1]
        # In the layout of measurements: in another one rounding may put a feature on the next level.
        expected = hessian_trace(net.to(memory_format=torch.channels_last), batch, definition=definition)
        assert row["value"] == pytest.approx(
            expected.clipped_fraction if row["quantity"] != "trace" else expected.value
        )
        assert (row["method"], row["bits"]) == ("lsq", "W4A4")
    path = save(tmp_path / "float" / "epoch_1.pt")
    with pytest.raises(UserError, match="tensors missing"):
        state_of(path, quant=QuantSpec.parse("W4A4"))


def test_landscapes(tmp_path):
    """Centre, trajectory in the order of the epochs, and ends are the losses of the networks in the files."""
    run = tmp_path / "own"
    x, y = training_sample(load_dataset("digits"), 16, 0)
    losses = {}
    for epoch in (2, 9, 10):  # 10 is the last, though not by name
        path = save(run / f"epoch_{epoch}.pth", seed=epoch)
        net = tiny().eval()
        net.load_state_dict(torch.load(path))
        losses[epoch] = F.cross_entropy(net(x), y).item()
    runs = ForeignRuns(tmp_path, NET, "digits")

    def values(frame, kind):
        return frame.loc[frame["quantity"].str.startswith(kind), "value"].tolist()

    frame = measure_landscapes(runs, LandscapeSettings(points=3), **FAST)
    assert set(frame["epoch"]) == {10}
    assert values(frame, "loss_2_2") == pytest.approx([losses[10]], rel=1e-6)
    frame = measure_landscapes(runs, LandscapeSettings("pca", points=4), **FAST)
    points = frame[frame["quantity"].str.startswith("point_")]
    assert points["epoch"].tolist() == [2, 9, 10]
    assert points["value"].tolist() == pytest.approx(list(losses.values()), rel=1e-6)
    ends = [run / "epoch_2.pth", run]
    frame = measure_landscapes(runs, LandscapeSettings("checkpoints", dim=1, points=4), through=ends, **FAST)
    assert values(frame, "point_") == pytest.approx([losses[2], losses[10]], rel=1e-6)
    # Drawn once; with images prepared otherwise it is another landscape.
    assert not plan(runs, LandscapeSettings(points=3), Sampling(16), epochs="last").n_left
    other = ForeignRuns(tmp_path, NET, "digits", normalize="none")
    assert plan(other, LandscapeSettings(points=3), Sampling(16), epochs="last").n_left == 9
    save(run / "epoch_10.pt")
    with pytest.raises(UserError, match="both of epoch 10"):
        measure_landscapes(runs, LandscapeSettings(points=3), **FAST)
    with pytest.raises(UserError, match="fails on an image of 'digits'"):
        measure_landscapes(ForeignRuns(save(tmp_path / "b" / "1.pt").parent, fails_by_size, "digits"), **FAST)


def fails_by_size():
    return Fails("size")


def test_torchvisions_blocks_are_measured_exactly():
    """In-place ReLU behind BatchNorm, and `out += identity`, against the dense Hessian."""
    from torchvision.models.resnet import BasicBlock

    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(2, 3, 1, 2, bias=False), nn.BatchNorm2d(3))
    net = nn.Sequential(
        *(nn.Conv2d(1, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)),
        *(BasicBlock(2, 2), BasicBlock(2, 3, 2, down), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)),
    ).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    x, y = torch.randn(4, 1, 12, 12, dtype=torch.float64), torch.randint(3, (4,))
    trace = hessian_trace(net.eval(), (x, y))
    assert trace.method == "exact"
    dense = dense_hessian(net, list(net.parameters()), x, y)
    assert trace.value == pytest.approx(float(dense.trace()), rel=1e-10)
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    parts = dict(zip(sizes, dense.diagonal().split(list(sizes.values())), strict=True))
    for layer in ("0", "5.downsample.0", "4.bn1", "8"):
        expected = sum(float(d.sum()) for name, d in parts.items() if name.rpartition(".")[0] == layer)
        assert trace.per_layer[layer] == pytest.approx(expected, rel=1e-9)


# ---- the command line


@pytest.fixture
def own(tmp_path):
    for epoch in (1, 2):
        save(tmp_path / "own" / f"epoch_{epoch}.pth", seed=epoch)
    save(tmp_path / "own" / "best.pth")
    return tmp_path / "own"


OPTIONS = ("--model", NET, "--data", "digits", "--normalize", "none", "--n-data", 16, "--device", "cpu")


def test_commands(own, tmp_path):
    result = call("hessian", "--ckpt-dir", own, *OPTIONS, "--figures", tmp_path / "figures")
    assert "0 done, 2 to do" in words(result.stderr)
    assert "best.pth' is left out" in words(result.stderr)
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:3]] == [["own", "1"], ["own", "2"]]
    assert "training seed unknown" in (tmp_path / "figures" / "figure5.txt").read_text()
    assert "2 done, 0 to do" in words(call("hessian", "--ckpt-dir", own, *OPTIONS, "--dry-run").stderr)
    call("figures", "5", "--ckpt-dir", own, *OPTIONS, "--out", tmp_path / "again")
    captions = [(tmp_path / folder / "figure5.txt").read_text() for folder in ("figures", "again")]
    assert captions[0] == captions[1]
    shutil.copytree(own, tmp_path / "other")
    rows = call("compare", own, tmp_path / "other", *OPTIONS, "--json").stdout.splitlines()
    assert [json.loads(row)["value"] for row in rows] == [0, 0]


def test_a_comparison_of_estimates_says_that_its_interval_is_over_the_probes(own, tmp_path):
    shutil.copytree(own, tmp_path / "other")
    smooth = "tests.nets:smooth", *OPTIONS[2:]
    said = words(call("compare", own, tmp_path / "other", "--model", *smooth).stdout)
    assert "± is the error of the random probes alone, for these samples" in said
    assert "random probes" not in words(call("compare", own, tmp_path / "other", *OPTIONS).stdout)


@pytest.mark.parametrize("where", ["--ckpt-dir", "--through"])
def test_landscape(own, tmp_path, where):
    (own / "epoch_2.pth").rename(own / "epoch_10.pth")  # behind epoch 9 in order, not by name
    save(own / "epoch_9.pth", seed=9)
    folders = ["--ckpt-dir", own, "--plane", "pca"] if where == "--ckpt-dir" else ["--ckpt-dir", own]
    if where == "--through":
        folders += ["--through", own / "epoch_1.pth", "--through", own]
    result = call("landscape", *folders, *OPTIONS, "--dim", 1, "--points", 3, "--figures", tmp_path, "--json")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    grid = {row["epoch"] for row in rows if row["quantity"].startswith("rise")}
    assert grid == {10 if where == "--ckpt-dir" else 1}
    assert {row["epoch"] for row in rows} == ({1, 9, 10} if where == "--ckpt-dir" else {1, 10})
    assert {row["train_seed"] for row in rows} == {"unknown"}
    assert (own / "records" / "landscape.jsonl").exists()


def test_landscapes_by_command(tmp_path, monkeypatch):
    """Of a network of torchvision with BatchNorm in branches."""
    from torchvision.models import shufflenet_v2_x0_5

    run = tmp_path / "shuffle"
    for epoch in (1, 2, 3):
        torch.manual_seed(epoch)
        save(run / f"checkpoint_{epoch}.pth.tar", {"state_dict": shufflenet_v2_x0_5(num_classes=10).state_dict()})
    monkeypatch.setattr("fpq_analysis.cli.measuring.draw", lambda *arguments: [])
    network = "torchvision.models:shufflenet_v2_x0_5"
    common = ["--model", network, "--data", "digits", "--image-size", 16, "--n-data", 8, "--device", "cpu"]
    here = ["--ckpt-dir", tmp_path, "--points", 5]
    ends = ["--through", run / "checkpoint_1.pth.tar", "--through", run, "--points", 4]
    for arguments, how in (
        ([*here, "--dim", 1], "filter-normalised"),
        ([*here, "--plane", "pca", "--dim", 1], "PCA of 3 checkpoints"),
        (ends, "line from checkpoint 1"),
    ):
        text = words(call("landscape", *arguments, *common).stdout)
        assert f"network: {network}" in text
        assert how in text


@pytest.mark.parametrize("command", ["noise", "oscillation"])
def test_measurements_of_quantized_networks(tmp_path, command):
    batch = training_sample(load_dataset("digits"), 16, 0)
    for epoch in (1, 2):
        torch.manual_seed(epoch)
        net = quantize(tiny(), QuantSpec.parse("W4A4"))
        calibrate(net, batch[0], "mse")
        save(tmp_path / "own" / f"epoch_{epoch}.pt", net.state_dict())
    options = ["--model", NET, "--data", "digits", "--bits", "W4A4", "--device", "cpu"]
    size = ["--n-data", 8, "--n-draws", 2, "--sizes", "1"] if command == "noise" else []
    result = call(command, "--ckpt-dir", tmp_path, *options, *size, "--figures", tmp_path / "figures")
    assert "0 done, 1 to do" in words(result.stderr)  # the last epoch; the one with another before it
    assert "own" in result.stdout


def test_every_measuring_command_reads_them():
    options = [set(inspect.signature(command.callback).parameters) for command in app.registered_commands]
    measuring = [names for names in options if {"ckpt_dir", "model"} <= names]
    assert len(measuring) >= 9
    assert all({"data", "image_size", "normalize", "bits"} <= names for names in measuring)


def test_measurements_of_quantized_networks_say_so(own):
    result = call("noise", "--ckpt-dir", own, *OPTIONS)
    assert "what noise needs: the network is quantized" in words(result.stderr)


def test_doctor_and_inspect(own):
    result = call("doctor", own / "epoch_2.pth", *OPTIONS)
    assert "0 faults" in words(result.stderr)
    assert "--data NAME" in words(call("inspect", own / "epoch_2.pth").stdout)
    assert inspect_run(own)["epoch"].tolist() == [1, 2]
    nested = save(own / "epoch_3.pth", {"model": {"state_dict": tiny().state_dict()}})
    assert dict(inspect_checkpoint(nested).values.tolist())["kind"] == "foreign state dict, under 'model', 'state_dict'"


def test_misuse(own):
    text = words(call("hessian", "--ckpt-dir", own, code=1).stderr)
    assert "--model package.module:factory --data NAME" in text
    assert "--data NAME" in words(call("hessian", "--ckpt-dir", own, "--image-size", 9, code=1).stderr)
    assert "must be named too: --model" in words(call("hessian", "--ckpt-dir", own, "--data", "digits", code=1).stderr)
    assert "not a bit width" in words(call("hessian", "--ckpt-dir", own, *OPTIONS, "--bits", "4", code=1).stderr)
    (own / "epoch_1.pth").write_bytes(b"nothing")
    result = call("hessian", "--ckpt-dir", own, *OPTIONS, code=1)
    assert "1 of 2 checkpoints could not be measured" in words(result.stderr)
    assert "epoch_1.pth' cannot be read" in words(result.stderr)


def test_an_error_that_many_files_share_is_said_once(own):
    for path in sorted(own.glob("*.pth")):
        state = torch.load(path)
        torch.save({name: t for name, t in state.items() if name != list(state)[-1]}, path)
    text = words(call("hessian", "--ckpt-dir", own, *OPTIONS, code=1).stderr)
    assert text.count("does not fit the model") == 1
    assert "The same holds of 1 more file." in text


def test_find_state_is_not_fooled():
    assert find_state({"loss": torch.ones(1), "epoch": 3}) == ({}, ())
    assert find_state({"model": None, "net": {"w": torch.ones(1)}})[1] == ("net",)
    assert find_state(None) == ({}, ())
    adam = {"state": {0: {"step": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]}
    assert find_state({"model_state": {"w": torch.ones(1)}, "optimizer": adam})[1] == ("model_state",)
    assert find_state({"student": {"w": torch.ones(1)}, "teacher": {"w": torch.ones(1)}}) == ({}, ())


def linear_that_prints():
    print("a network of one layer")
    warnings.warn("not a good one", stacklevel=1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_runs_of_different_networks_are_compared_and_what_factories_print_is_not_among_the_rows(tmp_path):
    save(tmp_path / "a" / "epoch_1.pt")
    save(tmp_path / "b" / "epoch_1.pt", linear_that_prints().state_dict())
    given = ["--model", NET, "--data", "digits", "--n-data", 16, "--device", "cpu", "--json"]
    other = ["--model-b", "tests.test_foreign:linear_that_prints"]
    (row,) = map(json.loads, call("compare", tmp_path / "a", tmp_path / "b", *given, *other).stdout.splitlines())
    settings = {"a": NET, "b": linear_that_prints}
    mine, theirs = (
        measure(ForeignRuns(tmp_path / run, network, "digits"), HessianTrace(), **FAST).query("layer == 'all'")
        for run, network in settings.items()
    )
    found = [frame[frame["quantity"] == "trace"]["value"].item() for frame in (mine, theirs)]
    assert row["value"] == pytest.approx(found[0] - found[1], rel=1e-6)
    assert row["baseline_value"] == pytest.approx(found[1], rel=1e-6)

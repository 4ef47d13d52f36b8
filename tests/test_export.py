"""Files for other programs hold the network that was trained, to the bit where that can be."""

from __future__ import annotations

import builtins
import json
import re
import shutil
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fpq_analysis import TrainConfig, UserError, calibrate, load, quantize
from fpq_analysis.methods import METHODS
from fpq_analysis.quantizers import LSQ, quantizers
from fpq_analysis.runs.checkpoint import Checkpoint
from fpq_analysis.runs.export import export, export_onnx, export_safetensors, grids
from tests.nets import tiny
from tests.test_cli import call
from tests.words import words

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
safetensors = pytest.importorskip("safetensors.torch")

TINY = "tests.nets:tiny"


def padded(num_classes: int = 10, in_channels: int = 1) -> nn.Module:
    """A layer without a name (the model itself is none), a residual pad, a linear layer on three axes."""
    from fpq_analysis.models import BasicBlock

    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, padding=1),
        BasicBlock(4, 8, 2, projection=False),
        nn.Flatten(2),
        nn.Linear(16, 6),
        nn.ReLU6(),
        nn.Flatten(),
        nn.Linear(48, num_classes, bias=False),
    )


def content(name: str, bits: str, method: str = "lsq") -> Checkpoint:
    """A calibrated network as a checkpoint."""
    spec = TrainConfig(method=method, bits=bits, init="fp").spec
    net = quantize(globals()[name](), spec)
    calibrate(net, torch.randn(32, 1, 8, 8), "mse")
    data = {"name": "digits", "classes": list("0123456789"), "size": 8, "mean": [0.3], "std": [0.4]}
    about = {"name": f"tests.test_export:{name}", "num_classes": 10, "in_channels": 1}
    return Checkpoint(3, about, asdict(spec), data, {"method": method}, net.state_dict(), "0" * 64)


@pytest.mark.parametrize("bits", ["W4A4", "W2A2", "W3A5", "W10A9", "W4A32", "W32A4"])
def test_onnx_gives_what_torch_gives(bits, tmp_path):
    """Every width, on other images and another batch size than the program's own comparison."""
    made = content("tiny", bits)
    row = export_onnx(made, tmp_path / "net.onnx", TINY).iloc[0]
    assert row["same_class"] > 0.95  # of 64 some may have a value that rounding puts on another level
    assert row["typical"] < 1e-5
    x = torch.randn(7, 1, 8, 8)
    session = ort.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])
    with torch.no_grad():
        ours = made.build(TINY)(x)
    # As of these seven.
    assert (theirs - ours).abs().amax(1).median() < 1e-5
    proto = onnx.load(tmp_path / "net.onnx")
    kinds = {node.op_type for node in proto.graph.node}
    assert ("QuantizeLinear" in kinds) == (not bits.endswith("A32"))
    assert {prop.key: prop.value for prop in proto.metadata_props}["mean"] == "[0.3]"


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.quantized])
def test_every_method_can_be_exported(method, tmp_path):
    """Learned offsets and grids without zero included; the integers give the network's own weights back."""
    made = content("tiny", "W4A3", method)
    row = export_onnx(made, tmp_path / "net.onnx", TINY).iloc[0]
    assert row["typical"] < 1e-5
    net = made.build(TINY)
    export_safetensors(made, tmp_path / "net.safetensors", TINY)
    stored = safetensors.load_file(tmp_path / "net.safetensors")
    for name, grid in grids(net)[0].items():
        codes, scale, zero = (
            stored[f"{name}.{key}"].float() for key in ("weight", "weight_scale", "weight_zero_point")
        )
        offset = stored.get(f"{name}.weight_offset", torch.zeros_like(scale))
        shape = (-1, *[1] * (codes.ndim - 1))
        values = (codes - zero.view(shape)) * scale.view(shape) + offset.view(shape)
        torch.testing.assert_close(values, dict(net.named_modules())[name].weight.detach())
        assert codes.max() <= grid.levels


def test_an_offset(tmp_path, monkeypatch):
    """A grid that does not hold zero, of inputs and of weights."""
    forward = LSQ.forward
    monkeypatch.setattr(LSQ, "offset", 0.07, raising=False)
    monkeypatch.setattr(LSQ, "forward", lambda self, x: forward(self, x - 0.07) + 0.07)
    row = export_onnx(content("tiny", "W4A3"), tmp_path / "net.onnx", TINY).iloc[0]
    assert row["typical"] < 1e-5
    assert any("offset" in tensor.name for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer)


def test_the_weights_in_onnx_are_small_integers(tmp_path):
    export_onnx(content("tiny", "W2A4"), tmp_path / "net.onnx", TINY)
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "net.onnx").graph.initializer}
    assert "3.weight" not in stored
    codes = stored["3.weight.codes"]
    assert codes.data_type == onnx.TensorProto.UINT4
    assert onnx.numpy_helper.to_array(codes).astype(int).max() == 3
    assert stored["0.weight.codes"].data_type == onnx.TensorProto.UINT8  # the first layer has 8 bits


def test_onnx_of_other_layers(tmp_path):
    row = export_onnx(content("padded", "W4A3"), tmp_path / "net.onnx", "tests.test_export:padded").iloc[0]
    assert row["layers"] == 5
    assert row["same_class"] > 0.95
    assert row["typical"] < 1e-5


@pytest.mark.parametrize("bits", ["W4A4", "W2A2", "W10A9", "W4A32", "W32A4"])
def test_safetensors_to_the_bit(bits, tmp_path):
    made = content("tiny", bits)
    export_safetensors(made, tmp_path / "net.safetensors", TINY)
    stored = safetensors.load_file(tmp_path / "net.safetensors")
    net = made.build(TINY)
    layers = dict(net.named_modules())
    for name, quantizer, is_weight in quantizers(net):
        what = "weight" if is_weight else "input"
        scale, zero = stored.pop(f"{name}.{what}_scale"), stored.pop(f"{name}.{what}_zero_point")
        assert torch.equal(scale, quantizer.step_size.detach().flatten() if is_weight else quantizer.step_size)
        if is_weight:
            codes = stored.pop(f"{name}.weight")
            assert not codes.is_floating_point()
            assert 0 <= codes.min() <= codes.max() <= quantizer.levels
            shape = (-1, *[1] * (codes.ndim - 1))
            assert torch.equal((codes.float() - zero.view(shape)) * scale.view(shape), layers[name].weight)
    plain = tiny().state_dict()
    if bits != "W32A4":
        plain = {k: v for k, v in plain.items() if k not in ("0.weight", "3.weight", "6.weight", "11.weight")}
    assert stored.keys() == plain.keys()
    with safetensors.safe_open(tmp_path / "net.safetensors", "pt") as file:
        about = file.metadata()
    assert json.loads(about["classes"]) == list("0123456789")
    if bits == "W2A2":
        assert json.loads(about["bits"]) == {
            f"{i}.{what}": 8 if i in (0, 11) else 2 for what in ("weight", "input") for i in (0, 3, 6, 11)
        }


def test_the_command(tiny_runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_runs / "fpq-w4a4", run)
    result = call("export", run, "--to", "onnx", "--model", TINY)
    said = re.search(r"(\d+) % of the answers as in PyTorch", words(result.stderr))
    assert int(said[1]) >= 95  # of random images: a level that rounding decides may change the answer
    assert (run / "epoch_0002.onnx").stat().st_size > 1000
    out = tmp_path / "new" / "net.safetensors"
    result = call("export", run / "epoch_0001.pt", "--to", "safetensors", "--model", TINY, "--out", out, "--json")
    assert json.loads(result.stdout)["bytes"] == out.stat().st_size
    # The trained network on its own test images.
    from fpq_analysis.data import load_dataset

    data = load_dataset("digits")
    x = data.normalize(data.test.images)
    net = load(run / "epoch_0002.pt", TINY)
    theirs = ort.InferenceSession(run / "epoch_0002.onnx").run(None, {"images": x.contiguous().numpy()})[0]
    with torch.no_grad():
        ours = net(x)
    assert (torch.from_numpy(theirs) - ours).abs().amax(1).median() < 1e-4
    assert (torch.from_numpy(theirs).argmax(1) == ours.argmax(1)).float().mean() > 0.95


def test_bad_input(tiny_runs, tmp_path, monkeypatch):
    fp = tiny_runs / "fp" / "epoch_0002.pt"
    for to in ("onnx", "safetensors"):
        with pytest.raises(UserError, match="float network"):
            export(fp, to, out=tmp_path / "x", model=TINY)
    assert "did you mean 'onnx'" in words(call("export", fp, "--to", "onx", code=1).stderr)
    assert "No checkpoint" in words(call("export", tmp_path / "nothing.pt", code=1).stderr)
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint" in words(call("export", tmp_path / "empty", code=1).stderr)

    real = builtins.__import__
    monkeypatch.setattr(
        "fpq_analysis.runs.export.import_module",
        lambda name: real("no_such_package") if name == "onnxscript" else real(name),
    )
    with pytest.raises(UserError, match=r"pip install 'fpq-analysis\[export\]'"):
        export(tiny_runs / "lsq-w4a4", "onnx", model=TINY)


def test_a_quantizer_of_another_kind_is_refused(monkeypatch):
    """By its values, whatever it is called."""
    net = content("tiny", "W4A4").build(TINY)
    _, quantizer, _ = next(iter(quantizers(net)))
    forward = type(quantizer).forward
    monkeypatch.setattr(type(quantizer), "forward", lambda self, x: forward(self, x) + 0.3 * self.step_size)
    with pytest.raises(UserError, match="'0' is quantized by LSQ, whose values"):
        grids(net)


def test_a_file_that_gives_something_else_is_not_written(tmp_path, monkeypatch):
    from fpq_analysis.runs import export as module

    made = content("tiny", "W4A4")
    original = module.grids

    def wrong(net):
        weights, inputs = original(net)
        for grid in weights.values():
            grid.codes.copy_(grid.codes.flip(0))
        return weights, inputs

    monkeypatch.setattr(module, "grids", wrong)
    with pytest.raises(UserError, match="Nothing was written"):
        export_onnx(made, tmp_path / "net.onnx", TINY)
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    """Does what depends on the images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.fc = nn.Linear(4, 10)

    def forward(self, x):
        x = F.relu(self.conv(x)).mean((2, 3))
        return self.fc(x) if float(x.sum()) > 0 else -self.fc(x)


def branching() -> nn.Module:
    return Branching()


def test_a_network_that_cannot_be_exported(tmp_path):
    with pytest.raises(UserError, match="cannot export this network"):
        export_onnx(content("branching", "W4A4"), tmp_path / "net.onnx", "tests.test_export:branching")

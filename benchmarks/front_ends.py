"""Every front end through the command line: a network trained with each, and what the commands make of its folder.

    python benchmarks/front_ends.py --out FOLDER
    python benchmarks/front_ends.py --out FOLDER brevitas torchao

For each that is installed: a small network is trained on digits for three epochs, as the front end's own documentation
has it, and a state dict saved before and after each; beside it the same network in floating point.  Then `hessian`,
`compare`, `figures 5`, `oscillation`, `landscape` and `report` are run on the folder, with nothing but `--model`.  What
they print is in FOLDER/<front end>/<command>.txt, the pictures beside it.  The table printed here has the traces after
the last epoch, in the three definitions, and the commands that failed: there should be none.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fpq_analysis.choices import DEFINITIONS
from fpq_analysis.data import load_dataset, training_sample
from fpq_analysis.records import load

HERE = Path(__file__).parent
EPOCHS = 3


class Net(nn.Module):
    """Two convolutions with their BatchNorm, a pooling and a classifier; 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.pool, self.flat, self.fc = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return self.fc(self.flat(self.pool(x)))


def mlp() -> nn.Module:
    """For those that quantize linear layers only."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


# --- the front ends: each makes a network prepared for training ---


def torch_ao() -> nn.Module:
    import torch.ao.quantization as ao

    net = nn.Sequential(ao.QuantStub(), Net(), ao.DeQuantStub()).train()
    net[1] = ao.fuse_modules_qat(net[1], [["conv1", "bn1", "relu1"], ["conv2", "bn2", "relu2"]])
    net.qconfig = ao.get_default_qat_qconfig("x86")
    return ao.prepare_qat(net)


def torch_ao_fx() -> nn.Module:
    import torch.ao.quantization as ao
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(Net().train(), ao.get_default_qat_qconfig_mapping("x86"), (torch.zeros(2, 1, 8, 8),))


def learnable() -> nn.Module:
    import torch.ao.quantization as ao
    from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize as Learnable

    scaled = {"use_grad_scaling": True}
    activation = Learnable.with_args(observer=ao.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, **scaled)
    weight = {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric, "quant_min": -8, "quant_max": 7, **scaled}
    weight = Learnable.with_args(observer=ao.MovingAverageMinMaxObserver, **weight)
    net = nn.Sequential(ao.QuantStub(), Net(), ao.DeQuantStub()).train()
    net[1] = ao.fuse_modules_qat(net[1], [["conv1", "bn1", "relu1"], ["conv2", "bn2", "relu2"]])
    net.qconfig = ao.QConfig(activation, weight)
    return ao.prepare_qat(net)


def pt2e() -> nn.Module:
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    batch = {"x": {0: torch.export.Dim("batch")}}
    graph = torch.export.export(Net().train(), (torch.zeros(2, 1, 8, 8),), dynamic_shapes=batch).module()
    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)
    return allow_exported_model_train_eval(prepare_qat_pt2e(graph, x86.X86InductorQuantizer().set_global(config)))


def torchao() -> nn.Module:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    weights = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    net = mlp()
    quantize_(net, QATConfig(activation_config=activations, weight_config=weights, step="prepare"))
    return net


def brevitas() -> nn.Module:
    from brevitas import nn as qnn

    net = Net()
    net.conv1 = nn.Sequential(
        qnn.QuantIdentity(bit_width=8, return_quant_tensor=True),
        qnn.QuantConv2d(1, 8, 3, padding=1, bias=False, weight_bit_width=4),
    )
    net.conv2 = qnn.QuantConv2d(8, 8, 3, padding=1, bias=False, weight_bit_width=4)
    net.relu1, net.relu2 = qnn.QuantReLU(bit_width=4), qnn.QuantReLU(bit_width=4)
    net.fc = qnn.QuantLinear(128, 10, bias=True, weight_bit_width=4)
    return net


def modelopt(start: nn.Module | None = None) -> nn.Module:
    import modelopt.torch.quantization as mtq

    images = digits()[0]
    return mtq.quantize(start or Net(), copy.deepcopy(mtq.INT8_DEFAULT_CFG), lambda net: net(images[:256]))


FRONT_ENDS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (torch_ao, torch_ao_fx, learnable, pt2e, torchao, brevitas, modelopt)
}


# --- training, as their documentation has it: quantized from the start, observers frozen for the last epoch ---


def digits() -> Any:
    data = load_dataset("digits")
    return training_sample(data, len(data.train), 0)


def train(net: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = digits()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    net.train()
    with torch.no_grad():
        net(images[:256])  # scales that are learned are parameters from here on
    torch.save(net.state_dict(), folder / "epoch_0.pt")
    for epoch in range(1, EPOCHS + 1):
        for module in net.modules():
            if epoch == 2 and hasattr(module, "enable_param_learning"):
                module.enable_param_learning()
            elif epoch == EPOCHS and hasattr(module, "disable_observer"):
                module.disable_observer()
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
        torch.save(net.state_dict(), folder / f"epoch_{epoch}.pt")


# --- the commands ---


def commands(name: str, place: Path) -> Iterator[tuple[str, list[str]]]:
    own = ["--model", f"front_ends:{name}", "--data", "digits", "--device", "cpu"]
    network = f"front_ends:{'mlp' if name == 'torchao' else 'Net'}"
    plain = ["--model", network, *own[2:]]
    quantized, float_ = str(place / "runs" / name), str(place / "runs" / "float")
    figures = ["--figures", str(place / "figures")]
    yield "hessian-float", ["hessian", "--ckpt-dir", float_, *plain, "--definition", "all", *figures]
    yield "hessian", ["hessian", "--ckpt-dir", quantized, *own, "--definition", "all", "--top-k", "2", *figures]
    yield "compare", ["compare", quantized, float_, *own, "--model-b", network]
    yield (
        "figures",
        ["figures", "5", "--ckpt-dir", str(place / "runs"), "--no-measure", "--out", str(place / "figures")],
    )
    yield "oscillation", ["oscillation", "--ckpt-dir", quantized, *own, *figures]
    yield "landscape", ["landscape", "--ckpt-dir", quantized, *own, "--points", "7", "--n-data", "256", *figures]
    yield "report", ["report", "--ckpt-dir", str(place / "runs"), "-o", str(place / "report.html")]


def run(name: str, place: Path) -> list[str]:
    """The commands that failed."""
    failed = []
    for title, arguments in commands(name, place):
        done = subprocess.run(
            [sys.executable, "-m", "fpq_analysis", *arguments],
            env=os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}", "COLUMNS": "80"},
            check=False,
            capture_output=True,
            text=True,
        )
        (place / f"{title}.txt").write_text(f"{done.stdout}\n--- log\n{done.stderr}\n--- exit {done.returncode}\n")
        if done.returncode:
            failed.append(title)
    return failed


def traces(folder: Path) -> str:
    """After the last epoch, in the three definitions."""
    rows = load(folder, "hessian_trace")
    last = rows[(rows["layer"] == "all") & (rows["quantity"] == "trace") & (rows["epoch"] == EPOCHS)]
    found = last.set_index("definition")["value"]
    return "".join(f"{found.get(d, float('nan')):13.2f}" for d in DEFINITIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*FRONT_ENDS, []], help="all that are installed")
    parser.add_argument("--out", type=Path, default=Path("front_ends"), help="where it all goes (front_ends)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{'':12}" + "".join(f"{d:>13}" for d in DEFINITIONS) + "  failed")
    for name in args.names or FRONT_ENDS:
        torch.manual_seed(0)
        place = args.out / name
        plain = mlp() if name == "torchao" else Net()
        train(plain, place / "runs" / "float")
        try:  # ModelOpt's documentation quantizes what is trained; the others' begins with any network
            net = modelopt(plain) if name == "modelopt" else FRONT_ENDS[name]()
        except ImportError as error:
            print(f"{name:12}not installed: {error}")
            continue
        train(net, place / "runs" / name)
        failed = run(name, place)
        print(f"{name:12}{traces(place / 'runs' / name)}  {', '.join(failed) or 'none'}", flush=True)


if __name__ == "__main__":
    main()

"""Over several ranks everything comes out as on one: the same processes are one, two, three and four ranks in turn."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from filelock import FileLock
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fpq_analysis as fpq
from fpq_analysis import UserError, over_ranks
from fpq_analysis.curvature import HessianOperator
from fpq_analysis.losses import resolve_loss
from fpq_analysis.ranks import added, gathered, share
from fpq_analysis.ranks.wrapped import unwrapped
from fpq_analysis.training import TrainConfig, train

WORLDS = (1, 2, 3, 4)


def network() -> nn.Module:
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 4, 3, stride=2, bias=False)
    net = nn.Sequential(convolution, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10)).double()
    net(torch.randn(16, 1, 8, 8, dtype=torch.float64))  # statistics
    return net.eval()


def quantized() -> nn.Module:
    net = fpq.quantize(network(), fpq.QuantSpec.parse("W4A4"))
    fpq.calibrate(net, torch.randn(16, 1, 8, 8, dtype=torch.float64), "mse")
    return net.eval()


def samples(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 8, 8, dtype=torch.float64, generator=generator), torch.arange(n) % 10


def product(net: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """H v for a fixed v, of a plain network."""
    net.eval()
    operator = HessianOperator(net, resolve_loss("cross_entropy"), [data], dict(net.named_parameters()))
    return operator.matvec(torch.linspace(-1, 1, operator.size, dtype=operator.dtype))


def trace(net: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> dict[str, object]:
    found = fpq.hessian_trace(net, data)
    return {"value": found.value, "per_layer": found.per_layer, "per_sample": found.per_sample}


def numbers() -> dict[str, object]:
    """One of everything that divides its samples: 7 of them, in micro-batches of 3."""
    net, few = quantized(), {"micro_batch": 3}
    data = samples(7)
    found: dict[str, object] = {
        "trace": trace(net, data),
        "trace of three samples": trace(net, samples(3)),
        "product of three samples": product(network(), samples(3)),
    }
    for definition in ("latent", "float"):
        found[f"trace, {definition}"] = fpq.hessian_trace(net, data, definition=definition, **few).value
    for method, settings in {
        "sampled": {"n_labels": 2},
        "deflated": {"n_products": 8},
        "hutchinson": {"n_products": 4, "operator": "fisher"},
        "xnystrace": {"n_products": 8, "operator": "gauss-newton"},
    }.items():
        found[method] = fpq.hessian_trace(net, data, method=method, **settings, **few).value
    found["to a tolerance"] = fpq.hessian_trace(net, samples(40), method="sampled", tol=0.3).per_sample
    eigs = fpq.hessian_eigs(net, data, 2, tol=1e-6, **few)
    found["eigenvalues"] = eigs.values
    density = fpq.spectral_density(net, data, n_draws=2, n_steps=8, **few)
    found["density"] = [density.nodes, density.weights]
    for name, rows in {
        "gradient norms": fpq.gradient_norms(net, data, n_draws=2, batch_size=3, **few),
        "sharpness": fpq.sharpness(net, data, n_draws=2, n_flips=2, **few),
        "variance": fpq.output_variance(net, data, **few),
        "noise": fpq.noise_response(net, data, sizes=(1.0,), n_draws=2, **few),
    }.items():
        kept = ("value", "sem_data", "samples")
        found[name] = [[row.get(column) for column in kept] for row in rows.rows()]
    line = fpq.landscape(net, data, plane="hessian", dim=1, points=3, **few)
    found["landscape"] = [line.loss, [row["value"] for row in line.rows()]]
    return found


# --- What a rank does ---

SMALL: dict[str, Any] = {"model": "tests.nets:tiny", "epochs": 1, "lr": 0.01}


def silent(line: str) -> None:
    pass


def weights(folder: str, runs: str, **settings: Any) -> dict[str, list[torch.Tensor]]:
    """What an epoch in six steps ends with, from the float run: parameters, and what is left of the loss."""
    found = {}
    for method in ("fp", "sam", "fpq"):
        start = {} if method == "fp" else {"bits": "W4A4", "init": f"{runs}/fp", "sfp_p": 0.0}
        config = TrainConfig(method=method, batch_size=240, **start, **SMALL, **settings)
        row = train(config, Path(folder, method), device="cpu", log=silent).iloc[-1]
        model = fpq.load(Path(folder, method, "epoch_0001.pt"), model="tests.nets:tiny")
        found[method] = [torch.tensor([row["loss"], row["train_accuracy"]]), *(p.detach() for p in model.parameters())]
    return found


def refusal(call) -> str:
    """What every rank is told, and that they are together again afterwards."""
    with pytest.raises(Exception) as caught, over_ranks():
        call()
    return f"{caught.type.__name__}: {caught.value}"


def pair_of_ranks(rank: int, runs: str, folder: str) -> dict[str, object]:
    """What two ranks are enough for."""
    net, data = network(), samples(7)
    found: dict[str, object] = {}

    # Each rank's gradients and statistics are of its own samples, as in training.
    parallel = DistributedDataParallel(copy.deepcopy(net).train())
    nn.functional.cross_entropy(parallel(data[0][3 * rank :][:4]), data[1][3 * rank :][:4]).backward()
    torch.optim.SGD(parallel.parameters(), 0.01).step()
    with over_ranks():
        found["DDP"] = trace(parallel, data)
        found["DDP's product"] = product(unwrapped(parallel), data)
        found["plain weights"] = unwrapped(parallel).state_dict()

    divided = copy.deepcopy(net)
    for part in (divided[0], divided[4]):
        fully_shard(part)
    fully_shard(divided, reshard_after_forward=False)
    with over_ranks():
        found["FSDP"] = trace(divided, data)
        found["FSDP's product"] = product(unwrapped(divided), data)
    found["FSDP stays divided"] = all(type(p).__name__ == "DTensor" for p in divided.parameters())
    nn.functional.cross_entropy(divided(data[0]), data[1]).backward()  # weights are whole until the end of a forward
    found["FSDP goes on"] = [float(p.grad.full_tensor().square().sum()) for p in divided.parameters()]
    rounded = quantized()
    scalars = {p for p in rounded.parameters() if p.ndim == 0}
    fully_shard(rounded, ignored_params=scalars)
    with over_ranks():
        found["FSDP, quantized"] = [trace(rounded, data), fpq.hessian_trace(rounded, data, definition="latent").value]
    with pytest.raises(UserError, match="over_ranks"):
        fpq.hessian_trace(divided, data)

    other = copy.deepcopy(net)
    other[4].weight.data[0, 0] += 1e-12 * rank
    found["refused"] = {
        "data": refusal(lambda: fpq.hessian_trace(net, (data[0].roll(rank, 0), data[1]))),
        "weights": refusal(lambda: fpq.hessian_trace(other, data)),
        "seeds": refusal(lambda: fpq.hessian_trace(net, data, method="hutchinson", seed=rank)),
        "fault of one": refusal(lambda: fpq.hessian_trace(net, data) if rank else net(data)),
        "fault in the middle": refusal(lambda: list(gathered(1 // (1 - rank) for _ in range(1)))),
        "other calls": refusal(lambda: fpq.hessian_trace(net, data) if rank else fpq.hessian_eigs(net, data)),
        "one is done": refusal(lambda: fpq.hessian_trace(net, data) if rank else None),
        "twice": refusal(lambda: over_ranks().__enter__()),
    }
    with over_ranks():
        frame = fpq.measure(
            Path(runs, "fp"), fpq.HessianTrace(), n_data=9, epochs="1,2", model="tests.nets:tiny", records=folder
        )
    found["measure"] = frame.drop(columns="seconds")
    with pytest.raises(UserError, match="No folder"), over_ranks():
        fpq.measure(Path(folder, "nothing"), fpq.HessianTrace())

    with over_ranks():
        found["trained"] = weights(f"{folder}/../trained", runs)
        with pytest.raises(UserError, match="leaves 1 to a part"):
            train(TrainConfig(batch_size=2, **SMALL), Path(folder, "tiny"), log=silent)

    dist.get_backend_config, before = lambda *_: "cuda:nccl", dist.get_backend_config  # with a group of our own
    with over_ranks():
        found["NCCL alone"] = trace(net, data)
    dist.get_backend_config = before
    return found


def processes(rank: int, folder: str, runs: str) -> None:
    for world in WORLDS:
        if rank < world:
            store = dist.FileStore(f"{folder}/store{world}", world)
            patience = timedelta(seconds=60)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
            with over_ranks():
                found = numbers()
            if world == 2:
                found |= pair_of_ranks(rank, runs, f"{folder}/records")
            Path(folder, f"{world}.{rank}").write_bytes(pickle.dumps(found))
            dist.destroy_process_group()


# --- The tests ---


@pytest.fixture(scope="module")
def found(tmp_path_factory, tiny_runs):
    """By number of ranks, what each of them found; one of pytest-xdist's workers has it found for all of them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.getenv("PYTEST_XDIST_WORKER") else base) / "ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            multiprocessing.set_forkserver_preload([__name__])  # torch is imported once for all ranks
            where = str(folder), str(tiny_runs)
            torch.multiprocessing.start_processes(processes, where, nprocs=max(WORLDS), start_method="forkserver")
    return {
        world: [pickle.loads((folder / f"{world}.{rank}").read_bytes()) for rank in range(world)] for world in WORLDS
    } | {"folder": folder}


@pytest.fixture(scope="module")
def alone():
    return numbers()


def check_equal(one, other, tolerance=1e-10, place=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            check_equal(one[key], other[key], tolerance, f"{place} {key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), place
        for i, pair in enumerate(zip(one, other, strict=True)):
            check_equal(*pair, tolerance, f"{place} {i}")
    elif one is None or isinstance(one, str):
        assert one == other, place
    else:
        one, other = (np.asarray(x, dtype=float) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance, err_msg=place)


@pytest.mark.parametrize("world", WORLDS)
def test_everything_is_as_on_one_rank(found, alone, world):
    assert len(alone) == 17
    for of_rank in found[world]:
        check_equal(alone, {name: of_rank[name] for name in alone})


def test_networks_in_ddp_are_measured_without_it_with_the_first_ranks_statistics(found):
    of_ranks = found[2]
    net = network()
    net.load_state_dict(of_ranks[0]["plain weights"])
    for of_rank in of_ranks:
        check_equal(trace(net, samples(7)), of_rank["DDP"])
        check_equal(product(net, samples(7)), of_rank["DDP's product"])


def test_networks_in_fsdp2_are_measured_whole_and_stay_divided(found):
    net, data = network(), samples(7)
    rounded = [trace(quantized(), data), fpq.hessian_trace(quantized(), data, definition="latent").value]
    gradients = torch.autograd.grad(nn.functional.cross_entropy(net(data[0]), data[1]), list(net.parameters()))
    for of_rank in found[2]:
        check_equal(trace(net, data), of_rank["FSDP"])
        check_equal(product(net, data), of_rank["FSDP's product"])
        check_equal(rounded, of_rank["FSDP, quantized"])
        assert of_rank["FSDP stays divided"]
        check_equal([float(g.square().sum()) for g in gradients], of_rank["FSDP goes on"])
        check_equal(trace(net, data), of_rank["NCCL alone"])


@pytest.mark.parametrize(
    ("what", "message"),
    {
        "data": "UserError: The data are not the same on all ranks: 'tensor 1' of rank 1",
        "weights": "UserError: The network is not the same on all ranks: '4.weight' of rank 1",
        "seeds": "UserError: hessian_trace() is called differently on the ranks: seed is 0 on rank 0 and 1 on rank 1",
        "fault of one": "TypeError: ",
        "fault in the middle": "ZeroDivisionError: ",
        "other calls": "UserError: hessian_eigs() is called differently|UserError: hessian_trace() is called diff",
        "one is done": "UserError: The ranks are no longer doing the same thing",
        "twice": "UserError: over_ranks() stands inside another",
    }.items(),
)
def test_what_goes_wrong_on_one_rank_is_raised_on_all(found, what, message):
    for of_rank in found[2]:
        assert of_rank["refused"][what].startswith(tuple(message.split("|")))


def test_measure_writes_on_the_first_rank_what_one_process_would(found, tiny_runs, tmp_path):
    own = fpq.measure(
        tiny_runs / "fp", fpq.HessianTrace(), n_data=9, epochs="1,2", model="tests.nets:tiny", records=tmp_path
    )
    for of_rank in found[2]:
        frame = of_rank["measure"]
        assert list(frame["key"]) == list(own["key"])
        np.testing.assert_allclose(frame["value"], own["value"], rtol=1e-5)
    lines = (found["folder"] / "records/fp/records/hessian_trace.jsonl").read_text().splitlines()
    assert len(lines) == len(own)  # each once


def test_training_on_two_ranks_is_training_on_the_two_halves_of_each_batch(found, tiny_runs, tmp_path):
    alone = weights(str(tmp_path), str(tiny_runs), accumulate=2)
    for of_rank in found[2]:
        check_equal(alone, of_rank["trained"], tolerance=1e-3)
    assert len((found["folder"] / "trained/sam/train.jsonl").read_text().splitlines()) == 2  # each epoch once


def test_samples_are_divided_evenly_and_in_order(monkeypatch):
    class Others:
        def __init__(self, rank, size):
            self.rank, self.size = rank, size

    batches = [{"x": torch.arange(n) + start} for n, start in ((4, 0), (1, 4), (6, 5))]
    for size in (1, 2, 3, 4, 13):
        parts = []
        for rank in range(size):
            monkeypatch.setattr("fpq_analysis.ranks.division._meetings", Others(rank, size))
            parts.append([batch["x"] for batch in share(batches)])
        lengths = [sum(map(len, part)) for part in parts]
        assert max(lengths) - min(lengths) <= 1
        assert torch.equal(torch.cat([x for part in parts for x in part]), torch.arange(11))


def test_without_torch_distributed_nothing_is_divided():
    with pytest.raises(UserError, match="torchrun"), over_ranks():
        pass
    batches = [samples(3)]
    assert share(batches)[0] is batches[0]
    total = torch.zeros(2)
    added((total.add_(1) for _ in range(3)), [total])
    assert total.tolist() == [3, 3]


def test_wrappers_are_taken_off_and_those_further_inside_are_refused():
    net = network()
    assert unwrapped(nn.DataParallel(net)) is net
    assert unwrapped(torch.compile(net)) is net
    found = fpq.hessian_trace(nn.DataParallel(net), samples(4), parameters="0.*")
    assert list(found.per_layer) == ["0"]
    with pytest.raises(UserError, match="'0' of the network is wrapped in DataParallel"):
        fpq.hessian_trace(nn.Sequential(nn.DataParallel(net)), samples(4))


# Ends the second rank when it builds its second network, unless torchrun has started it again.
FACTORY = f"""
import os
from tests.nets import tiny

built = 0

def net(num_classes=10, in_channels=1):
    global built
    built += 1
    if built == 2 and (os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")) == ("1", "0"):
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    return tiny(num_classes, in_channels)
"""


# Python imports a module of this name as it starts. The second rank of the second start comes first to the store in
# which ranks find each other, and must not take what the first start left there.
LATE = """
import os, time

if (os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")) == ("0", "1"):
    time.sleep(3)
"""


def test_a_killed_rank_ends_all_and_the_same_command_goes_on(tiny_runs, tmp_path, monkeypatch):
    (tmp_path / "factory.py").write_text(FACTORY)
    (tmp_path / "sitecustomize.py").write_text(LATE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    where = ["--ckpt-dir", tiny_runs / "fp", "--records", "records", "--model", "factory:net", "--n-data", "9"]
    command = [sys.executable, *launcher, "-m", "fpq_analysis", "hessian", *where, "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    killed, _ = result.stderr.split("hessian_trace: 1 done, 2 to do")
    assert "hessian_trace: 0 done, 3 to do" in killed
    assert "Another rank has ended" in killed or "Stopped." in killed
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    kept = (tmp_path / "records/fp/records/hessian_trace.jsonl").read_text().splitlines()
    assert len(kept) == len(rows)  # each once
    monkeypatch.syspath_prepend(tmp_path)
    alone = fpq.measure(tiny_runs / "fp", fpq.HessianTrace(), n_data=9, model="factory:net", records="alone")
    assert [row["key"] for row in rows] == list(alone["key"])
    np.testing.assert_allclose([row["value"] for row in rows], alone["value"], rtol=1e-5)

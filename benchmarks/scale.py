"""What measuring costs, and how it grows: parameters, images, classes, checkpoints, workers, ranks, files.

    python benchmarks/scale.py                    # everything; two cores: about an hour
    python benchmarks/scale.py cost forecast      # some of it; --quick: a minute each, to see whether it runs

Sections:

- `cost`: seconds of the exact trace, of drawn labels and of a Hessian-vector product against images and classes
  (ResNet-20) and parameters (ResNet-20, MobileNetV2, ResNet-18), on random images.
- `forecast`: what `doctor` expects of the same against what it takes; and, scaled up from what was measured, 40,000
  measurements, and the memory of networks of up to seven billion parameters.
- `jobs`: the exact trace of a run of ResNet-20 checkpoints by `fpq-analyze hessian`, from its start to its end: one
  process of one thread, one of two threads, two of one; half as many checkpoints, too.
- `overhead`: seconds a checkpoint beyond those of the measurement itself, with workers that are warm.
- `ranks`: one network over one and two ranks of one thread each.
- `folder`: peak memory of `fpq-analyze hessian` on image folders of 10,000 and 100,000 files, before and after the
  folder is in the cache.

Weights and images are random, as values do not change the time; BatchNorm has the images' statistics.  Configurations
that are compared take turns.  Nothing is extrapolated but what says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from _common import environment, seconds, settle_batchnorm, write_json
from PIL import Image
from torch import Tensor, nn

from fpq_analysis import ForeignRuns, HessianTrace, hessian_trace, measure
from fpq_analysis.curvature import HessianOperator, as_batches
from fpq_analysis.devices import cores
from fpq_analysis.doctor import forecast_measurements
from fpq_analysis.losses import resolve_loss
from fpq_analysis.models import build_model
from fpq_analysis.pipeline.engines.engine import open_engine

CPU = torch.device("cpu")
GIB = 2**30
# Of an H100 with 80 GB, which is no claim about its speed.
CARD = 80e9


def network(name: str, classes: int = 10, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model(name, classes, 3).to(memory_format=torch.channels_last)
    settle_batchnorm(model, torch.randn(100, 3, 32, 32))
    return model


def random_images(n: int, classes: int = 10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(classes, (n,), generator=generator)


def make_product(model: nn.Module, data: tuple[Tensor, Tensor]) -> Any:
    """H v, with the graphs of its first call kept."""
    operator = HessianOperator(model, resolve_loss("cross_entropy"), as_batches(data), dict(model.named_parameters()))
    vector = torch.randn(operator.size)
    operator.matvec(vector)
    return lambda: operator.matvec(vector)


def costs(name: str, n: int, classes: int, rounds: int) -> dict[str, float]:
    """Median seconds."""
    model, data = network(name, classes), random_images(n, classes)
    tasks = {"product": make_product(model, data)}
    if classes <= 100:
        tasks["exact"] = lambda: hessian_trace(model, data, method="exact")
    tasks["sampled"] = lambda: hessian_trace(model, data, method="sampled")
    found: dict[str, list[float]] = {key: [] for key in tasks}
    for _ in range(rounds):
        for key, task in tasks.items():
            found[key].append(seconds(task, CPU))
    size = sum(p.numel() for p in model.parameters())
    return {"parameters": size, **{key: median(values) for key, values in found.items()}}


def cost(args: argparse.Namespace) -> dict[str, Any]:
    few = 16 if args.quick else 512
    cases = [("resnet20", few * times // 4, 10) for times in (1, 2, 4)]
    cases += [("resnet20", few // 4, classes) for classes in ((20,) if args.quick else (20, 50, 100, 1000))]
    cases += [(name, few // 4, 10) for name in (() if args.quick else ("mobilenet_v2", "resnet18"))]
    line = "{:<14}{:>12}{:>8}{:>9}{:>12}{:>12}{:>16}"
    print(line.format("network", "parameters", "images", "classes", "product s", "exact s", "4 labels s"))
    rows = []
    for name, n, classes in cases:
        row = {"network": name, "images": n, "classes": classes, **costs(name, n, classes, args.rounds)}
        shown = (f"{row[key]:.3g}" if key in row else "-" for key in ("product", "exact", "sampled"))
        print(line.format(name, f"{row['parameters']:,}", n, classes, *shown), flush=True)
        rows.append(row)
    return {"rows": rows}


def forecast(args: argparse.Namespace) -> dict[str, Any]:
    n, rows = 8 if args.quick else 512, []
    print(f"doctor's forecast for {n} images against what it takes, seconds")
    for name in ("resnet20",) if args.quick else ("resnet20", "resnet18"):
        model, data = network(name), random_images(n)
        expected = forecast_measurements(model, data).set_index("measurement")["seconds"]
        product, exact = make_product(model, data), partial(hessian_trace, model, data, method="exact")
        taken = {
            "trace (exact)": median(seconds(exact, CPU) for _ in range(args.rounds)),
            "density (200 products)": 200 * median(seconds(product, CPU) for _ in range(args.rounds)),
        }
        for what, measured in taken.items():
            said = float(expected[what])
            print(f"  {name:<10} {what:<24} {said:8.2f} forecast {measured:8.2f} measured   {said / measured:.2f}")
            rows.append({"network": name, "measurement": what, "forecast": said, "measured": measured})
    found = {row["network"]: row["measured"] / n * 1024 for row in rows if row["measurement"] == "trace (exact)"}
    print("\nscaled up: 40,000 exact traces of 1,024 images on this machine, one after the other, in days")
    for name, each in found.items():
        print(f"  {name:<10} {40_000 * each / 86400:8.1f}   ({each:.1f} s each)")
    print("\narithmetic: float32 GB that one rank holds; a basis of ten vectors is what five eigenvalues take")
    print(f"  {'parameters':>12}{'weights':>10}{'a product':>12}{'ten vectors':>13}   fits into {CARD / 1e9:.0f} GB")
    for size in (1.1e7, 1e8, 1e9, 7e9):
        weights, product, basis = 4 * size, 4 * 4 * size, (4 + 10) * 4 * size
        fits = "eigenvalues" if basis < CARD else "products" if product < CARD else "nothing"
        print(f"  {size:12.0e}{weights / 1e9:10.1f}{product / 1e9:12.1f}{basis / 1e9:13.1f}   {fits}")
    return {"rows": rows, "seconds_of_1024_images": found}


def write_run(folder: Path, n: int) -> list[str]:
    """`n` checkpoints of ResNet-20 and data beside them; the options of a command that measures them."""
    run = folder / "run"
    run.mkdir(parents=True)
    for epoch in range(n):
        torch.save(network("resnet20", seed=epoch).state_dict(), run / f"epoch_{epoch}.pt")
    x, y = random_images(1024)
    np.savez(folder / "data.npz", x=x.contiguous().numpy(), y=y.numpy())
    return ["--ckpt-dir", str(run), "--model", "resnet20", "--data", str(folder / "data.npz")]


def command(*options: str, threads: int = 1, **environment: str) -> tuple[float, int]:
    """Seconds and peak memory in bytes of `fpq-analyze ...`, from its start to its end."""
    start = time.perf_counter()
    said = subprocess.Popen(
        [sys.executable, "-m", "fpq_analysis", *options],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert said.stderr is not None
    words = said.stderr.read().decode()
    _, status, usage = os.wait4(said.pid, 0)
    said.returncode = os.waitstatus_to_exitcode(status)
    if said.returncode:
        raise SystemExit(f"fpq-analyze {' '.join(options)} failed:\n{words}")
    return time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def scratch(args: argparse.Namespace) -> Iterator[Path]:
    with TemporaryDirectory(prefix="fpq-scale-", dir=args.scratch) as folder:
        yield Path(folder)


def jobs(args: argparse.Namespace) -> dict[str, Any]:
    n, images = (4, 32) if args.quick else (40, 512)
    ways = {"jobs 1, 1 thread": ("1", 1), f"jobs 1, {cores()} threads": ("1", cores()), "jobs 2": ("2", 1)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    with scratch(args) as folder:
        options = ["hessian", *write_run(folder, n), "--n-data", str(images), "--method", "exact", "--json"]
        half = ["--epochs", ",".join(map(str, range(0, n, 2)))]
        for round_ in range(args.rounds):
            for name, (processes, threads) in ways.items():
                where = ["--records", str(folder / f"{name}-{round_}"), "--figures", str(folder / "figures")]
                spent, _ = command(*options, *where, "--jobs", processes, threads=threads)
                found[name].append(spent)
        spent_on_half, _ = command(*options, *half, "--records", str(folder / "half"), "--figures", str(folder / "f"))
    print(f"{n} checkpoints of ResNet-20, exact trace of {images} images; seconds of the whole command")
    one, threads, two = found.values()
    for name, times in found.items():
        print(f"  {name:<20} {median(times):8.1f}   ({min(times):.1f} .. {max(times):.1f})")
    print(f"  jobs 1, 1 thread, {n // 2} checkpoints: {spent_on_half:.1f}")
    for name, other in (("one process of one thread", one), (f"one process of {cores()} threads", threads)):
        ratio = median(a / b for a, b in zip(other, two, strict=True))
        print(f"  jobs 2 is {ratio:.2f} times as fast as {name}")
    return {"checkpoints": n, "images": images, "seconds": found, "half": spent_on_half}


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    n, found = (8, {}) if args.quick else (40, {})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with scratch(args) as folder:
        write_run(folder, n)
        runs = ForeignRuns(folder / "run", "resnet20", str(folder / "data.npz"))
        for processes in (1, 2):
            with open_engine(None, processes, device="cpu") as engine:
                warm = folder / f"warm-{processes}"  # of its own, or the workers would find all done
                measure(runs, HessianTrace(), n_data=16, epochs="0,1,2,3", records=warm, executor=engine)
                start = time.perf_counter()
                frame = measure(runs, HessianTrace(), n_data=16, records=folder / str(processes), executor=engine)
                spent = time.perf_counter() - start
            measured = float(frame.drop_duplicates("key")["seconds"].sum())
            found[f"jobs {processes}"] = 1000 * (processes * spent - measured) / n
    torch.set_num_threads(before)
    print(f"milliseconds a checkpoint beyond its measurement, of {n}; workers are warm")
    for name, each in found.items():
        print(f"  {name:<10} {each:8.1f}")
    return found


# Each rank measures with its own share; the first says how long it took.
RANKS = """
import json, sys, time
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from scale import network, random_images
import fpq_analysis as fpq
dist.init_process_group("gloo")
model, data = network("resnet18"), random_images(int(sys.argv[2]))
found = {}
with fpq.over_ranks():
    for name, call in {
        "exact trace": lambda: fpq.hessian_trace(model, data, method="exact"),
        "two eigenvalues": lambda: fpq.hessian_eigs(model, data, 2, tol=1e-2),
    }.items():
        start = time.perf_counter()
        call()
        found[name] = time.perf_counter() - start
if dist.get_rank() == 0:
    print(json.dumps(found))
dist.destroy_process_group()
"""


def ranks(args: argparse.Namespace) -> dict[str, Any]:
    n = 16 if args.quick else 256
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    with scratch(args) as folder:
        (folder / "ranks.py").write_text(RANKS)
        for _ in range(args.rounds):
            for world, times in found.items():
                launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
                said = subprocess.run(
                    [sys.executable, *launcher, str(folder / "ranks.py"), str(Path(__file__).parent), str(n)],
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if said.returncode:
                    raise SystemExit(said.stderr)
                times.append(json.loads(said.stdout.splitlines()[-1]))
    print(f"ResNet-18, {n} images, ranks of one thread; seconds")
    for what in found[1][0]:
        one, two = (median(times[what] for times in found[world]) for world in found)
        print(f"  {what:<18} 1 rank {one:8.1f}   2 ranks {two:8.1f}   {one / two:.2f} times as fast")
    return {str(world): times for world, times in found.items()}


def write_tree(folder: Path, n: int, size: int = 64, kinds: int = 50, classes: int = 10) -> None:
    """`n` JPEGs, which are `kinds` different ones under many names."""
    dice = np.random.default_rng(0)
    originals = folder.parent / "originals"
    if not originals.exists():
        originals.mkdir()
        for kind in range(kinds):
            pixels = dice.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((size, size)).save(originals / f"{kind}.jpg")
        for path in originals.iterdir():
            os.utime(path, (1e9, 1e9))  # a file of a moment ago is not trusted to stay
    for label in range(classes):
        (folder / f"{label:02}").mkdir(parents=True)
    for i in range(n):
        os.link(originals / f"{i % kinds}.jpg", folder / f"{i % classes:02}" / f"{i:06}.jpg")


def folder(args: argparse.Namespace) -> dict[str, Any]:
    sizes = (300, 3000) if args.quick else (10_000, 100_000)
    images, found = 64 if args.quick else 1024, {}
    print(f"fpq-analyze hessian, ResNet-20, {images} images of 64x64 from a folder of JPEGs")
    print(f"  {'files':>8}  {'':<12}{'seconds':>9}{'peak MB':>9}")
    with scratch(args) as place:
        run = place / "run"
        run.mkdir()
        torch.save(network("resnet20").state_dict(), run / "epoch_0.pt")
        for n in sizes:
            write_tree(place / str(n), n)
            options = ["hessian", "--ckpt-dir", str(run), "--model", "resnet20", "--data", "imagefolder", "--json"]
            options += ["--data-root", str(place / str(n)), "--n-data", str(images), "--figures", str(place / "f")]
            for when in ("first", "from then on"):
                where = ["--records", str(place / f"records-{n}-{when}")]
                spent, peak = command(*options, *where, threads=cores(), FPQ_CACHE=str(place / "cache"))
                print(f"  {n:>8}  {when:<12}{spent:>9.1f}{peak / 2**20:>9.0f}", flush=True)
                found[f"{n} {when}"] = {"seconds": spent, "bytes": peak}
    return found


SECTIONS = {
    "cost": cost,
    "forecast": forecast,
    "jobs": jobs,
    "overhead": overhead,
    "ranks": ranks,
    "folder": folder,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"{', '.join(SECTIONS)} (all)")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured (3)")
    parser.add_argument("--quick", action="store_true", help="small sizes and one round")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints and images (the system's)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"unknown section {unknown.pop()}; known: {', '.join(SECTIONS)}")
    if args.rounds < 1:
        parser.error("--rounds must be above zero")
    args.rounds = 1 if args.quick else args.rounds
    where, found = environment(CPU, "fpq-analysis", "pillow"), {}
    for name in args.sections or SECTIONS:
        print(f"--- {name}\n")
        found[name] = SECTIONS[name](args)
        print(flush=True)
    print(*where.values(), sep="\n")
    write_json(args.json, {**where, "options": vars(args), **found})


if __name__ == "__main__":
    main()

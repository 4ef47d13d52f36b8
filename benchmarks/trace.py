"""Seconds to a standard error of 1 % in the Hessian trace: this package, PyHessian and curvlinops.

    python benchmarks/trace.py                                  # a ResNet-20, trained on digits first
    python benchmarks/trace.py --ckpt RUN/epoch_0010.pt         # any checkpoint of fpq-analyze train

All methods get one network (the dequantized view, if it is quantized), one set of images, float32 and the same
parameters.  The error meant is that over probes or labels, for the trace on these images, and 1 % is of the exact
trace.  The exact method has none; the others run on a small budget, and their seconds to 1 % are extrapolated:

- Hutchinson (ours, PyHessian's, curvlinops') and sampled labels are means of independent draws:  seconds x (error /
  1 %)^2, which is a law and not a guess.  The three Hutchinsons draw from one distribution, so the variance of a probe
  is pooled over them, and they differ by the time of a product alone.
- "Deflated" is ours with --tol 0.01, run to its end: what it takes where the network is outside the exact condition.
- Hutch++ and XTrace give a bare number, so each is run with several seeds, and the spread of these runs is the error
  of one.  How it falls with the products m of one run depends on the spectrum, so two figures stand for it: "1/m", the
  rate Hutch++ is known for, seconds of a run x (its error / 1 %), which favours these methods; and "1/sqrt m", the mean
  of independent runs as above, which is sure to be reached.  Until a run captures the outlying eigenvalues, about as
  many as classes, the error falls faster than 1/m, so --budget should not be much below the number of classes (in a
  trial on digits, ten classes, it fell roughly as 1/m for budgets from 12 to 48).

What is timed: for ours the whole call of `hessian_trace`, copies and certificate included; for the others the
estimator alone, without set-up and without curvlinops' determinism check.  Ours takes the command line's channels-last
images and default micro-batches.  The others take the memory layout that a short trial finds faster; PyHessian also
the faster of micro-batches and one batch.  curvlinops multiplies several columns at once, which is faster than one by
one, and takes micro-batches: one batch would need the memory of all columns.

First, the cost of the exact trace and of a pass with one label an image is given in gradient passes: a gradient pass is
a forward and a backward of the mean cross-entropy to all parameters on the same images, in the same micro-batches and
in one batch.  "Exact" is the whole call, of which "fixed" (the copy and the certificate) does not grow with the images;
"label" is the bare pass.  Medians over rounds in which the tasks take turns, after a warm-up.  A ResNet-18 with random
weights and settled BatchNorm statistics is timed in the same way.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev

import torch
from _common import environment, interleave, seconds, settle_batchnorm, write_json
from curvlinops import HessianLinearOperator, hutchinson_trace, hutchpp_trace, xtrace
from pyhessian import hessian
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fpq_analysis import TraceEstimate, TrainConfig, hessian_trace, load, train
from fpq_analysis.curvature import as_batches, certify, per_sample_traces
from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.data import load_dataset, training_sample
from fpq_analysis.devices import pick_device
from fpq_analysis.losses.cross_entropy import CROSS_ENTROPY
from fpq_analysis.models import build_model
from fpq_analysis.quantizers import variables
from fpq_analysis.quantizers import view as take_view
from fpq_analysis.runs.checkpoint import read_checkpoint

TARGET = 0.01
COLUMNS = 4  # of a product in curvlinops' Hutchinson
MICRO, WHOLE = "micro-batches", "one batch"
Task = Callable[[], object]
Key = tuple[str, str]  # form and layout of the data
LAYOUTS = {"channels last": torch.channels_last, "channels first": torch.contiguous_format}


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Attributes:
        error: standard error of `value` over probes or labels; NaN where the method knows none.
        products: Hessian-vector products, or backward passes for the exact trace and the labels.
        to_target: seconds to an error of `TARGET` times the exact trace; NaN where there is no error to go by.
        draws: independent draws that `error` comes from.
    """

    method: str
    value: float
    error: float
    products: int
    seconds: float
    to_target: float = math.nan
    draws: int = 0


@dataclass(frozen=True)
class Cost:
    """Median seconds of one network's exact trace, of what is fixed in it, of a one-label pass and a gradient pass."""

    model: str
    n_data: int
    micro_batch: int
    exact: float
    fixed: float
    label: float
    gradient: dict[str, float]


@dataclass(frozen=True)
class Problem:
    """What every method is given: a network in eval mode and images, on one device, channels last."""

    name: str
    model: nn.Module
    whole: Batch
    micro_batch: int | None
    seed: int

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.whole[0].device

    def view(self, layout: torch.memory_format = torch.channels_last) -> nn.Module:
        """A copy in which only the variables of the Hessian want gradients."""
        return take_view(self.model, "dequantized").to(memory_format=layout)

    def batches(self, form: str, layout: torch.memory_format = torch.channels_last) -> list[Batch]:
        """The images in micro-batches, or as one batch."""
        x, y = self.whole
        whole = (x.contiguous(memory_format=layout), y)
        return as_batches(whole, self.micro_batch) if form == MICRO else [whole]

    def trace(self, method: str, **options: int) -> TraceEstimate:
        """The trace by this package."""
        options |= {"micro_batch": self.micro_batch} if self.micro_batch else {}
        return hessian_trace(self.model, self.whole, method=method, seed=self.seed, **options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, help="checkpoint file; without it, a ResNet-20 is trained on digits")
    parser.add_argument("--data", help="data set, if not the checkpoint's own")
    parser.add_argument("--data-root", help="its folder, if not the one the checkpoint was trained from")
    parser.add_argument("--n-data", type=int, default=256, help="images (256)")
    parser.add_argument("--micro-batch", type=int, help="images in a micro-batch, if not the package's default")
    parser.add_argument("--labels", type=int, default=8, help="labels an image (8)")
    parser.add_argument("--probes", type=int, default=24, help=f"of each Hutchinson, by {COLUMNS} (24)")
    parser.add_argument("--budget", type=int, default=12, help="products of a Hutch++ or XTrace run, by 6 (12)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of Hutch++ and of XTrace (5)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the gradient-pass timings (3)")
    parser.add_argument("--resnet18-images", type=int, default=64, help="images for ResNet-18's cost; 0: none (64)")
    parser.add_argument("--seed", type=int, default=0, help="of images and probes (0)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto (cpu)")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()
    if min(args.labels, args.seeds) < 2 or args.probes < 2 * COLUMNS or args.probes % COLUMNS:
        parser.error(f"an error needs two or more --labels and --seeds, and --probes {2 * COLUMNS}, {3 * COLUMNS}, ...")
    if args.budget < 6 or args.budget % 6:
        parser.error("--budget must be a multiple of 6: Hutch++ splits it in three, XTrace in two")
    return args


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def load_problem(args: argparse.Namespace, device: torch.device) -> Problem:
    with tempfile.TemporaryDirectory() as folder:
        path = args.ckpt
        if path is None:
            config = TrainConfig(data="digits", model="resnet20", epochs=10, batch_size=128, lr=0.1)
            train(config, folder, device=str(device), log=say)
            path = Path(folder) / f"epoch_{config.epochs:04d}.pt"
        content, model = read_checkpoint(path), load(path)
    trained = content.run
    data = load_dataset(
        args.data or trained["data"],
        args.data_root or trained["data_root"],
        image_size=trained["image_size"],
    )
    model = model.to(device, memory_format=torch.channels_last)
    images = training_sample(data.to(device), args.n_data, args.seed)
    return Problem(content.model["name"], model, images, args.micro_batch, args.seed)


def resnet18(n_data: int, like: Problem) -> Problem:
    """A ResNet-18 that was not trained, on the first images of `like`."""
    x, y = (tensor[:n_data] for tensor in like.whole)
    with torch.no_grad():
        n_classes = like.model(x[:1]).shape[1]
    torch.manual_seed(like.seed)
    model = build_model("resnet18", n_classes, x.shape[1])
    model = model.to(x.device, memory_format=torch.channels_last)
    settle_batchnorm(model, x)
    return replace(like, name="resnet18", model=model, whole=(x, y))


def measure_cost(problem: Problem, rounds: int) -> Cost:
    model = problem.view()
    names = variables(model)
    generator = torch.Generator().manual_seed(problem.seed)
    micro, whole = problem.batches(MICRO), problem.batches(WHOLE)

    def gradient(batches: list[Batch]) -> None:
        for x, y in batches:
            torch.autograd.grad(F.cross_entropy(model(x), y), list(names.values()), allow_unused=True)

    def fixed() -> None:
        copied = problem.view()
        certify(copied, micro, variables(copied))

    def label() -> None:
        list(per_sample_traces(model, CROSS_ENTROPY, micro, names, n_labels=1, generator=generator))

    tasks: dict[str, Task] = {
        MICRO: lambda: gradient(micro),
        WHOLE: lambda: gradient(whole),
        "exact": lambda: problem.trace("exact"),
        "fixed": fixed,
        "label": label,
    }
    for task in tasks.values():
        task()
    found = {name: median(times) for name, times in interleave(tasks, rounds, problem.device).items()}
    gradients = {form: found.pop(form) for form in (MICRO, WHOLE)}
    return Cost(problem.name, len(problem.whole[0]), len(micro[0][0]), gradient=gradients, **found)


def averaged(method: str, draws: list[float], products: int, spent: float) -> Row:
    """The row of independent draws, whose mean is the value."""
    return Row(method, mean(draws), stdev(draws) / math.sqrt(len(draws)), products, spent, draws=len(draws))


def by_averaging(row: Row, target: float) -> Row:
    """With the seconds until more of the same draws bring the error down to `target`."""
    return replace(row, to_target=row.seconds * (row.error / target) ** 2)


def by_pooled_averaging(rows: list[Row], target: float) -> list[Row]:
    """The same with one variance a product for all rows, that of all their draws."""
    variance = sum((row.draws - 1) * row.error**2 * row.products for row in rows) / sum(row.draws - 1 for row in rows)
    return [replace(row, to_target=row.seconds / row.products * variance / target**2) for row in rows]


def spread_error(draws: int) -> str:
    """Relative standard error of a standard deviation from this many normal draws."""
    return f"± {100 / math.sqrt(2 * (draws - 1)):.0f} %"


def ours(problem: Problem, method: str, **options: float) -> Row:
    found: list[TraceEstimate] = []
    spent = seconds(lambda: found.append(problem.trace(method, **options)), problem.device)
    names = {
        "exact": "ours, exact",
        "sampled": "ours, sampled labels",
        "deflated": "ours, deflated",
        "hutchinson": "ours, Hutchinson",
    }
    n = found[0].n_products
    return Row(names[method], found[0].value, found[0].sem, n, spent, draws=n if method != "exact" else 0)


def fastest(who: str, set_up: Callable[[str, str], Task], forms: list[str], device: torch.device) -> Key:
    """The form and layout in which the second call of the task that `set_up` gives takes the least time."""
    times = {}
    for key in itertools.product(forms, LAYOUTS):
        task = set_up(*key)
        task()
        times[key] = seconds(task, device)
        del task  # a large graph may hang on it
    say(f"{who}: " + "; ".join(f"{', '.join(key)} {spent:.2f} s" for key, spent in times.items()))
    return min(times, key=lambda key: times[key])


def pyhessian_rows(problem: Problem, n_probes: int) -> tuple[Row, Row]:
    """A fixed number of probes, and what it gives when left to its defaults."""

    def engine(form: str, layout: str) -> hessian:
        batches = problem.batches(form, LAYOUTS[layout])
        data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
        cuda = problem.device.type == "cuda"
        return hessian(problem.view(LAYOUTS[layout]), nn.CrossEntropyLoss(), cuda=cuda, **data)

    def probes(own: hessian, n: int) -> list[float]:
        return list(own.trace(maxIter=n, tol=-math.inf))  # a tolerance that is never reached

    def trial(form: str, layout: str) -> Task:
        own = engine(form, layout)
        return lambda: probes(own, 1)

    own = engine(*fastest("PyHessian", trial, [MICRO, WHOLE], problem.device))
    fixed: list[float] = []
    default: list[float] = []
    torch.manual_seed(problem.seed)  # it draws from the global generator
    spent = seconds(lambda: fixed.extend(probes(own, n_probes)), problem.device)
    spent_default = seconds(lambda: default.extend(own.trace()), problem.device)
    return (
        averaged("PyHessian", fixed, n_probes, spent),
        Row("PyHessian, defaults", mean(default), math.nan, len(default), spent_default),
    )


class Curvlinops:
    """Its operator in the faster layout, and repeated runs of its estimators."""

    def __init__(self, problem: Problem) -> None:
        self.seed, self.device = problem.seed, problem.device

        def trial(form: str, layout: str) -> Task:
            operator = self._operator(problem, form, layout)
            return lambda: hutchinson_trace(operator, COLUMNS)

        self.operator = self._operator(problem, *fastest("curvlinops", trial, [MICRO], problem.device))

    @staticmethod
    def _operator(problem: Problem, form: str, layout: str) -> HessianLinearOperator:
        model, batches = problem.view(LAYOUTS[layout]), problem.batches(form, LAYOUTS[layout])
        parameters = list(variables(model).values())
        return HessianLinearOperator(model, nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False)

    def row(self, name: str, estimator: Callable[..., Tensor], budget: int, runs: int) -> Row:
        """The mean of `runs` runs of `budget` products each, with the standard error of that mean."""
        draws: list[float] = []

        def run() -> None:
            for i in range(runs):
                torch.manual_seed(self.seed + i)  # it draws from the global generator
                draws.append(float(estimator(self.operator, budget)))

        spent = seconds(run, self.device)
        return averaged(f"curvlinops {name}", draws, runs * budget, spent)


def bracket(row: Row, target: float) -> tuple[Row, Row]:
    """A row of Hutch++ or XTrace, extrapolated in the two ways the module's docstring tells."""
    run_error, run_seconds = row.error * math.sqrt(row.draws), row.seconds / row.draws
    linear = replace(row, method=f"{row.method} 1/m", to_target=run_seconds * run_error / target)
    return linear, by_averaging(replace(row, method=f"{row.method} 1/sqrt m"), target)


def plain_table(columns: list[str], lines: list[list[str]]) -> Table:
    """Names to the left, numbers to the right."""
    made = Table(box=None, pad_edge=False, collapse_padding=True, header_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="right" if i else "left", no_wrap=True)
    for line in lines:
        made.add_row(*line)
    return made


def cost_table(costs: list[Cost]) -> Table:
    lines = []
    for cost in costs:
        sizes = {MICRO: cost.micro_batch, WHOLE: cost.n_data}
        for form, gradient in cost.gradient.items():
            passes = [f"{spent:.2f} s = {spent / gradient:.2f}" for spent in (cost.exact, cost.label)]
            start = [cost.model, str(cost.n_data), str(sizes[form]), f"{gradient:.3f} s"]
            lines.append([*start, *passes, f"{cost.fixed:.2f} s"])
    return plain_table(["Model", "Images", "Batch", "Gradient", "Exact, in passes", "Label, in passes", "Fixed"], lines)


def trace_table(rows: list[Row]) -> Table:
    def number(x: float, digits: int) -> str:
        return "-" if math.isnan(x) else f"{x:.0f}" if abs(x) >= 10**digits else f"{x:.{digits}g}"

    lines = []
    for row in rows:
        times = [number(row.seconds, 3), number(row.to_target, 3), number(row.to_target / rows[0].to_target, 3)]
        lines.append([row.method, number(row.value, 5), number(row.error, 2), str(row.products), *times])
    return plain_table(["Method", "Trace", "Error", "Products", "Seconds", "s to 1 %", "Ratio"], lines)


def main() -> None:
    args = parse()
    device = pick_device(args.device)
    where = environment(device, "fpq-analysis", "pyhessian", "curvlinops-for-pytorch")
    warnings.filterwarnings("ignore", "Using backward.. with create_graph=True", UserWarning)  # PyHessian's way
    # In channels-last images only, and `fastest` takes the others if it matters.
    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
    with full_precision():
        problem = load_problem(args, device)
        costs = []
        for each in [problem] + ([resnet18(args.resnet18_images, problem)] if args.resnet18_images else []):
            say(f"cost in gradient passes: {each.name} ...")
            costs.append(measure_cost(each, args.rounds))
        say("ours ...")
        # Timed above, over several rounds.
        exact = replace(ours(problem, "exact"), seconds=costs[0].exact, to_target=costs[0].exact)
        labels = ours(problem, "sampled", n_labels=args.labels)
        hutchinson = ours(problem, "hutchinson", n_products=args.probes)
        deflated = ours(problem, "deflated", tol=TARGET)
        deflated = replace(deflated, to_target=deflated.seconds)
        say("PyHessian ...")
        pyhessian, default = pyhessian_rows(problem, args.probes)
        say("curvlinops ...")
        curvlinops = Curvlinops(problem)
        theirs = curvlinops.row("Hutchinson", hutchinson_trace, COLUMNS, args.probes // COLUMNS)
        say("curvlinops Hutch++ and XTrace ...")
        blocks = [
            curvlinops.row(name, estimator, args.budget, args.seeds)
            for name, estimator in (("Hutch++", hutchpp_trace), ("XTrace", xtrace))
        ]

    target = TARGET * abs(exact.value)
    pooled = by_pooled_averaging([hutchinson, pyhessian, theirs], target)
    rows = [exact, by_averaging(labels, target), deflated, *pooled[:2], default, pooled[2]]
    rows += [line for row in blocks for line in bracket(row, target)]
    draws = sum(row.draws - 1 for row in pooled) + 1
    notes = [
        "Error: standard error over probes or labels. Ratio: to ours, exact.",
        f"Hutchinson: one variance for all three, its root known to {spread_error(draws)} ({draws} draws).",
        "1/m, 1/sqrt m: how the error of one run falls with its products; see --help.",
    ]
    for row in blocks:
        error = 100 * row.error * math.sqrt(row.draws) / abs(exact.value)
        run = f"a run of {args.budget} products, {row.seconds / row.draws:.1f} s"
        notes.append(f"{row.method}: {error:.2g} % error (known to {spread_error(row.draws)}) in {run}.")
    off = 100 * (default.value / exact.value - 1)
    notes.append(f"PyHessian's own rule: {default.products} probes, {off:+.1f} % off the exact trace, no error.")
    console = Console(width=80, highlight=False)
    console.print("Cost in gradient passes (forward and backward to all parameters, same images)\n")
    console.print(cost_table(costs))
    shape = "x".join(str(n) for n in problem.whole[0].shape[1:])
    console.print(f"\nTime to 1 % standard error: {problem.name}, {len(problem.whole[0])} images of {shape}\n")
    console.print(trace_table(rows))
    console.print("", *notes, *where.values(), sep="\n")
    content = {"options": vars(args), "costs": [asdict(c) for c in costs], "rows": [asdict(r) for r in rows]}
    write_json(args.json, {**where, **content, "notes": notes})


if __name__ == "__main__":
    main()

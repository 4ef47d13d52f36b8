"""`fpq-analyze hessian`."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from fpq_analysis.choices import DEFINITIONS, check_k, check_known, check_trace
from fpq_analysis.cli.app import echo, new_table, print_table
from fpq_analysis.cli.measuring import Settings, check_runs, measure_and_show, measuring_command, some_epochs
from fpq_analysis.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


@measuring_command(fixed={"n_data": None})
def hessian(
    settings: Settings,
    definition: Annotated[str, typer.Option(help="dequantized, latent or float; all: the three.")] = "dequantized",
    top_k: Annotated[int, typer.Option(help="How many of the largest eigenvalues.")] = 0,
    density: Annotated[bool, typer.Option("--density", help="Spectral density, with its figure.")] = False,
    sharpness: Annotated[bool, typer.Option("--sharpness", help="Sharpness invariant to rescaling.")] = False,
    method: Annotated[str, typer.Option(help="For the trace: auto, exact, sampled, deflated, ...")] = "auto",
    operator: Annotated[str, typer.Option(help="hessian; or gauss-newton, whose trace any network has.")] = "hessian",
    engine: Annotated[str, typer.Option(help="builtin, or pyhessian as a cross-check.")] = "builtin",
    n_data: Annotated[int | None, typer.Option(help="Samples. Default: 1024; with --tol, all.")] = None,
    tol: Annotated[float | None, typer.Option(help="Wanted relative standard error of the trace.")] = None,
    n_products: Annotated[int, typer.Option(help="Hessian-vector products, without --tol.")] = 100,
    n_labels: Annotated[int, typer.Option(help="Labels drawn per sample, without --tol.")] = 4,
) -> None:
    """Hessian of every checkpoint of every run: its trace, as a table and as Figure 5, and what else is asked for.

    What was measured before is not measured again. With --tol, the trace is that over all samples,
    estimated from as few of them as this error allows.

    [bold]Examples[/bold]

      fpq-analyze hessian --ckpt-dir checkpoints/

      fpq-analyze hessian --ckpt-dir checkpoints/fpq --top-k 5 --density

      fpq-analyze hessian --ckpt-dir checkpoints/ --definition all --json

      fpq-analyze hessian --ckpt-dir runs/own --model mynet:make --data cifar10
    """
    from fpq_analysis.pipeline.task import Sampling

    if engine not in ("builtin", "pyhessian"):
        raise UserError(f"Unknown engine '{engine}'. Known: builtin, pyhessian.")
    if engine == "pyhessian" and method != "auto":
        raise UserError("PyHessian knows one method, Hutchinson's; leave --method out with --engine pyhessian.")
    check_known("operator", operator, ("hessian", "gauss-newton"))
    if operator != "hessian" and (top_k or density or sharpness):
        raise UserError(
            f"--operator {operator} measures the trace alone; --top-k, --density and --sharpness are of the Hessian. "
            "From Python, hessian_eigs and spectral_density take operator=."
        )
    if sharpness and definition == "latent":
        raise UserError("--sharpness is of the definitions dequantized and float; leave one of the two options out.")
    kinds = DEFINITIONS if definition == "all" else [definition]
    method = "pyhessian" if engine == "pyhessian" else method
    for kind in kinds:
        check_trace(method, kind, operator, tol, n_products, n_labels)
    if top_k:
        check_k(top_k)
    if n_data is None and tol is None:
        n_data = 1024
    Sampling(n_data)  # refuses too few
    check_runs(settings)
    from fpq_analysis.probes import GaussNewtonTrace, HessianDensity, HessianEigs, HessianTrace, Probe, Sharpness

    traces: dict[str, type[HessianTrace]] = {"hessian": HessianTrace, "gauss-newton": GaussNewtonTrace}
    trace = partial(traces[operator], tol=tol, n_products=n_products, n_labels=n_labels)
    probes: list[Probe] = []
    for kind in kinds:
        probes.append(trace(kind, method))
        if top_k:
            probes.append(HessianEigs(kind, top_k))
        if density:
            probes.append(HessianDensity(kind))
        if sharpness and kind != "latent":
            probes.append(Sharpness(kind))

    show = {
        "hessian_trace": print_traces,
        "gauss_newton_trace": print_traces,
        "hessian_eigs": print_eigenvalues,
        "hessian_density": print_moments,
        "sharpness": _print_sharpness,
    }
    measure_and_show(probes, replace(settings, n_data=n_data), show)


def print_traces(frame: pd.DataFrame) -> None:
    """The whole-network traces, a row a checkpoint; of long runs the first, the last and some between."""
    from fpq_analysis.records.comparison import against_baseline, among_themselves
    from fpq_analysis.records.queries import totals
    from fpq_analysis.text import listed, number

    rows = totals(frame)
    if rows.empty:
        return
    # A run that was copied has the same keys twice.
    beside = frame[frame["layer"] == "all"].drop_duplicates(["key", "quantity"], keep="last")
    by_key = beside.pivot(index="key", columns="quantity", values="value")
    numbers = {"Trace": "right", "± 95 %": "right", "Loss": "right", "Acc. %": "right", "Clip %": "right"}
    table = new_table({"Run": "left", "Epoch": "right", **numbers, "Method": "left"})
    for _, run in rows.groupby(["run", "definition", "estimator", "loss", "n_data", "seed"], sort=False):
        run = run.sort_values("epoch")
        step = max(1, (len(run) - 1) // 4)
        for i in sorted({*range(0, len(run), step), len(run) - 1}):
            row = run.iloc[i]
            how = row["estimator"] if row["definition"] == "dequantized" else f"{row['estimator']}, {row['definition']}"
            known = by_key.loc[row["key"]].dropna()
            shares = [f"{100 * known[name]:.1f}" if name in known else "" for name in ("accuracy", "clipped_fraction")]
            loss = number(known["loss"], 3) if "loss" in known else ""
            values = number(row["value"], 4), number(row["ci95"], 2), loss, *shares
            table.add_row(row["run"], str(row["epoch"]), *values, how)
        table.add_section()
    print_table(table)
    if rows["sem_data"].notna().any():
        echo("± 95 %: over the samples measured on, not over training runs.")
    by_probes = rows[rows["sem_data"].isna()]
    if len(by_probes):
        which = "" if len(by_probes) == len(rows) else f" of {listed(sorted(by_probes['estimator'].unique()))}"
        echo(textwrap.fill(f"± 95 %{which}: over the random probes, for these samples.", width=80))
    echo("Loss, Acc.: on these samples. Clip: weights outside their quantizer's grid.")
    _warn_of_guessing(frame)
    differences = against_baseline(rows) + among_themselves(rows)
    if differences:
        echo("\nOn the same samples, sample by sample (± 95 %; one training run each):")
        for difference in differences:
            echo(textwrap.fill(difference.sentence(), width=80, initial_indent="  ", subsequent_indent="    "))


def _warn_of_guessing(frame: pd.DataFrame) -> None:
    """A sentence where trained networks, epoch 0 aside, do no better than guessing: then the data may be other data."""
    from fpq_analysis.records.queries import ABOVE_GUESSING, AT_CHANCE, marked

    rows = marked(frame)
    what = {
        AT_CHANCE: "At chance: {}. The accuracy on these samples is no better than that of always naming the most "
        "frequent class",
        ABOVE_GUESSING: "Above guessing: {}. The loss on these samples is higher than that of a guess by the classes' "
        "frequencies",
    }
    for status, sentence in what.items():
        of_it = rows[rows["status"] == status]
        places = list(dict.fromkeys(f"{row['run']} (epoch {row['epoch']})" for _, row in of_it.iterrows()))
        if not places:
            continue
        named = ", ".join(places[:3]) + (f" and {len(places) - 3} more" if len(places) > 3 else "")
        text = (
            f"{sentence.format(named)}, though the network was trained. If it did better in training, these are other "
            "data, or data prepared in another way: check --data, --normalize and --image-size, the scale of inputs "
            "and the order of classes. Its curvature here says little."
        )
        echo(textwrap.fill(text, width=80))
        break  # the second says no more


def print_eigenvalues(frame: pd.DataFrame) -> None:
    """The largest eigenvalues side by side, some epochs of every run."""
    from fpq_analysis.records.queries import eigenvalues
    from fpq_analysis.text import number

    rows = eigenvalues(frame)
    if rows.empty:
        return
    shown = min(5, int(rows["rank"].max()))
    heads = {f"Eigenv. {i}" if i == 1 else f"{i}": "right" for i in range(1, shown + 1)}
    table = new_table({"Run": "left", "Epoch": "right", **heads, "Products": "right"})
    several = rows["definition"].nunique() > 1
    for (run, definition), group in some_epochs(rows).groupby(["run", "definition"], sort=False):
        for epoch, one in group.groupby("epoch"):
            values = one.sort_values("rank")["value"].head(shown)
            name = f"{run}, {definition}" if several else str(run)
            table.add_row(name, str(epoch), *(number(x, 4) for x in values), str(int(one["n_products"].iloc[0])))
        table.add_section()
    echo("")
    print_table(table)
    echo("Each within its residual, stored beside it, of an eigenvalue for these samples.")


def print_moments(frame: pd.DataFrame) -> None:
    """Trace and sum of squares by the spectral density, some epochs of every run."""
    from fpq_analysis.text import number

    table = new_table(
        {"Run": "left", "Epoch": "right", "Trace": "right", "± se": "right", "Σ λ²": "right", "± se ": "right"}
    )
    rows = frame[frame["quantity"].isin(["trace", "squares"])]
    for (run, epoch, _), one in some_epochs(rows).groupby(["run", "epoch", "definition"], sort=False):
        by_name = one.set_index("quantity")
        cells = [number(float(by_name[c][q]), d) for q in ("trace", "squares") for c, d in (("value", 4), ("sem", 2))]
        table.add_row(str(run), str(epoch), *cells)
    echo("\nMoments of the spectral density:")
    print_table(table)


def _print_sharpness(frame: pd.DataFrame) -> None:
    from fpq_analysis.text import number

    rows = some_epochs(frame[frame["layer"] == "all"])
    echo("\nSharpness that survives rescaling, at each run's last epoch:")
    table = new_table({"Run": "left", "Epoch": "right", "Quantity": "left", "Value": "right", "± se": "right"})
    for (run, _), group in rows.groupby(["run", "definition"], sort=False):
        last = group[group["epoch"] == group["epoch"].max()]
        for _, row in last.iterrows():
            numbers = number(row["value"], 4), number(row["sem"], 2)
            table.add_row(str(run), str(row["epoch"]), str(row["quantity"]), *numbers)
        table.add_section()
    print_table(table)

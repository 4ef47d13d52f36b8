"""The whole examination, of a model or of a checkpoint file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn

from fpq_analysis.curvature import as_batches
from fpq_analysis.curvature.batches import Batch, full_precision
from fpq_analysis.devices import pick_device
from fpq_analysis.doctor.checks import AS_FOUND, ESSENTIAL, RUNNING, STANDING, weights
from fpq_analysis.doctor.forecast import FORECAST_COLUMNS, forecast_measurements
from fpq_analysis.doctor.model_under_test import COLUMNS, FAULT, NOTE, Finding, prepare, same_random_state, short
from fpq_analysis.doctor.workers import WORKERS_COLUMNS, devices, forecast_workers
from fpq_analysis.errors import UnfitError, UserError, naming
from fpq_analysis.forward import ForwardFunction, with_forward
from fpq_analysis.losses import LossFunction
from fpq_analysis.nests import size
from fpq_analysis.quantizers import adopt
from fpq_analysis.runs import no_checkpoints, one_run, source_of


def diagnose(
    model: nn.Module,
    batches: Batch | Iterable[Batch],
    *,
    loss: str | LossFunction = "cross_entropy",
    device: str | torch.device | None = None,
    seed: int = 0,
    forward: ForwardFunction | None = None,
) -> pd.DataFrame:
    """Check whether the curvature of `model` can be measured on these data.

    Args:
        model: any `nn.Module` whose output the loss takes; quantized ones are checked as `dequantized`.
        batches: a pair (inputs, targets), or any iterable of such pairs (docs/data.md).
        loss: `cross_entropy`, `squared_error`, a `Loss`, or a function (outputs, targets) to the *mean* over the batch.
        device: where to compute; None for where the model is.
        seed: of the random directions.
        forward: how the model is called, a function (model, inputs) to its outputs; None: as docs/data.md says.

    Returns:
        A row a check: check, status (ok, note or fault), finding (one sentence), cure (what to do, or empty).  Checks
        that a fault makes meaningless are left out.

    Raises:
        UserError: if there are no data, or the loss has an unknown name.
    """
    batches = as_batches(batches)
    try:
        adopted = adopt(with_forward(model, forward), batches[0][0])
    except UserError as error:
        return _frame({"quantizers": Finding(FAULT, str(error))})
    found = {name: check(model if name in ("mode", "dtype") else adopted) for name, check in STANDING.items()}
    model = adopted
    if any(finding.status == FAULT for name, finding in found.items() if name != "mode"):
        return _frame(found)
    tested = prepare(model, batches, loss, device, seed, forward)
    with same_random_state(tested.device):
        for name, check in RUNNING.items():
            try:
                with nullcontext() if name in AS_FOUND else full_precision():
                    found[name] = check(tested)
            except UnfitError as error:
                found[name] = Finding(FAULT, error.finding, error.cure)
            except Exception as error:  # the user's code: anything can happen
                found[name] = Finding(NOTE, f"The check itself failed ({short(error)}).")
            if name in ESSENTIAL and found[name].status == FAULT:
                break
    return _frame(found)


def _frame(found: dict[str, Finding]) -> pd.DataFrame:
    return pd.DataFrame([(name, *finding) for name, finding in found.items()], columns=COLUMNS)


class Diagnosis(NamedTuple):
    """What `diagnose_checkpoint` found.

    Attributes:
        findings: see `diagnose`.
        costs: see `forecast_measurements`, with a column `device` before the others; empty if there is a fault.
        workers: see `forecast_workers`; empty likewise.
        n_data: samples that costs and workers are for: as many as were asked for, or as there are.
    """

    findings: pd.DataFrame
    costs: pd.DataFrame
    workers: pd.DataFrame
    n_data: int


def diagnose_checkpoint(
    path: str | os.PathLike[str],
    *,
    n_data: int = 256,
    seed: int = 0,
    data_root: str | None = None,
    model: str | None = None,
    loss: str | LossFunction = "cross_entropy",
    device: str = "auto",
) -> Diagnosis:
    """`diagnose`, `forecast_measurements` and `forecast_workers` for a checkpoint file, or for the last one of a run.

    Args:
        path: of one of ours; for another program's, a `ForeignRuns` with the file, or the run, as its folder.  A folder
            with one run below it will do.
        n_data: training images, drawn by `seed`, to check on and to forecast for.
        data_root: where the data set lies, if not where it was when the run was trained.
        model: for a network of your own, `package.module:factory`.
        loss: as for `diagnose`, or `package.module:name`.
        device: to check on; the forecast is for this one, or with `auto` for each that there is.

    Raises:
        UserError: if the file or the data are not there, or the file does not fit the model.
    """
    source = source_of(path).on_sample(n_data, seed)
    file, where = Path(path), pick_device(device)
    if file.is_dir():
        existing = source.checkpoints(one_run(path))
        if not existing:  # a monitor measured it
            raise UserError(no_checkpoints(file))
        file = existing[max(existing)]
    no_forecast = pd.DataFrame(columns=["device", *FORECAST_COLUMNS]), pd.DataFrame(columns=WORKERS_COLUMNS), 0
    with naming(f"'{file}'"):
        content = source.read_checkpoint(file)
        finite = weights(content.state_dict)
        if finite.status == FAULT:  # which no model can be built from
            return Diagnosis(_frame({"weights": finite}), *no_forecast)
        net = content.callable(content.build(model)).to(where)
        try:
            batch = content.sample(n_data, seed, data_root)
        except UnfitError as error:
            return Diagnosis(_frame({"data": Finding(FAULT, error.finding, error.cure)}), *no_forecast)
        frame = diagnose(net, batch, loss=loss, device=where, seed=seed)
        if (frame["status"] == FAULT).any():
            return Diagnosis(frame, *no_forecast)
        n_used = sum(map(size, as_batches(batch)))
        how: dict[str, Any] = {"loss": loss, "seed": seed}
        costs = {str(one): forecast_measurements(net, batch, device=one, **how) for one in devices(device)}
        workers = forecast_workers(net, batch, device=device, alone=costs, **how)
        for one, of_device in costs.items():
            of_device.insert(0, "device", one)
        return Diagnosis(frame, pd.concat(costs.values(), ignore_index=True), workers, n_used)

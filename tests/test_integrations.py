"""The callbacks, in their own trainers: training goes on to the same bits, and rows are those of saved files."""

from __future__ import annotations

import importlib
import re
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fpq_analysis import CurvatureMonitor, ForeignRuns, HessianTrace, UserError, measure
from fpq_analysis.data import load_dataset, training_sample


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(36, 10)
    )


def check(live, files, epochs):
    """The rows of a monitor and those of files that the trainer's user saved."""
    frames = [
        measure(source, HessianTrace(), n_data=48, device="cpu")
        for source in (live, ForeignRuns(files, network, "digits"))
    ]
    totals = [frame[(frame["layer"] == "all") & (frame["quantity"] == "trace")] for frame in frames]
    assert [list(rows["epoch"]) for rows in totals] == [epochs, epochs]
    assert list(totals[0]["value"]) == pytest.approx(list(totals[1]["value"]), rel=1e-5)
    assert totals[0]["value"].nunique() == len(epochs)


@pytest.mark.parametrize("steps", [False, True])
def test_lightning(steps, digits, tmp_path):
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    from fpq_analysis.integrations.lightning import LightningMonitor

    x, y = training_sample(digits, 128, 1)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    class Save(pl.Callback):
        def on_train_start(self, trainer, module):
            torch.save(module.net.state_dict(), tmp_path / "files" / "epoch_0.pt")

        def on_train_batch_end(self, trainer, module, *rest):
            if steps and trainer.global_step % 3 == 0:
                torch.save(module.net.state_dict(), tmp_path / "files" / f"epoch_{trainer.global_step}.pt")

        def on_train_epoch_end(self, trainer, module):
            if not steps:
                torch.save(module.net.state_dict(), tmp_path / "files" / f"epoch_{trainer.current_epoch + 1}.pt")

    def train(*callbacks):
        pl.seed_everything(3, verbose=False)
        module = Module()
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        logger = CSVLogger(tmp_path / "logs") if callbacks else False
        trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=logger, callbacks=list(callbacks), **quiet)
        trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))
        return module.net.state_dict()

    (tmp_path / "files").mkdir()
    plain = train()
    monitor = CurvatureMonitor(HessianTrace(), digits, n_data=48, out=tmp_path / "live", every=3 if steps else 1)
    measured = train(LightningMonitor(monitor, "net", steps=steps), Save())
    assert all(torch.equal(plain[key], measured[key]) for key in plain)
    check(tmp_path / "live", tmp_path / "files", [0, 3, 6] if steps else [0, 1, 2])
    assert "hessian_trace/trace" in next((tmp_path / "logs").rglob("metrics.csv")).read_text()


@pytest.mark.parametrize("steps", [False, True])
def test_transformers(steps, digits, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from fpq_analysis.integrations.transformers import TransformersMonitor

    x, y = training_sample(digits, 128, 1)

    class Model(nn.Sequential):
        """The network with a loss beside, as the Trainer wants it."""

        def forward(self, x, labels=None):
            logits = super().forward(x)
            return logits if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}

    class Save(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **rest):
            torch.save(model.state_dict(), tmp_path / "files" / "epoch_0.pt")

        def on_step_end(self, args, state, control, model=None, **rest):
            if steps and state.global_step % 3 == 0:
                torch.save(model.state_dict(), tmp_path / "files" / f"epoch_{state.global_step}.pt")

        def on_epoch_end(self, args, state, control, model=None, **rest):
            if not steps:
                torch.save(model.state_dict(), tmp_path / "files" / f"epoch_{round(state.epoch)}.pt")

    def train(*callbacks):
        transformers.set_seed(3)
        model = Model(*network())
        quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "hf"), num_train_epochs=2, per_device_train_batch_size=32, use_cpu=True, **quiet
        )
        data = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
        transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=list(callbacks)).train()
        return model.state_dict()

    (tmp_path / "files").mkdir()
    plain = train()
    monitor = CurvatureMonitor(HessianTrace(), digits, n_data=48, out=tmp_path / "live", every=3 if steps else 1)
    measured = train(TransformersMonitor(monitor, steps=steps), Save())
    assert all(torch.equal(plain[key], measured[key]) for key in plain)
    check(tmp_path / "live", tmp_path / "files", [0, 3, 6] if steps else [0, 1, 2])


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_a_package_that_is_not_there_is_named_with_what_installs_it(name, monkeypatch):
    for module in (name, f"{name}.pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"fpq_analysis.integrations.{name}", raising=False)
    with pytest.raises(UserError, match=re.escape(f"pip install 'fpq-analysis[{name}]'")):
        importlib.import_module(f"fpq_analysis.integrations.{name}")

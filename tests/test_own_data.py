"""Data, transforms and calls of the user's own, from Python and from the command line."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from typer.testing import CliRunner

from fpq_analysis import ForeignRuns, UserError, hessian_trace, measure
from fpq_analysis.cli import app
from fpq_analysis.data import OwnData, own_data
from fpq_analysis.data.batches import epoch_generator
from fpq_analysis.data.draw import fingerprint
from fpq_analysis.data.own import forget
from fpq_analysis.doctor import diagnose_checkpoint
from fpq_analysis.forward import with_forward
from fpq_analysis.nests import leaves, size
from fpq_analysis.probes import HessianTrace
from fpq_analysis.references import find

X, Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(3)), torch.arange(40) % 3
ORDER = torch.randperm(40, generator=epoch_generator(0, 0, "sample"))
MODULE = """
    import numpy as np, torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    X, Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(3)), torch.arange(40) % 3

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))

    class Dictionary(Net):
        def forward(self, values):
            return {"hidden": values, "scores": super().forward(values)}

    def make(): return X, Y
    def dataset(): return TensorDataset(X, Y)
    def arrays(): return X.numpy(), Y.numpy()
    def loader(): return DataLoader(TensorDataset(X, Y), batch_size=7, shuffle=True)
    def batches(): return [(X[i : i + 7], Y[i : i + 7]) for i in range(0, 40, 7)]
    def generator(): yield from batches()
    def dictionaries(): return [{"values": X[i : i + 7], "label": Y[i : i + 7]} for i in range(0, 40, 7)]
    def double(x): return 2 * x
    def scores(model, inputs): return model(**inputs)["scores"]
    def regression(): return X, torch.stack([X.sum(1), X[:, 0], X[:, 1]], 1)
    def huber(z, y): return nn.functional.huber_loss(z, y)
    def fails(): raise ValueError("no disk")
    def nothing(): X.sum()
    def unlabelled(): return [x for x in X]
    def single(): return X
    def ragged(): return [(x[: i % 3 + 1], y) for i, (x, y) in enumerate(zip(X, Y))]
    class Samples:
        def __init__(self, items): self.items = items
        def __len__(self): return len(self.items)
        def __getitem__(self, place): return self.items[place]
    def no_labels(): return Samples(X)
    def of_all_lengths(): return Samples(ragged())
    def three(): return Samples([(x, x, y) for x, y in zip(X, Y)])
    def broken(): return Samples([(x, y) for x, y in zip(X, Y)][:-1] + [1 / 0] if 0 else [])
    def augmented(): return Samples(Augmented())
    class Augmented(list):
        def __len__(self): return 40
        def __getitem__(self, place): return X[place] + torch.rand(6), Y[place]
    def shuffled(): return [(X[torch.randperm(40)], Y)]
    def split(): return torch.utils.data.random_split(TensorDataset(X, Y), [30, 10])[0]
    def wrong_shape(): return X[:, :5], Y
    def mismatched(): return X, Y[:30]
    def no_data(): return iter(())
    def a_class(): return TensorDataset
    def ends(): raise SystemExit(3)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with the user's module and a run."""
    (tmp_path / "ownmodule.py").write_text(textwrap.dedent(MODULE))
    (tmp_path / "script.py").write_text("raise SystemExit(2)")  # as argparse does
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    sys.modules.pop("ownmodule", None)
    forget()
    module = find("ownmodule:Net", "model").__module__
    for name in ("Net", "Dictionary"):
        folder = tmp_path / name
        folder.mkdir()
        for epoch in (1, 2):
            torch.manual_seed(epoch)
            torch.save(getattr(sys.modules[module], name)().state_dict(), folder / f"epoch_{epoch}.pt")
    yield tmp_path
    sys.modules.pop("ownmodule", None)
    forget()


def trace(folder, data, n_data=16, **settings):
    found = measure(
        ForeignRuns(folder, settings.pop("model", "ownmodule:Net"), data, **settings), HessianTrace(), n_data=n_data
    )
    totals = found[(found["layer"] == "all") & (found["quantity"] == "trace")]
    return totals.sort_values("epoch")["value"].tolist(), totals


def expected(x, y):
    found = []
    for epoch in (1, 2):
        torch.manual_seed(epoch)
        found.append(hessian_trace(find("ownmodule:Net", "model")(), (x, y)).value)
    return found


DRAWN = ["ownmodule:make", "ownmodule:dataset", "ownmodule:arrays", "ownmodule:loader"]
FIRST = ["ownmodule:batches", "ownmodule:generator"]


@pytest.mark.parametrize("data", DRAWN + FIRST)
def test_every_form_of_a_factory(here, data):
    values, rows = trace("Net", data)
    chosen = ORDER[:16] if data in DRAWN else slice(16)
    assert values == pytest.approx(expected(X[chosen], Y[chosen]), rel=1e-6)
    assert (rows["dataset"] == data).all()
    assert (rows["n_data"] == 16).all()
    assert rows["data"].nunique() == 1


def test_python_objects_are_the_same_data(here):
    class Lazy(Dataset):
        def __init__(self):
            self.read = []

        def __len__(self):
            return 40

        def __getitem__(self, place):
            self.read.append(place)
            return X[place], int(Y[place])

    lazy = Lazy()
    found = {}
    for name, data in {
        "tensors": (X, Y),
        "arrays": (X.numpy(), Y.numpy()),
        "dataset": TensorDataset(X, Y),
        "loader": DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True),
        "lazy": lazy,
        "function": lambda: (X, Y),
        "dict": {"input": X, "labels": Y},
    }.items():
        values, rows = trace("Net", data)
        found[name] = values, rows["data"].iloc[0]
        assert values == pytest.approx(expected(X[ORDER[:16]], Y[ORDER[:16]]), rel=1e-6), name
    assert len({fingerprint for _, fingerprint in list(found.values())[:6]}) == 1
    assert set(lazy.read) == set(ORDER[:16].tolist())


def test_the_sample_decides_what_was_measured(here):
    _, rows = trace("Net", (X, Y))
    assert trace("Net", (X, Y))[1]["seconds"].tolist() == rows["seconds"].tolist()  # from the records
    _, other = trace("Net", (X + 1, Y))
    assert set(other["data"]).isdisjoint(rows["data"])
    assert set(other["key"]).isdisjoint(rows["key"])
    _, larger = trace("Net", (X, Y), n_data=20)
    assert set(larger["data"]).isdisjoint(rows["data"])


def test_a_file_of_arrays(here):
    names = {"x": X.numpy(), "y": Y.numpy()}
    for arrays in (names, {"images": names["x"], "labels": names["y"]}, {"input": names["x"], "label": names["y"]}):
        np.savez("own.npz", **arrays)
        forget()
        values, rows = trace("Net", "own.npz")
        assert values == pytest.approx(expected(X[ORDER[:16]], Y[ORDER[:16]]), rel=1e-6)
        assert (rows["dataset"] == "own.npz").all()
    wrong = {"holds the arrays x, and wants": {"x": names["x"]}, "arrays a, b": {"a": names["x"], "b": names["y"]}}
    for said, arrays in wrong.items():
        np.savez("own.npz", **arrays)
        with pytest.raises(UserError, match=said):
            trace("Net", "own.npz")
    with pytest.raises(UserError, match="No file 'none.npz'"):
        trace("Net", "none.npz")
    np.savez("own.npz", x=names["x"], y=np.array([{"a": 1}] * 40, dtype=object))
    with pytest.raises(UserError, match="cannot be read"):
        trace("Net", "own.npz")
    np.save("own.npy", names["x"])
    for content in (b"", b"PK no archive", Path("own.npy").read_bytes()):
        Path("own.npz").write_bytes(content)
        with pytest.raises(UserError, match="is no archive of arrays"):
            trace("Net", "own.npz")
    with zipfile.ZipFile("own.npz", "w") as archive:
        archive.writestr("x.npy", b"no array")
    with pytest.raises(UserError, match="'x' in 'own.npz' is no array"):
        trace("Net", "own.npz")


@pytest.mark.parametrize("types", [(">f4", ">i8"), ("f4", "u2"), ("f4", "u8")])
def test_types_that_torch_does_not_know(here, types):
    np.savez("own.npz", x=X.numpy().astype(types[0]), y=Y.numpy().astype(types[1]))
    assert trace("Net", "own.npz")[0] == pytest.approx(expected(X[ORDER[:16]], Y[ORDER[:16]]), rel=1e-6)


def test_a_data_set_of_hugging_face(here):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"input": X.tolist(), "label": Y.tolist()})
    data.save_to_disk("saved")
    datasets.DatasetDict(test=data.select([0]), train=data).save_to_disk("splits")
    for folder in ("saved", "splits"):
        values, rows = trace("Net", folder)
        assert values == pytest.approx(expected(X[ORDER[:16]], Y[ORDER[:16]]), rel=1e-6)
        assert (rows["dataset"] == folder).all()


def test_transform_and_forward(here):
    values, _ = trace("Net", "ownmodule:make", transform="ownmodule:double")
    assert values == pytest.approx(expected(2 * X[ORDER[:16]], Y[ORDER[:16]]), rel=1e-6)
    own = {"transform": lambda x: 2 * x}
    assert trace("Net", TensorDataset(X, Y), **own)[0] == pytest.approx(values)
    assert trace("Net", [(X, Y)], **own)[0] == pytest.approx(expected(2 * X[:16], Y[:16]), rel=1e-6)
    settings = {"model": "ownmodule:Dictionary", "forward": "ownmodule:scores"}
    plain, rows = trace("Dictionary", "ownmodule:dictionaries", **settings)
    assert plain == pytest.approx(expected(X[:16], Y[:16]), rel=1e-6)
    other = trace("Dictionary", "ownmodule:dictionaries", **{**settings, "forward": lambda m, i: 3 * m(**i)["scores"]})
    assert set(other[1]["key"]).isdisjoint(rows["key"])
    with pytest.raises(UserError, match=r"hidden \(1\dx6\), scores \(1\dx3\).*--forward"):
        trace("Dictionary", "ownmodule:dictionaries", model="ownmodule:Dictionary")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("ownmodule:fails", "'ownmodule:fails' failed: ValueError: no disk"),
        ("ownmodule:nothing", "'ownmodule:nothing' gave nothing"),
        ("ownmodule:unlabelled", "A batch is a Tensor"),
        ("ownmodule:single", "The data are a Tensor"),
        ("ownmodule:no_labels", "A sample of .* is a Tensor, without a label"),
        ("ownmodule:of_all_lengths", "cannot be put into a batch .*transform.*collate_fn"),
        ("ownmodule:three", "A batch is a list of 3 parts"),
        ("ownmodule:broken", "There is no data in"),
        ("ownmodule:augmented", "others each time they are read: is there augmentation"),
        ("ownmodule:shuffled", "others each time"),
        ("ownmodule:split", "others each time"),
        ("ownmodule:wrong_shape", "cannot be run on these inputs, of shape .*, 5"),
        ("ownmodule:mismatched", "40 inputs and 30 targets"),
        ("ownmodule:no_data", "There is no data"),
        ("ownmodule:a_class", "The data are a type"),
        ("ownmodule:ends", "'ownmodule:ends' failed: SystemExit: 3"),
        ("script:make", "'script:make': its module ends the program when it is imported"),
        ("ownmodule:absent", "Cannot import the data 'ownmodule:absent'"),
        ("absent:make", "Cannot import the data 'absent:make'"),
        ("digit", "did you mean 'digits'.*package.module:function"),
    ],
)
def test_what_is_no_data_is_told_in_a_paragraph(here, data, said):
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with pytest.raises(UserError, match=said) as raised:
        trace("Net", data)
    assert "\n" not in str(raised.value)
    assert data == "ownmodule:wrong_shape" or torch.equal(state[0], torch.get_rng_state())  # a network was made there
    assert (state[1] == np.random.get_state()[1]).all()  # noqa: NPY002


def test_settings_that_do_not_go_together(here):
    for settings in ({"normalize": "none"}, {"image_size": 8}, {"data_root": "."}):
        with pytest.raises(UserError, match="are for images of a known data set"):
            ForeignRuns("Net", "ownmodule:Net", "ownmodule:make", **settings)
    with pytest.raises(UserError, match="A transform is for data of your own"):
        ForeignRuns("Net", "ownmodule:Net", "digits", transform="ownmodule:double")
    with pytest.raises(UserError, match="Cannot import the forward function 'ownmodule:absent'"):
        ForeignRuns("Net", "ownmodule:Net", "ownmodule:make", forward="ownmodule:absent")
    with pytest.raises(UserError, match="names no forward function"):
        ForeignRuns("Net", "ownmodule:Net", "ownmodule:make", forward="scores")
    for transform, said in ((lambda x: None, "gave nothing for a sample"), (lambda x: x / "a", "The transform fails")):
        with pytest.raises(UserError, match=said):
            trace("Net", (X, Y), transform=transform)


def test_a_module_that_fails_when_imported(here):
    Path("failing.py").write_text("1 / 0")
    with pytest.raises(UserError, match="fails when it is imported: ZeroDivisionError"):
        find("failing:make", "data")


def test_doctor_takes_them_too(here):
    findings, costs, workers, n_data = diagnose_checkpoint(
        ForeignRuns("Net", "ownmodule:Net", "ownmodule:make"), n_data=16
    )
    assert n_data == 16
    assert not (findings["status"] == "fault").any()
    assert len(costs) == 4
    assert len(workers)


def test_the_command_line(here):
    options = ["--ckpt-dir", "Dictionary", "--n-data", "16", "--device", "cpu", "--data", "ownmodule:dictionaries"]
    options += ["--model", "ownmodule:Dictionary", "--forward", "ownmodule:scores"]
    result = CliRunner().invoke(app, ["hessian", *options, "--json"])
    assert result.exit_code == 0, result.output
    assert '"dataset":"ownmodule:dictionaries"' in result.output
    result = CliRunner().invoke(app, ["hessian", *options, "--dry-run"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["doctor", "Dictionary", *options[6:], "--n-data", "16"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["hessian", *options[:6], "--data", "ownmodule:fails", "--model", "ownmodule:Net"])
    assert result.exit_code == 1
    assert "failed: ValueError: no disk" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["hessian", "--forward", "ownmodule:scores"])
    assert "--forward" in result.output
    assert result.exit_code == 1


def test_compare_says_how_many_samples_there_were(here):
    options = ["--model", "ownmodule:Net", "--data", "ownmodule:make", "--n-data", "64", "--device", "cpu"]
    shutil.copytree("Net", "Other")
    result = CliRunner().invoke(app, ["compare", "Net", "Other", *options])
    assert result.exit_code == 0, result.output
    assert "40 samples" in " ".join(result.output.split())


def test_compare_and_doctor_take_the_loss(here):
    options = ["--model", "ownmodule:Net", "--data", "ownmodule:regression", "--n-data", "16", "--device", "cpu"]
    shutil.copytree("Net", "Other")
    for call in (["compare", "Net", "Other"], ["doctor", "Net"]):
        result = CliRunner().invoke(app, [*call, *options, "--loss", "squared_error"])
        assert result.exit_code == 0, result.output
        assert CliRunner().invoke(app, [*call, *options]).exit_code == 1  # it is no cross-entropy


def test_the_table_says_that_an_interval_is_over_probes(here):
    options = ["--ckpt-dir", "Net", "--model", "ownmodule:Net", "--data", "ownmodule:make", "--n-data", "16"]
    result = CliRunner().invoke(app, ["hessian", *options, "--device", "cpu", "--method", "hutchinson"])
    assert "± 95 %: over the random probes, for these samples." in result.output
    result = CliRunner().invoke(app, ["hessian", *options, "--device", "cpu"])
    assert "± 95 %: over the samples measured on" in result.output
    assert "probes" not in result.output


def test_a_regression_with_a_loss_of_ones_own(here):
    model = find("ownmodule:Net", "model")
    targets = find("ownmodule:regression", "data")()[1]
    for loss in ("squared_error", "ownmodule:huber"):
        source = ForeignRuns("Net", "ownmodule:Net", "ownmodule:regression")
        found = measure(source, HessianTrace(), n_data=None, loss=loss, epochs="1")
        torch.manual_seed(1)
        order = torch.randperm(40, generator=epoch_generator(0, 0, "sample"))
        direct = hessian_trace(model(), (X[order], targets[order]), loss=loss)
        row = found[(found["layer"] == "all") & (found["quantity"] == "trace")].iloc[0]
        assert (row["value"], row["loss"]) == (pytest.approx(direct.value, rel=1e-6), loss)


def test_a_stream_is_left_after_what_is_needed(here):
    seen = []

    class Stream(IterableDataset):
        def __iter__(self):
            for i in range(10**6):
                seen.append(i)
                yield X[i % 40], Y[i % 40]

    for data, most in ((DataLoader(Stream(), batch_size=4), 20), (Stream(), 30)):  # by itself it gives samples
        seen.clear()
        sample = OwnData(data).sample(10, 0)
        assert sample.n_data == 10
        assert max(seen) < most
        assert torch.equal(sample.batches[0], X[:10])


def test_a_loader_that_does_not_batch_gives_batches():
    items = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 40, 8)]
    sample = OwnData(DataLoader(items, batch_size=None)).sample(20, 0)
    assert torch.equal(sample.batches[0], X[:20])


def test_samples_of_several_lengths_stay_in_batches():
    items = [(X[i, : i % 3 + 1], Y[i]) for i in range(40)]

    def pad(chunk):
        return nn.utils.rnn.pad_sequence([x for x, _ in chunk], batch_first=True), torch.stack([y for _, y in chunk])

    sample = OwnData(DataLoader(items, batch_size=1, collate_fn=pad)).sample(12, 0)
    assert sample.n_data == sum(map(size, sample.batches)) == 12
    assert len(sample.batches) == 12


def test_the_name_and_the_classes():
    class Named(TensorDataset):
        classes = ("a", "b", "c", "d")

    data = OwnData(Named(X, Y))
    assert data.name == "Named"
    assert data.describe(8, 0)["num_classes"] == 4
    assert OwnData((X, Y)).describe(8, 0)["num_classes"] == 3
    assert OwnData((X, X)).describe(8, 0)["num_classes"] is None
    assert OwnData((X, Y)).name == "tensors"
    assert own_data("cifar10") is None
    assert own_data(Path("a.npz")).name == "a.npz"
    one = OwnData((X, Y)).sample(8, 0)
    assert one.fingerprint == OwnData(pickle.loads(pickle.dumps((X, Y)))).sample(8, 0).fingerprint
    assert fingerprint([(X, Y)]) != fingerprint([(X.double(), Y)])


def test_a_generator_is_gone_through_once():
    data = OwnData(batch for batch in [(X, Y)])
    assert data.sample(8, 0).n_data == data.sample(8, 0).n_data == 8
    with pytest.raises(UserError, match="used up before"):
        data.sample(9, 0)


def test_dataclasses_are_samples():
    @dataclasses.dataclass
    class Item:
        values: torch.Tensor
        label: int

    sample = OwnData(DataLoader([Item(x, int(y)) for x, y in zip(X, Y, strict=True)])).sample(5, 0)
    assert torch.equal(leaves(sample.batches)[0], X[ORDER[:5]])


def test_what_else_the_network_has_is_in_reach():
    class Net(nn.Linear):
        temperature = 2

        def scale(self):
            return 3

    wrapped = with_forward(Net(2, 2))
    assert (wrapped.temperature, wrapped.scale(), wrapped.in_features) == (2, 3, 2)
    with pytest.raises(AttributeError):
        _ = wrapped.absent

"""Records on disk, differences between runs, and the figure's content."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from fpq_analysis import UserError, records
from fpq_analysis.cli.measuring import draw
from fpq_analysis.errors import NothingToDraw
from fpq_analysis.intervals import over_seeds
from fpq_analysis.loss_titles import LOSS_TITLES, loss_title
from fpq_analysis.losses import LOSSES, combined, cross_entropy, weighted
from fpq_analysis.plots import FIGURES, caption5, density_figure, eigenvalue_caption, eigenvalue_figure, figure5, save
from fpq_analysis.plots.axes import powers_of_ten
from fpq_analysis.plots.density import measure_figure
from fpq_analysis.plots.drift import QUANTITIES
from fpq_analysis.records.comparison import SeedsDifference, against_baseline, among_themselves, by_epoch, difference
from fpq_analysis.records.queries import AT_CHANCE, marked, mean_loss, totals


def row(run="lsq-w4a4", method="lsq", bits="W4A4", epoch=0, value=10.0, **other):
    return {
        "run": run,
        "method": method,
        "model": "resnet20",
        "dataset": "digits",
        "data": "f",
        "bits": bits,
        "train_seed": 0,
        "epoch": epoch,
        "checkpoint": "c",
        "probe": "hessian_trace",
        "definition": "dequantized",
        "loss": "cross_entropy",
        "estimator": "exact",
        "layer": "all",
        "quantity": "trace",
        "value": value,
        "sem": 0.0,
        "sem_data": 1.0,
        "ci95": 1.96,
        "n_data": 4,
        "n_products": 9,
        "seed": 0,
        "key": f"{run}{epoch}",
        "status": "ok",
        "seconds": 1.0,
        "samples": [value] * 4,
        **other,
    }


@pytest.fixture
def frame():
    dice = np.random.default_rng(0)
    rows = [row("fp", "fp", "FP", epoch, 5.0 + epoch) for epoch in range(3)]
    for method in ("lsq", "fpq"):
        for bits in ("W4A4", "W2A4"):
            rows += [
                row(f"{method}-{bits}", method, bits, epoch, 40.0 - epoch + 5 * (method == "lsq"), ci95=4.0)
                for epoch in range(3)
            ]
    return pd.DataFrame(rows).assign(samples=[list(dice.normal(size=4)) for _ in rows])


def test_append_read_resume(tmp_path):
    run = tmp_path / "run"
    records.append(run, "hessian_trace", [row(layer="0", loss=None), row(layer="all")])
    records.append(run, "hessian_trace", [row(epoch=1, layer="all", quantity="clipped"), row(epoch=1, layer="all")])
    path = run / "records" / "hessian_trace.jsonl"
    path.write_text(path.read_text()[:-20])  # cut off within its last row
    frame = records.read(tmp_path, [run], "hessian_trace")
    assert list(frame.columns) == list(records.COLUMNS)
    assert set(frame["loss"]) == {"cross_entropy"}  # also where a row does not say
    assert list(frame["layer"]) == ["0", "all"]
    assert records.done(run, "hessian_trace") == {"lsq-w4a40"}
    records.append(run, "hessian_trace", [row(layer="0", value=3.0), row(layer="all", value=3.0)])
    assert list(records.read(tmp_path, [run], "hessian_trace")["value"]) == [3.0, 3.0]  # the newest counts
    assert records.read(tmp_path, [tmp_path / "nothing"], "hessian_trace").empty
    assert records.read(tmp_path, [run], "hessian_trace", keys=set()).empty
    assert set(frame["run"]) == {"run"}
    assert set(records.read(run, [run], "hessian_trace")["run"]) == {"run"}
    assert set(records.read(tmp_path.parent, [run], "hessian_trace")["run"]) == {f"{tmp_path.name}/run"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_none_says_so(tmp_path, value):
    records.append(tmp_path, "p", [row(value=value, sem_data=math.nan)])
    (found,) = records.read(tmp_path, [tmp_path], "p").to_dict("records")
    assert math.isnan(found["value"])
    assert "not finite" in found["status"]
    assert totals(records.read(tmp_path, [tmp_path], "p")).empty


def test_keys_differ_where_anything_differs():
    keys = {
        records.measurement_key(checkpoint, probe, settings)
        for checkpoint in ("a", "b")
        for probe in ("p", "q")
        for settings in ({"seed": 0}, {"seed": 1}, {"seed": 0, "n": 1})
    }
    assert len(keys) == 12


def test_figure5_shows_every_quantized_run_with_its_band(frame):
    figure = figure5(frame)
    assert isinstance(figure, Figure)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"LSQ W4A4", "LSQ W2A4", "FPQ W4A4", "FPQ W2A4", "FP, epoch 2"}
    np.testing.assert_allclose(lines["FPQ W4A4"].get_ydata(), [40, 39, 38])
    assert lines["FP, epoch 2"].get_ydata()[0] == 7
    assert len(axes.collections) == 4
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() - band.min() > 2 * 4.0
    assert lines["FPQ W4A4"].get_color() == lines["FPQ W2A4"].get_color() != lines["LSQ W4A4"].get_color()
    assert lines["FPQ W4A4"].get_linestyle() != lines["FPQ W2A4"].get_linestyle()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["FP, epoch 2", "LSQ W4A4", "LSQ W2A4", "FPQ W4A4", "FPQ W2A4"]
    assert axes.get_ylabel()
    assert axes.get_yscale() == "linear"


def test_figure5_tells_the_definitions_of_one_run_apart(frame):
    rows = frame[(frame["run"] == frame["run"].iloc[-1])]
    (axes,) = figure5(pd.concat([rows.assign(definition=d) for d in ("dequantized", "latent", "float")])).axes
    assert len({line.get_linestyle() for line in axes.lines}) == 3


def test_figure5_of_float_runs_alone_is_a_trajectory(frame):
    (axes,) = figure5(frame[frame["method"] == "fp"]).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [5, 6, 7])


def test_figure5_of_one_epoch_has_bars_and_whole_epochs(frame):
    rows = frame[(frame["epoch"] == 2) & (frame["method"] != "fp")]
    figure = figure5(rows)
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [2]
    bars = [bar for group in axes.containers for bar in group.lines[2]]
    ends = sorted(tuple(bar.get_segments()[0][:, 1]) for bar in bars)
    drawn = totals(rows)
    np.testing.assert_allclose(
        ends, sorted(zip(drawn["value"] - drawn["ci95"], drawn["value"] + drawn["ci95"], strict=True))
    )


def test_figure5_panels_scale_and_twins(frame):
    other = frame.assign(dataset="cifar10", value=frame["value"] * np.linspace(1, 100, len(frame)))
    twin = frame[frame["run"] == "lsq-W4A4"].assign(run="again")
    figure = figure5(pd.concat([frame, other, twin]))
    assert [axes.get_title() for axes in figure.axes] == ["ResNet-20, CIFAR-10", "ResNet-20, digits"]
    assert figure.axes[0].get_yscale() == "log"
    assert "LSQ W4A4 (again)" in {line.get_label() for line in figure.axes[1].lines}


def test_figure5_of_nothing():
    with pytest.raises(NothingToDraw, match="no finite trace"):
        figure5(pd.DataFrame(columns=list(records.COLUMNS)))


def spectrum(run, epoch, nodes, weights, **other):
    """Rows as the density probe writes them."""
    rows = []
    for r, (x, w) in enumerate(zip(nodes, weights, strict=True), 1):
        for quantity, samples in ((f"nodes_{r}", x), (f"weights_{r}", w)):
            rows.append(row(run, run, epoch=epoch, quantity=quantity, value=1.0, samples=list(samples), **other))
    return rows


def test_density_figure_draws_the_smoothed_measure_and_marks_outliers():
    nodes = [[-1.0, 0.0, 1.0, 40.0, 100.0], [-1.2, 0.1, 1.1, 40.5, 99.5]]
    weights = [[0.1, 0.7, 0.1, 0.07, 0.03], [0.1, 0.7, 0.1, 0.05, 0.05]]
    figure = density_figure(pd.DataFrame(spectrum("lsq", 0, nodes, weights) + spectrum("lsq", 5, nodes, weights)))
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["epoch 0", "epoch 5"]
    curve, marks = axes.lines[1], axes.lines[-1]
    x, y = curve.get_data()
    assert np.trapezoid(y, x) == pytest.approx(1, abs=1e-3)
    np.testing.assert_allclose(marks.get_xdata(), [99.75, 40.25])
    assert axes.get_xlabel() == "Eigenvalue"
    bare = measure_figure(np.array(nodes), np.array(weights)).axes[0]
    np.testing.assert_array_equal(bare.lines[0].get_xydata(), curve.get_xydata())
    assert len(bare.collections) == 1
    single = measure_figure(np.array(nodes[:1]), np.array(weights[:1])).axes[0]
    assert np.trapezoid(single.lines[0].get_ydata(), single.lines[0].get_xdata()) == pytest.approx(1, abs=1e-3)
    assert not single.collections  # no error without a second run
    with pytest.raises(NothingToDraw, match="no spectral density"):
        density_figure(pd.DataFrame(columns=list(records.COLUMNS)))


def test_eigenvalue_figure_draws_every_rank():
    rows = [
        row(run, run, epoch=epoch, quantity=f"eigenvalue_{rank}", value=10.0 * epoch - rank, estimator="lanczos LA")
        for run in ("lsq", "fpq")
        for epoch in range(3)
        for rank in (1, 2, 3)
    ]
    figure = eigenvalue_figure(pd.DataFrame(rows))
    assert [axes.get_title() for axes in figure.axes] == ["LSQ W4A4", "FPQ W4A4"]
    for axes in figure.axes:
        lines = {line.get_label(): line for line in axes.lines}
        for rank in (1, 2, 3):
            line = lines[f"{rank}"]
            np.testing.assert_allclose(line.get_ydata(), [-rank, 10 - rank, 20 - rank])
    assert "residuals" in eigenvalue_caption(pd.DataFrame(rows))
    with pytest.raises(NothingToDraw, match="no finite eigenvalue"):
        eigenvalue_figure(pd.DataFrame(columns=list(records.COLUMNS)).astype({"quantity": str}))


def test_save_writes_picture_print_and_caption(frame, tmp_path):
    paths = save(figure5(frame), tmp_path / "new" / "figure5", caption5(frame))
    assert [path.suffix for path in paths] == [".png", ".pdf", ".txt"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert paths[1].read_bytes().startswith(b"%PDF")
    text = paths[2].read_text()
    for fact in ("dequantized", "exact", "4 training images", "digits", "95 %"):
        assert fact in text


def test_differences_are_paired():
    """A common error of the images cancels: the interval is that of the differences."""
    common = np.random.default_rng(0).normal(100, 50, 400)
    gap = np.random.default_rng(1).normal(-3, 2, 400)
    rows = [row("lsq", "lsq", epoch=epoch, value=float(common.mean()), samples=list(common)) for epoch in (0, 1)] + [
        row("fpq", "fpq", epoch=epoch, value=float((common + gap).mean()), samples=list(common + gap))
        for epoch in (0, 1, 2)
    ]
    (difference,) = against_baseline(pd.DataFrame(rows))
    assert difference.epoch == 1  # the last that both have
    assert difference.value == pytest.approx(gap.mean())
    assert difference.sem == pytest.approx(gap.std(ddof=1) / 20)
    assert difference.ci95 == pytest.approx(1.96593 * difference.sem, rel=1e-5)  # Student's, of 399 degrees of freedom
    assert "lower than that of lsq at epoch 1" in difference.sentence()


def test_differences_are_taken_within_a_folder():
    """Two studies below one folder: each FPQ run against the LSQ run beside it."""
    rows = [row(f"{study}/{method}", method, value=value, samples=[value, value + 1]) for study, method, value in
            (("a", "lsq", 5.0), ("a", "fpq", 4.0), ("b", "lsq", 50.0), ("b", "fpq", 51.0))]  # fmt: skip
    found = against_baseline(pd.DataFrame(rows))
    assert [(d.run, d.baseline, d.value) for d in found] == [("a/fpq", "a/lsq", -1.0), ("b/fpq", "b/lsq", 1.0)]


def test_differences_that_are_noise_are_called_so():
    noise = np.random.default_rng(0).normal(0, 1, 100)
    rows = [row("lsq", "lsq", samples=[10.0] * 100), row("fpq", "fpq", samples=list(10 + noise - noise.mean() + 0.01))]
    sentence = against_baseline(pd.DataFrame(rows))[0].sentence()
    assert "do not differ measurably" in sentence
    assert " % of " in sentence
    assert against_baseline(pd.DataFrame([row("lsq", "lsq"), row("fpq", "fpq", n_data=5)])) == []  # other images
    assert against_baseline(pd.DataFrame([row("fp", "fp", "FP")])) == []


@pytest.mark.parametrize("other", ["a", None])
def test_seeds_that_are_text_stand_beside_numbers(tmp_path, other):
    runs = [tmp_path / "ours", tmp_path / "theirs"]
    for run, seed in zip(runs, (0, other), strict=True):
        records.append(run, "hessian_trace", [row(train_seed=seed)])
    caption = caption5(records.read(tmp_path, runs, "hessian_trace"))
    assert f"training seed 0, {other or 'unknown'}." in caption


def test_differences_among_runs_whose_seeds_are_not_known():
    """Each against the first by name, of the same method and bits."""
    about = [("sgd", "fp", "FP", 7.0), ("adam", "fp", "FP", 4.0), ("late", "fp", "FP", 5.0), ("int8", "x", "W8A8", 9.0)]
    rows = [row(name, m, bits, value=v, samples=[v, v + 1], train_seed="unknown") for name, m, bits, v in about]
    rows.append(row("ours", "fp", "FP", value=1.0, samples=[1.0, 2.0], train_seed=3))
    found = among_themselves(pd.DataFrame(rows))
    assert [(d.run, d.baseline, d.value) for d in found] == [("late", "adam", 1.0), ("sgd", "adam", 3.0)]


def test_a_difference_of_one_sample_has_no_error():
    rows = [
        row(name, method, value=value, samples=[value])
        for name, method, value in (("a", "lsq", 4.0), ("b", "fpq", 5.0))
    ]
    (found,) = against_baseline(pd.DataFrame(rows))
    assert found.sentence().endswith(
        "is 1 higher than that of a at epoch 0 (25 % of 4); from so few samples the error is not known."
    )


def test_differences_of_estimates_are_over_the_probes():
    """Where one error is over probes, for these samples, the other is, too: none for an exact trace."""
    estimate = row("a", value=5.0, samples=None, sem=0.3, sem_data=math.nan, ci95=0.7)
    exact = row("b", value=4.0, sem=0.0, sem_data=2.0, ci95=4.0)
    assert difference(pd.Series(estimate), pd.Series(exact)).ci95 == pytest.approx(0.7)
    two = difference(pd.Series(estimate), pd.Series(estimate))
    assert two.ci95 == pytest.approx(0.7 * math.sqrt(2))
    assert two.over_probes
    assert two.as_row()["over_probes"]
    both = [pd.Series({**exact, "samples": None, "ci95": half}) for half in (3.0, 4.0)]
    assert difference(*both).ci95 == pytest.approx(5.0)
    assert not difference(*both).over_probes


class TestOverSeeds:
    """Differences of several training seeds on the same images."""

    def differences(self, n_seeds, paired=True, shift=-5.0):
        rng = np.random.default_rng(n_seeds)
        images = rng.normal(20, 5, 64)
        rows = []
        for seed in range(n_seeds):
            theirs = images + rng.normal(0, 1, 64)
            ours = theirs + shift + rng.normal(0, 1) + rng.normal(0, 0.5, 64)
            for run, samples in (("lsq", theirs), ("fpq", ours)):
                about = {"train_seed": seed, "value": samples.mean(), "ci95": 1.0}
                rows.append(row(f"{run}-{seed}", run, samples=list(samples) if paired else None, **about))
        frame = pd.DataFrame(rows)
        return [difference(frame.loc[2 * i + 1], frame.loc[2 * i]) for i in range(n_seeds)]

    def test_both_intervals_are_said(self):
        found = SeedsDifference.of(self.differences(4))
        assert found.crossed.value == pytest.approx(np.mean([d.value for d in found.each]))
        assert found.crossed.ci95 > 3 * found.crossed.ci95_images
        said = found.sentence("FPQ", "LSQ")
        assert said.startswith("FPQ against LSQ, over 4 training seeds: the trace is lower by")
        assert "over these samples alone ±" in said

    def test_two_seeds_give_no_interval_over_seeds(self):
        found = SeedsDifference.of(self.differences(2))
        said = found.sentence("FPQ", "LSQ")
        assert "takes 3 or more" in said
        assert f"± {found.crossed.ci95_images:.2g}" in said

    def test_how_many_seeds_a_small_difference_takes(self):
        found = SeedsDifference.of(self.differences(3, shift=0.0))
        said = found.sentence("FPQ", "LSQ")
        assert "does not differ measurably" in said
        needed = found.crossed.seeds_needed(0.1 * found.baseline_value)
        assert (f"would show with {needed} seeds" in said) == (needed > 3)

    def test_without_single_images_it_is_students(self):
        found = SeedsDifference.of(self.differences(3, paired=False))
        assert found.crossed is None
        assert "Student interval over the seeds" in found.sentence("FPQ", "LSQ")
        mean, half = over_seeds([d.value for d in found.each])
        assert (found.as_row()["value"], found.as_row()["ci95"]) == (mean, half)


def test_differences_by_epoch_without_samples_are_the_wider():
    rows = {
        run: pd.DataFrame([row(run, run, epoch=epoch, value=value, samples=None, ci95=3.0) for epoch in epochs])
        for run, value, epochs in (("a", 5.0, (0, 1, 2)), ("b", 9.0, (1, 2, 3)))
    }
    found = by_epoch(rows["a"], rows["b"])
    assert [difference.epoch for difference in found] == [1, 2]
    assert all(difference.value == -4 and not difference.paired for difference in found)
    assert found[0].ci95 == pytest.approx(3 * 2**0.5)
    with pytest.raises(UserError, match="no epoch in common"):
        by_epoch(rows["a"][:1], rows["b"])
    with pytest.raises(UserError, match="different data"):
        by_epoch(rows["a"].assign(data="other"), rows["b"])


def test_an_old_figure_survives_a_full_disk(frame, tmp_path):
    """It became 20 kB of rubbish under `ulimit -f`."""
    paths = save(figure5(frame), tmp_path / "figure5", caption5(frame))
    before = [path.read_bytes() for path in paths]
    frame.to_pickle(tmp_path / "frame")
    code = f"""
import pandas, resource
from fpq_analysis.plots import caption5, figure5, save
frame = pandas.read_pickle({str(tmp_path / "frame")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
save(figure5(frame.assign(value=2 * frame["value"])), {str(tmp_path / "figure5")!r}, caption5(frame))
"""
    child = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "UserError" in child.stderr
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("name", [r"$\frac$", "a$b$c", "[red]abc", "a[/b]", r"\alpha_{", "模型", "%s {} {0}"])
@pytest.mark.parametrize("number", ["5", "density", "noise", "drift_layers"])
@pytest.mark.filterwarnings("error")
def test_names_are_text(name, number, frame, tmp_path):
    """`$\\frac$` in a run's name killed the report: nothing is mathematics."""
    if number == "density":
        frame = pd.DataFrame(
            [
                row(name, method=name, quantity=q, samples=[0.0, 1.0, 5.0])
                for q in ("nodes_1", "weights_1", "nodes_2", "weights_2")
            ]
        )
    if number == "noise":
        frame = pd.DataFrame(
            [row(name, method=name, quantity=f"{kind}_1.0") for kind in ("real", "surrogate", "predicted")]
        )
    if number == "drift_layers":
        frame = pd.DataFrame(
            [row(method=name, quantity=what, layer=layer) for what in QUANTITIES for layer in (name, "all")]
        )
    paths = FIGURES[number].write(frame.assign(run=name, model=name, dataset=name), tmp_path)
    assert all(path.stat().st_size > 0 for path in paths)
    if number == "drift_layers":
        texts = [text.get_text() for text in FIGURES[number].draw(frame.assign(model=name)).findobj(Text)]
        assert any(name in text for text in texts)


def test_powers_of_ten():
    axes = Figure().add_subplot()
    axes.set_yscale("log")
    axes.set_ylim(1e-3, 1e12)
    powers_of_ten(axes.yaxis)
    labels = axes.yaxis.get_major_formatter().format_ticks([1e-3, 1.0, 1e12])
    assert labels == ["10⁻³", "10⁰", "10¹²"]


def test_a_fault_is_not_nothing_to_draw(frame, tmp_path, monkeypatch, capsys):
    """An error in pandas made a figure vanish without a word."""

    def broken(records):
        raise ValueError("cannot reindex on an axis with duplicate labels")

    monkeypatch.setattr(sys.modules["fpq_analysis.plots.figure5"], "figure5", broken)
    (fault,) = draw("hessian_trace", frame, tmp_path)
    assert "Figure 5: ValueError: cannot reindex" in str(fault)
    monkeypatch.undo()
    assert draw("hessian_trace", frame.iloc[:0], tmp_path) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("probe", ["gradnorm", "hessian_trace", "hessian_eigs", "hessian_density", "noise"])
def test_captions_name_the_loss_that_was_measured(probe):
    quantities = ("grad_norm_minibatch@features", "trace", "eigenvalue_1", "nodes_1", "predicted_1.0")
    rows = [row(quantity=q, layer="all", loss="squared_error", samples=[0.0, 1.0], n_products=1) for q in quantities]
    (caption,) = (drawing.caption(pd.DataFrame(rows)) for drawing in FIGURES.values() if drawing.probe == probe)
    assert "mean squared error" in caption
    assert "cross-entropy" not in caption


def test_losses_in_words():
    assert set(LOSS_TITLES) == set(LOSSES)
    names = {"squared_error", "cross_entropy(label_smoothing=0.1)", "mine:huber"}
    words = mean_loss(pd.DataFrame({"loss": sorted(names)}))
    assert words == "mean cross-entropy (label_smoothing=0.1), loss mine:huber or squared error"
    terms = (0.5, cross_entropy(ignore_index=255)), (1e-6, weighted(LOSSES["causal_lm"]))
    words = loss_title(combined(*terms).name)
    second = "1e-06 × cross-entropy of the next token, weighted by sample"
    assert words == f"0.5 × cross-entropy (ignore_index=255) + {second}"
    assert combined((0.5, combined(*terms)), terms[0]).name.startswith("0.5 (0.5 cross_entropy(ignore_index=255) + 1")


def test_samples_are_images_where_they_are_known_to_be():
    rows = [row(epoch=epoch, n_data=64) for epoch in (0, 1)]
    assert "on 64 training images without augmentation" in caption5(pd.DataFrame(rows))
    assert "on 64 samples without augmentation" in caption5(pd.DataFrame(rows).assign(dataset="mine:patients"))


def test_an_interval_over_probes_is_none_over_samples():
    rows = pd.DataFrame([row(epoch=epoch) for epoch in (0, 1)])
    assert "95 % interval over the samples, not" in caption5(rows)
    rows.loc[0, "sem_data"] = math.nan
    assert "over the samples, or, where single ones are not seen, the random probes" in caption5(rows)
    assert "95 % interval over the random probes, for these samples" in caption5(rows.assign(sem_data=math.nan))


def test_a_network_at_chance_before_training_is_no_caution():
    frame = pd.DataFrame({"status": ["ok", AT_CHANCE, AT_CHANCE, "aliased"], "epoch": [3, 0, 3, 0]})
    assert list(marked(frame).index) == [2, 3]

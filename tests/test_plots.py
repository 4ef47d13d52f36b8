"""What all figures have in common: one order, one look a method, letters, names; nothing is clipped or overlaps."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text

from fpq_analysis import UserError, records
from fpq_analysis.intervals import crossed, over_seeds
from fpq_analysis.methods import METHODS, bits_rank, method_rank
from fpq_analysis.plots import FIGURES, figure1, figure2, figure5, look, training_figure
from fpq_analysis.plots.axes import panels
from fpq_analysis.plots.names import SPARE_COLOURS, Looks
from fpq_analysis.plots.style import WIDTHS
from fpq_analysis.records.queries import ordered
from fpq_analysis.records.seeds import curve, families, interval_words
from tests.test_records_and_plots import row

ORDER = ["FP", "LSQ", "LSQ+", "PACT", "KD", "SAM", "FPQ"]
QUANTIZED = ("fpq", "sam", "kd", "pact", "lsq+", "lsq")  # backwards: no figure may rest on the order of rows
KINDS = [("fp", "FP"), *itertools.product(QUANTIZED, ("W2A4", "W4A4"))]
FEW = [("fp", "FP"), *itertools.product(("fpq", "lsq"), ("W2A4", "W4A4"))]
IMAGES = 8


def quantities(key, level, dice):
    """(layer, quantity, value, samples) of one checkpoint, as the probe of a figure gives them."""
    if key == "1":
        return [("all", f"logit_variance@{sd}", level * sd**2, None) for sd in (0.05, 0.1, 0.2, 0.5)]
    if key == "2":
        return [("all", f"grad_norm_minibatch@{arm}", level, None) for arm in ("clean", "features", "weights")]
    if key in ("3", "4"):
        ends = np.sort(dice.exponential(1, (7, 5)), 0)
        names = ("q01", "q25", "median", "mean", "q75", "q99", "max")
        found = [("relu", name, float(column.mean()), list(column)) for name, column in zip(names, ends, strict=True)]
        found += [("relu", "mean_sem", 0.01, [0.01] * 5), ("relu", "density_edges", 0.25, list(np.arange(17) * 0.25))]
        found += [("relu", "density_images", 3.0, [4.0, 11.0, 107.0])]
        return found + [("relu", f"density_{i}", 0.5, list(2 * dice.dirichlet(np.ones(16)))) for i in (1, 2, 3)]
    if key == "5":
        samples = level + dice.normal(0, 0.2 * level, IMAGES)
        return [("all", "trace", float(samples.mean()), list(samples))]
    if key == "eigenvalues":
        return [("all", f"eigenvalue_{rank}", level / rank, None) for rank in (1, 2, 3)]
    if key == "density":
        parts = [(f"{what}_{i}", dice.dirichlet(np.ones(9))) for i in (1, 2) for what in ("nodes", "weights")]
        return [
            ("all", name, 1.0, sorted(level * values) if "nodes" in name else list(values)) for name, values in parts
        ]
    if key.startswith("drift"):
        names = ("mean_shift", "decorrelation", "wasserstein")
        layers = ["all", *(f"stages.{i}.0.conv{j}" for i in range(3) for j in (1, 2))]
        return [(layer, name, level * (1 + i), None) for name in names for i, layer in enumerate(layers)]
    if key == "noise":
        sizes = ("0.125", "0.25", "0.5", "1.0", "2.0", "4.0")
        return [("all", f"{kind}_{s}", level * float(s) ** 2, None) for kind in ("real", "predicted") for s in sizes]
    return [
        ("all", "near", 0.1 + 0.001 * level, None),
        ("all", "flipped", 0.01 * level, None),
        ("all", "eps", 0.1, None),
    ]


def measured(key, kinds=KINDS, seeds=3, epochs=(0, 1, 5), half=0.3):
    """Records of many runs, as one might well have them; half of the intervals relative to the values."""
    dice = np.random.default_rng(0)
    rows = []
    for (method, bits), seed in itertools.product(kinds, range(seeds)):
        if (bits == "FP" and key in ("2", "oscillation", "noise")) or (bits == "FP" and key.startswith("drift")):
            continue
        level = (3 + method_rank(method) + (5 if bits == "W2A4" else 0)) * dice.uniform(0.9, 1.1)
        for epoch in epochs:
            about = {"train_seed": seed, "n_data": IMAGES, "settings": "s", "n_products": 4}
            for layer, quantity, value, samples in quantities(key, level * (1 + 1 / (1 + epoch)), dice):
                about |= {"layer": layer, "quantity": quantity, "samples": samples, "ci95": half * value}
                rows.append(row(f"{method}-{bits}-s{seed}".lower(), method, bits, epoch, value, **about))
    return pd.DataFrame(rows)


DRAWN = [key for key in FIGURES if key not in ("landscape", "surface")]


def drawn(figure):
    """The figure, laid out, and what draws it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def texts(figure, renderer):
    """Every text that is drawn, with its box."""
    unseen = set()  # matplotlib keeps labels of ticks beyond the ends of an axis
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        seen = {id(tick.label1) for tick in axis._update_ticks()}
        labels = [tick.label1 for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())]
        unseen |= {id(label) for label in labels} - seen
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text, text.get_window_extent(renderer)) for text in found if id(text) not in unseen]


def assert_fits(figure):
    """Nothing is clipped and nothing overlaps."""
    boxes = texts(figure, drawn(figure))
    for text, box in boxes:
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= figure.bbox.x1 + 1, text
        assert box.y1 <= figure.bbox.y1 + 1, text
    for (one, a), (two, b) in itertools.combinations(boxes, 2):
        apart = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1
        assert apart, (one.get_text(), two.get_text())


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("key", DRAWN)
def test_nothing_is_clipped_and_nothing_overlaps(key, columns):
    with look(columns, {"digits": "CIFAR-10 (JPEG)"}):
        figure = FIGURES[key].draw(measured(key, KINDS if key in ("1", "5") else FEW))
    assert figure.get_figwidth() == WIDTHS[columns]
    assert_fits(figure)


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("key", ["1", "4", "5", "eigenvalues"])
def test_long_names_of_runs_fit(key, columns):
    names = [f"a network of mine that has a long name_{i}" for i in range(6)]
    frame = pd.concat([measured(key, [("lsq", "W4A4")], seeds=1).assign(run=n, train_seed=None) for n in names])
    with look(columns):
        assert_fits(FIGURES[key].draw(frame))


def test_legends_of_densities_stand_above_the_curves():
    with look(1):
        figure = FIGURES["density"].draw(measured("density", FEW))
    renderer = drawn(figure)
    for axes in figure.axes:
        legend = axes.get_legend()
        highest = max(line.get_ydata().max(initial=0) for line in axes.lines)
        assert axes.transData.transform((0, highest))[1] <= legend.get_window_extent(renderer).y0
        assert [line.get_linestyle() for line in legend.legend_handles] == ["--", "-"]  # in grey, too


def test_an_axis_without_epoch_0_says_nothing_of_it():
    rows = measured("5", FEW).assign(test_accuracy=0.9, variant=lambda frame: frame["method"])
    for first, label in ((0, "Epoch (0: before training)"), (1, "Epoch")):
        (axes,) = training_figure(rows[rows["epoch"] >= first]).axes
        assert axes.get_xlabel() == label


@pytest.mark.parametrize("key", DRAWN)
def test_panels_have_letters_and_data_sets_names(key):
    frame = measured(key, [("fp", "FP"), ("lsq", "W4A4"), ("fpq", "W4A4")])
    with look(labels={"digits": "CIFAR-10 (JPEG)", "fpq": "Ours"}):
        figure, caption = FIGURES[key].draw(frame), FIGURES[key].caption(frame)
    letters = [axes.get_title(loc="left").strip() for axes in figure.axes]
    assert letters == ([""] if len(letters) == 1 else list("abcdefghi")[: len(letters)])
    assert "CIFAR-10 (JPEG)" in caption
    assert "ResNet-20" in caption
    words = " ".join(text.get_text() for text in figure.findobj(Text))
    assert "digits" not in words
    assert key == "2" or "FPQ" not in words.replace("FPQ's", "")
    assert "imagefolder" not in FIGURES[key].caption(frame.assign(dataset="imagefolder"))


@pytest.mark.parametrize("key", ["1", "5", "drift", "drift_layers", "oscillation"])
def test_legends_have_the_one_order_and_each_method_its_look(key):
    figure = FIGURES[key].draw(measured(key))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    kinds = [name.partition(" ")[::2] for name in names if name.partition(" ")[0].strip(",") in ORDER]
    if key in ("1", "5"):
        assert names[0].startswith("FP")
    for width in ("W4A4", "W2A4"):
        assert [method for method, bits in kinds if bits == width] == ORDER[1:]
    for method, look_ in ((name, METHODS[name.lower()]) for name in ORDER[1:]):
        lines = [line for axes in figure.axes for line in axes.lines if str(line.get_label()).startswith(f"{method} ")]
        assert {to_hex(line.get_color()) for line in lines} == {look_.colour.lower()}
        assert {line.get_marker() for line in lines} == {look_.marker}
        assert len({line.get_linestyle() for line in lines}) == 2


@pytest.mark.parametrize("key", ["eigenvalues", "density", "noise"])
def test_panels_have_the_one_order(key):
    titles = [axes.get_title() for axes in FIGURES[key].draw(measured(key)).axes]
    wanted = [f"{name} {bits}" for name in ORDER[1:] for bits in ("W4A4", "W2A4")]
    assert titles == (["FP", *wanted] if key == "density" else wanted)


def test_looks_differ_by_more_than_colour():
    runs = list(families(measured("5", [*KINDS, ("theirs", "W4A4"), ("ours", "W4A4")], seeds=1)))
    looks = [Looks(runs).line(run.iloc[0]) for run in runs]
    assert len({(one["marker"], one["linestyle"], one["markerfacecolor"] == "white") for one in looks}) == len(looks)


@pytest.mark.parametrize("bits", ["FP", "W2A4"])
@pytest.mark.parametrize("key", ["1", "4", "5"])
def test_runs_of_one_method_that_are_no_seeds_are_told_apart(key, bits):
    kinds = [("fp" if bits == "FP" else "lsq", bits)]
    own = [
        measured(key, kinds, seeds=1).assign(run=name, train_seed=None, value=lambda rows, by=i + 1: rows["value"] * by)
        for i, name in enumerate(("adam", "sgd", "sgd_s1"))
    ]
    figure = FIGURES[key].draw(pd.concat(own[::-1]))
    drawn(figure)
    artists = [artist for legend in figure.legends for artist in legend.legend_handles]
    told = [artist for artist in artists if "(" in artist.get_label()]
    assert [artist.get_label().split("(")[1] for artist in told] == ["adam)", "sgd)", "sgd_s1)"]
    assert len({artist.get_color() for artist in told}) == 3
    assert len({(artist.get_marker(), artist.get_linestyle()) for artist in told}) == 3  # in grey, too
    if key == "1":
        bars = [patch for patch in figure.axes[0].patches if patch.get_height() > 0]
        assert len({bar.get_facecolor() for bar in bars}) == len(bars) == 3
        assert len({label.get_text() for label in figure.axes[0].get_xticklabels()}) == 3


def test_the_caption_of_figure_3_speaks_of_shifts_where_there_are_some():
    both, alone = (FIGURES["3"].caption(measured("3", kinds, seeds=1)) for kinds in (FEW, FEW[:1]))
    for words in ("the same for both", "that of a shift"):
        assert words in both
        assert words not in alone


def test_spare_looks_are_taken_in_the_order_of_runs():
    runs = [row(run, "theirs", "W4A4", train_seed=None) for run in ("a", "b", "c") for _ in range(2)]
    looks = Looks(families(pd.DataFrame(runs)))
    assert [looks.colour({"run": run}) for run in "abc"] == list(SPARE_COLOURS[:3])
    assert [looks.dash({"run": run}) for run in "abc"] == ["-", "--", "-."]


def test_float_runs_beside_quantized_ones_are_told_apart_without_colour():
    kinds = [("fp", "FP"), ("lsq", "W4A4")]
    own = [measured("5", kinds, seeds=1).assign(run=lambda rows, n=n: n + rows["run"]) for n in ("adam-", "sgd-")]
    (axes,) = figure5(pd.concat(own)).axes
    levels = [line for line in axes.lines if str(line.get_label()).startswith("FP (")]
    assert [line.get_linestyle() for line in levels] == ["-", "--"]


@pytest.mark.parametrize(("n", "beside"), [(1, 1), (3, 3), (4, 2), (5, 3), (7, 3)])
def test_rows_of_panels_are_even(n, beside):
    _, places = panels(n, 2.0)
    assert {axes.get_subplotspec().get_gridspec().ncols for axes in places} == {beside}


def test_a_run_that_was_measured_on_other_data_too_has_one_look():
    rows = measured("5", [("lsq", "W4A4")], seeds=2)
    first = rows[rows["run"] == rows["run"].iloc[0]]
    looks = Looks(families(pd.concat([first.assign(data="other"), rows])))
    assert len({looks.colour(row) for _, row in rows.iterrows()}) == 1


@pytest.mark.parametrize("key", ["1", "2", "5", "drift", "oscillation", "eigenvalues", "noise"])
@pytest.mark.parametrize(("half", "spread"), [(2.0, 1.0), (50.0, 40.0)])
def test_bands_and_bars_end_on_the_axis(key, half, spread):
    frame = measured(key, FEW, seeds=1, half=half)
    frame.loc[frame["method"] == "lsq", "value"] *= spread  # a logarithmic axis, where there is one
    for axes in FIGURES[key].draw(frame).axes:
        low, high = axes.get_ylim()
        lines = [line.get_ydata() for line in axes.lines if line.get_transform() == axes.transData]
        paths = [c.get_paths() for c in axes.collections if c.get_transform() == axes.transData]
        parts = [*lines, *(path.vertices[:, 1] for each in paths for path in each if len(path.vertices))]
        ends = [end for y in parts for end in (np.nanmin(y), np.nanmax(y))]
        assert low - 1e-9 * (high - low) <= min(ends)
        assert max(ends) <= high + 1e-9 * (high - low)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("key", ["1", "5", "oscillation"])
def test_nothing_but_zeros_has_an_axis(key):
    FIGURES[key].draw(measured(key, FEW, seeds=1).assign(value=0.0, ci95=0.0))


def test_a_single_point_keeps_its_bar():
    """It lost its end at the upper edge of the panel."""
    figure = figure5(pd.DataFrame([row(value=10.0, ci95=9.0)]))
    (axes,) = figure.axes
    ((segment,),) = (bar.get_segments() for group in axes.containers for bar in group.lines[2])
    low, high = axes.get_ylim()
    assert segment[:, 1] == pytest.approx([1.0, 19.0])
    assert low < 1
    assert high > 19


def test_one_y_axis_in_figure_2_and_two_curves():
    figure = figure2(measured("2", [("lsq", "W2A4"), ("lsq", "W4A4")]))
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    colours = {to_hex(line.get_color()) for axes in figure.axes for line in axes.lines if line.get_label() != "_"}
    assert {METHODS["noise-features"].colour.lower(), METHODS["noise-weights"].colour.lower()} < colours


def test_many_lines_are_parted_by_bits_on_one_axis():
    one, two = figure5(measured("5")).axes
    assert (one.get_title(), two.get_title()) == ("ResNet-20, digits, W4A4", "ResNet-20, digits, W2A4")
    assert one.get_ylim() == two.get_ylim()


class TestSeeds:
    """Runs that differ by their training seed alone."""

    def test_the_line_is_the_mean_and_the_band_its_interval(self):
        frame = measured("5", [("lsq", "W4A4")])
        (axes,) = figure5(frame).axes
        line = next(line for line in axes.lines if line.get_label() == "LSQ W4A4")
        np.testing.assert_allclose(line.get_ydata(), frame.groupby("epoch")["value"].mean())
        thin = [line for line in axes.lines if line.get_label() == "_"]
        for run, each in zip(frame["run"].unique(), thin, strict=True):
            np.testing.assert_allclose(each.get_ydata(), frame.loc[frame["run"] == run, "value"])
        last = frame[frame["epoch"] == 5]
        both = crossed(np.stack(last["samples"]))
        at = curve(frame)
        assert (at.value[-1], at.half[-1]) == pytest.approx((last["value"].mean(), both.ci95))
        assert "mean over 3 training seeds" in interval_words(frame)
        assert "over seeds and the samples" in interval_words(frame)

    def test_below_three_seeds_the_interval_is_over_samples_alone(self):
        frame = measured("5", [("lsq", "W4A4")], seeds=2)
        both = crossed(np.stack(frame.loc[frame["epoch"] == 1, "samples"]))
        assert curve(frame).half[1] == pytest.approx(both.ci95_images)
        assert "over the samples alone, as one over seeds takes 3 or more" in interval_words(frame)
        one = frame[frame["train_seed"] == 0]
        np.testing.assert_allclose(curve(one).half, one["ci95"])
        assert "not over training runs" in interval_words(one)

    def test_without_single_samples_it_is_students(self):
        frame = measured("2", [("lsq", "W4A4")])
        arm = frame[frame["quantity"].str.endswith("weights")]
        assert curve(arm).half[0] == pytest.approx(over_seeds(list(arm.loc[arm["epoch"] == 0, "value"]))[1])
        two = arm[arm["train_seed"] < 2]
        assert curve(two).half[0] == pytest.approx(two.loc[two["epoch"] == 0, "ci95"].mean())

    def test_a_seed_that_occurs_twice_tells_runs_apart(self):
        runs = {"p0.1-s0": 0, "p0.1-s1": 1, "p0.3-s0": 0, "p0.3-s1": 1, "other": 0}
        frame = pd.DataFrame([row(run, "fpq", train_seed=seed) for run, seed in runs.items()])
        found = [sorted(one["run"]) for one in families(frame)]
        assert sorted(found) == [["other"], ["p0.1-s0", "p0.1-s1"], ["p0.3-s0", "p0.3-s1"]]
        labels = [text.get_text() for text in figure5(frame).legends[0].get_texts()]
        assert sorted(labels) == ["FPQ W4A4 (other)", "FPQ W4A4 (p0.1-s0)", "FPQ W4A4 (p0.3-s0)"]

    def test_epochs_that_not_all_seeds_have_are_left_to_the_thin_lines(self):
        frame = measured("5", [("lsq", "W4A4")])
        fewer = frame[(frame["train_seed"] > 0) | (frame["epoch"] < 5)]
        assert curve(fewer).x.tolist() == [0, 1]
        apart = frame[frame["epoch"] == frame["train_seed"].map({0: 0, 1: 1, 2: 5})]
        assert curve(apart).x.tolist() == [0, 1, 5]  # no epoch is common to all


def test_bars_of_figure_1_are_the_means_over_seeds():
    frame = measured("1")
    bars = figure1(frame).axes[0].patches
    last = ordered(frame[(frame["epoch"] == 5) & (frame["quantity"] == "logit_variance@0.1")])
    means = last.groupby(["method", "bits"], sort=False)["value"].mean()
    np.testing.assert_allclose([bar.get_height() for bar in bars], means)


def test_bits_are_ordered():
    widths = ["W2A2", "W8A8", "FP", "W4A8", "W2A4", "W4A4"]
    assert sorted(widths, key=bits_rank) == ["FP", "W8A8", "W4A8", "W4A4", "W2A4", "W2A2"]


def test_other_widths_are_refused():
    with pytest.raises(UserError, match="1 or 2 columns wide, not 3"), look(3):
        pass


def test_an_empty_table_is_ordered():
    assert ordered(pd.DataFrame(columns=list(records.COLUMNS))).empty

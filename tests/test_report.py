"""The page: well-formed, self-contained, harmless, and its numbers those of the records."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy import stats

import fpq_analysis
from fpq_analysis import UserError, measure, records, write_report
from fpq_analysis.errors import NothingToDraw
from fpq_analysis.files import append_jsonl, read_jsonl, write_json
from fpq_analysis.intervals import half_interval, over_seeds
from fpq_analysis.measures import MEASURES
from fpq_analysis.plots import FIGURES, Drawing, loss_caption, loss_figure, training_caption, training_figure
from fpq_analysis.plots.style import COLUMNS, WIDTHS, look, rendered
from fpq_analysis.probes import PROBES, HessianDensity, HessianEigs, HessianTrace
from fpq_analysis.records.queries import totals
from fpq_analysis.report import citations, findings, live, pictures
from fpq_analysis.report.cells import Cell, Table, digits_beside, shown
from fpq_analysis.report.headings import NOT_RESULTS, heading
from fpq_analysis.report.missing import not_measured
from fpq_analysis.report.page import typeset
from fpq_analysis.report.study import read_study, seeds_in_words
from fpq_analysis.report.tables import number_tables
from fpq_analysis.runs import Run
from tests.nets import DIGITS
from tests.test_cli import call
from tests.words import words

VOID = {"meta", "link", "img", "br", "hr", "input"}
N = 32
NOISY = ("logit_variance", "flipped")


class Page(HTMLParser):
    """A strict reader: every tag closed in order; tables as rows of (text, value), by the table's name."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.attributes, self.links = [], [], [], []
        self.tables, self.region, self.text = {}, None, {}
        self.around, self.scrolls = [], []  # classes of what is open; of tables and figures, whether they can scroll
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.attributes.append((tag, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "a":
            self.links.append(attributes["href"])
        if attributes.get("role") == "region":
            self.region = attributes["aria-label"]
        if tag == "tr":
            self.tables.setdefault(self.region, []).append([])
        if tag in ("th", "td"):
            self.tables[self.region][-1].append(["", None])
        if tag == "data":
            self.tables[self.region][-1][-1][1] = float(attributes["value"])
        if tag in ("table", "svg") and attributes.get("class") != "interval":
            self.scrolls.append(any(classes & {"scroll", "card"} for classes in self.around))
        if tag not in VOID:
            self.open.append(tag)
            self.around.append(set((attributes.get("class") or "").split()))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.around.pop()

    def handle_data(self, data):
        if any(tag in ("th", "td") for tag in self.open):
            self.tables[self.region][-1][-1][0] += data
        for tag in set(self.open):
            self.text[tag] = self.text.get(tag, "") + data

    def column(self, table, name):
        """First cell of a row to that row's value in the column (its text, for words)."""
        head, *rows = self.tables[table]
        at = [text for text, _ in head].index(name)
        return {row[0][0]: row[at][0] if row[at][1] is None else row[at][1] for row in rows}


@pytest.fixture(scope="module")
def measured(tiny_runs, tmp_path_factory):
    root = tmp_path_factory.mktemp("measured") / "runs"
    shutil.copytree(tiny_runs, root)
    for probe in (HessianTrace(), HessianTrace("latent"), HessianEigs(k=2), HessianDensity(n_draws=2, n_steps=8)):
        measure(root, probe, n_data=N, device="cpu", model="tests.nets:tiny")
    return root


@pytest.fixture(scope="module")
def written(measured):
    """The report, and its page as text."""
    report = write_report(measured, measured.parent / "page.html")
    return report, report.path.read_text()


@pytest.fixture
def runs(measured, tmp_path):
    shutil.copytree(measured, tmp_path / "runs")
    return tmp_path / "runs"


def page(root, tmp_path):
    write_report(root, tmp_path / "page.html")
    return (tmp_path / "page.html").read_text()


def test_well_formed_self_contained_and_accessible(written):
    _, text = written
    found = Page(text)
    assert len(found.ids) == len(set(found.ids))
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert [link for link in found.links if not link.startswith("#")] == ["https://arxiv.org/abs/2503.11159"]
    tags = [tag for tag, _ in found.attributes]
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(tags)
    assert not re.search(r'url\((?!#|"data:)|@import', text)
    for tag, attributes in found.attributes:
        for name in ("src", "href", "xlink:href", "srcset", "data"):
            if tag != "a" and name in attributes:
                assert attributes[name].startswith(("#", "data:")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert all(tags.count(tag) == 1 for tag in ("header", "nav", "main", "footer", "h1", "title"))
    for tag, attributes in found.attributes:
        assert tag != "img" or attributes["alt"]
        assert attributes.get("role") != "img" or attributes["aria-label"]
    references = re.findall(r'url\(#([^)"]+)\)|href="#([^"]+)"', text)
    assert {a or b for a, b in references} <= set(found.ids)  # of the SVGs too, whose ids were renamed


def test_every_figure_is_there_once(measured, written):
    report, text = written
    found = Page(text)
    drawn = [drawing for drawing in FIGURES.values() if drawing.probe in read_study(measured).probes]
    assert report.figures == [drawing.title for drawing in drawn]
    for drawing in drawn:
        assert found.ids.count(f"figure-{drawing.picture.file}") == 1
        frame = records.load(measured, drawing.probe)
        frame = frame[frame["definition"] == "dequantized"]
        assert typeset(drawing.caption(frame)) in found.text["figcaption"]
    assert sum(tag == "figure" for tag, _ in found.attributes) == len(drawn) + 2  # and training's: accuracy, losses
    missing = {name for names, _ in report.missing for name in names.split(", ")}
    assert missing >= {d.title for d in FIGURES.values() if d not in drawn} | {"Sharpness"}


def test_numbers_are_those_of_the_files(measured, written):
    found = Page(written[1])
    traces = totals(records.load(measured, "hessian_trace"))
    traces = traces[(traces["definition"] == "dequantized") & (traces["epoch"] == 2)].set_index("run")
    for run in ("fp", "lsq-w4a4", "fpq-w4a4"):
        rows = read_jsonl(measured / run / "train.jsonl")
        assert found.column("Runs", "Trace")[run] == traces.loc[run, "value"]
        assert found.column("Runs", "± 95 %")[run] == traces.loc[run, "ci95"]
        assert found.column("Runs", "Accuracy")[run] == rows[-1]["test_accuracy"]
        assert found.column("Runs", "Best")[run] == max(row["test_accuracy"] for row in rows)
        digest = json.loads((measured / run / "manifest.json").read_text())["epoch_0002.pt"]["sha256"]
        assert found.column("Runs", "Checkpoint")[run] == digest[:12]
        assert found.column("Checkpoints", "SHA-256 of the last checkpoint")[run] == digest
    assert found.column("Runs", "Clipped")["fp"] == "–"
    accuracies = found.column("Test accuracy", "W4A4")
    assert accuracies["LSQ"] == found.column("Runs", "Accuracy")["lsq-w4a4"]
    gap = np.subtract(traces.loc["fpq-w4a4", "samples"], traces.loc["lsq-w4a4", "samples"])
    head, *rows = found.tables["Against LSQ"]
    columns = [text for text, _ in head]
    row = next(r for r in rows if r[columns.index("Definition")][0] == "dequantized")
    assert row[columns.index("Difference")][1] == pytest.approx(gap.mean())
    assert row[columns.index("± 95 %")][1] == pytest.approx(half_interval(gap.std(ddof=1) / N**0.5, N - 1))
    gap = np.subtract(traces.loc["fpq-w4a4", "samples"], traces.loc["fp", "samples"])
    assert found.column("Against the float network", "Difference")["fpq-w4a4"] == pytest.approx(gap.mean())
    eigs = records.load(measured, "hessian_eigs")
    eigs = eigs[(eigs["epoch"] == 2) & (eigs["quantity"] == "eigenvalue_1")].set_index("run")["value"]
    assert found.column("Eigenvalues", "Eigenvalue 1") == pytest.approx(eigs.to_dict())


def test_order(written):
    """Figure 5 and what was found first; runs float first, then by the catalogue of methods."""
    found = Page(written[1])
    ids = [name for name in found.ids if not name.startswith(("figure1", "figure5-", "training-", "losses-"))]
    places = ["figure-figure5", "findings", "runs", "comparisons", "training", "figure-training", "figure-losses"]
    places += ["figures", "numbers", "missing", "definitions", "methods", "settings", "provenance", "citing"]
    assert [name for name in ids if name in places] == places
    links = [link[1:] for link in found.links if link[1:] in places and link != "#main"]
    assert links == [name for name in places if name in links]
    assert list(found.column("Runs", "Trace")) == ["fp", "lsq-w4a4", "fpq-w4a4"]
    assert [row[0][0] for row in found.tables["Test accuracy"][1:]] == ["FP", "LSQ", "FPQ"]


def test_tables_say_equal_numbers_once_and_have_headings_in_words(written):
    found = Page(written[1])
    for name, (head, *rows) in found.tables.items():
        for column, (text, _) in enumerate(head):
            assert text, name
            assert "@" not in text, name
            assert "_" not in text or name == "Settings that differ", name
            if column and len(rows) > 1 and text != "Drawn":  # a picture has no text
                assert len({str(row[column]) for row in rows}) > 1, (name, text)
    assert "The same in all rows: Network: tests.nets:tiny; Seed: 0; Epochs: 2." in found.text["p"]


def test_equal_columns_are_told():
    def row(*texts):
        return [Cell(text) for text in texts]

    table = Table("t", ["Run", "A", "B"], [row("a", "x", "1"), row("b", "x", "2")], ["More."])
    assert table.told.heads == ["Run", "B"]
    assert table.told.notes == ["The same in all rows: A: x.", "More."]
    assert [[cell.text for cell in cells] for cells in table.told.rows] == [["a", "1"], ["b", "2"]]
    dashes = Table("t", ["Run", "A", "B"], [row("a", "–", "1"), row("b", "–", "2")])
    assert dashes.told.notes == ["Of no row known: A."]
    one = Table("t", ["Run", "A"], [row("a", "x")])
    assert one.told is one  # of one row nothing can be told


def test_quantities_are_in_words_and_settings_no_results():
    assert heading("drift", "mean_shift") == "Mean shift"
    assert heading("dead_channels", "some_thing") == "Some thing"
    assert heading("gradnorm", "grad_norm_minibatch") == "Of minibatches, mean"
    for name in ("nodes_1", "eps", "channels", "size", "odd_1", "real_0.125", "ratio_linear_2", "predicted_1e-05"):
        assert re.fullmatch(NOT_RESULTS, name), name
    for name in (
        "real_1",
        "ratio_linear_1",
        "holds_real",
        "within_10_real",
        "eigenvalue_1",
        "trace",
        "interaction_real",
    ):
        assert not re.fullmatch(NOT_RESULTS, name), name


def test_what_was_measured_at_several_places_is_a_row_each(runs):
    about = read_jsonl(runs / "fp" / "records" / "hessian_trace.jsonl")[-1]
    about |= {"probe": "output_variance", "definition": None, "samples": None, "ci95": 0.01, "n_data": 8}
    for run, value in (("fp", 0.25), ("lsq-w4a4", 0.5)):
        rows = [{**about, "quantity": f"{q}@{sd}", "value": value * sd} for sd in (0.5, 0.05, 0.1) for q in NOISY]
        records.append(runs / run, "output_variance", rows)
    table = next(one.told for one in number_tables(read_study(runs)) if one.name == "Output variance")
    assert table.heads == ["Run", "Noise sd", "Of the logits", "Flipped (%)"]
    assert [(run.text, at.text) for run, at, *_ in table.rows[:3]] == [("fp", "0.05"), ("fp", "0.1"), ("fp", "0.5")]
    _, _, logits, flipped = table.rows[2]
    assert (logits.text, logits.value) == ("0.125 ± 0.01", 0.125)
    assert (flipped.text, flipped.value) == ("12.5 ± 1", 0.125)  # the share in per cent, the number as it is


def test_what_scrolls_says_so_and_no_two_captions_are_equal(measured, written):
    report, text = written
    found = Page(text)
    assert found.scrolls
    assert all(found.scrolls)
    (rule,) = re.findall(r"\.scroll, \.card \{(.*?)\}", text, re.DOTALL)[:1]
    assert "overflow-x: auto" in rule
    assert "no-repeat local" in rule  # the cover that hides the cue at the end
    assert "var(--cue)" in rule
    assert "%E2%86%92 scroll" in text or "→ scroll" in text
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.DOTALL)
    assert len(captions) == len(set(captions)) == len(report.figures) + 2


def test_contrast():
    """Text on every ground that it stands on, in both schemes: 4.5 to 1 or more (WCAG 2.2, 1.4.3)."""

    def luminance(colour):
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    css = (Path(fpq_analysis.__file__).parent / "report" / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)[:2]
    )
    for colours in (light, light | dark):
        for text in ("ink", "soft", "link"):
            for ground in ("paper", "box", "warn", "tint"):
                low, high = sorted(luminance(colours[name]) for name in (text, ground))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_a_caption_that_was_there_is_not_repeated(measured, monkeypatch):
    monkeypatch.setattr(Drawing, "caption", lambda self, frame: "Equal.")
    drawn, _ = pictures.pictures(read_study(measured))
    assert [one.caption for one in drawn[:2]] == ["Equal.", f"The same as '{drawn[0].title}', drawn otherwise."]


def test_figures_are_as_narrow_as_their_height_allows():
    def widths(*heights):
        return pictures.fitting(lambda: Figure(figsize=(WIDTHS[COLUMNS.get()], heights[COLUMNS.get() - 1])))

    assert widths(3.0, 2.0).get_size_inches()[0] == WIDTHS[1]
    assert widths(7.0, 3.0).get_size_inches()[0] == WIDTHS[2]


def test_narrow_figures_stand_in_pairs():
    def of_width(*widths):
        drawn = [pictures.Picture("a", "t", "t", "c", "alt", width, "") for width in widths]
        return [one.beside for one in pictures.side_by_side(drawn)]

    assert of_width(300, 300, 300) == [True, True, False]
    assert of_width(300, 600, 300, 400, 500) == [False, False, True, True, False]
    assert of_width() == []
    places = [pictures.Picture("a", "t", "t", "c", "alt", width, "").place for width in (500, 900)]
    assert places == ["alone", "wide"]


def test_methods_say_what_was_done(written):
    text = Page(written[1]).text["p"].replace("\u00a0", " ")
    for fact in (
        "1,442 training and 355 test images",
        "for 2 epochs by stochastic gradient descent (momentum 0.9, weight decay 0.0005, batches of 32)",
        "learning rate of 0.02",
        "with probability 0.1",
        "the dequantized weights",
        "latent weights",
        f"{N} training images (drawn once by seed 0",
        "computed exactly",
        "The 2 largest eigenvalues",
        "2 random vectors of 8 steps",
        "Training seed: 0.",
        fpq_analysis.__version__,
    ):
        assert fact in text, fact
    assert "nan" not in text.lower().split()


def test_the_loss_is_the_one_measured(runs, tmp_path):
    for path in runs.rglob("records/*.jsonl"):
        path.write_text(path.read_text().replace('"loss": "cross_entropy"', '"loss": "squared_error"'))
    text = page(runs, tmp_path)
    assert text.count("mean squared error") >= 7  # definitions, three paragraphs of the methods, three captions
    assert "mean cross-entropy" not in text


def test_names_from_files_are_text(runs, tmp_path):
    evil = "<script>alert(1)<b> & 'x\""
    (runs / "lsq-w4a4").rename(runs / evil)
    about = json.loads((runs / "fp" / "run.json").read_text())
    about["versions"]["<img src=x onerror=alert(1)>"] = "<script>"
    about["data"]["name"] = "</title><script>alert(2)</script>"
    about["config"]["model"] = "<svg onload=alert(3)>"
    write_json(runs / "fp" / "run.json", about)
    found = Page(page(runs, tmp_path))  # its tags nest as the template's do
    assert not any(tag == "script" for tag, _ in found.attributes)
    assert not any(name.startswith("on") for _, attributes in found.attributes for name in attributes)
    assert evil in found.column("Runs", "Trace")
    assert evil in found.text["li"]
    assert about["data"]["name"] in found.text["h1"]


def test_no_torch_is_loaded_and_equal_files_give_an_equal_page(measured, written, tmp_path):
    code = (
        "import sys; from fpq_analysis import write_report; "
        f"write_report({str(measured)!r}, {str(tmp_path / 'page.html')!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert (tmp_path / "page.html").read_text() == written[1]


def test_nothing_measured_is_said_with_the_command(tiny_runs, tmp_path):
    shutil.copytree(tiny_runs, tmp_path / "my runs")
    result = call("report", "--ckpt-dir", "my runs", "-o", "page.html")
    assert "Not measured: Figure 5" in words(result.stderr)
    assert "  fpq-analyze hessian --ckpt-dir 'my runs'" in result.stderr.splitlines()
    assert "page.html: 3 runs; no figure of measurements" in words(result.stdout)
    found = Page((tmp_path / "page.html").read_text())
    assert "Trace" not in [text for text, _ in found.tables["Runs"][0]]
    assert "figure-training" in found.ids
    assert "comparisons" not in found.ids
    assert "fpq-analyze hessian --top-k 5 --ckpt-dir 'my runs'" in found.text["code"]
    *commands, last = found.text["pre"].partition("@")[0].split("; \\\n")
    assert commands[3] == "fpq-analyze hessian --top-k 5 --density --sharpness --ckpt-dir 'my runs'"  # one, of four
    assert len({command.split()[1] for command in commands}) == len(commands)
    assert last == "fpq-analyze report --ckpt-dir 'my runs'"


def test_what_float_networks_have_not_is_not_missing(measured):
    names = {name for name, _ in not_measured(read_study(measured / "fp"), dict.fromkeys(FIGURES.values(), "")).names}
    assert {"Landscape", "Figure 5", "Sharpness"} <= names
    assert not names & {"Drift", "Drift by layer", "Noise", "Oscillation"}
    needs = {name: set(PROBES[name].needs) & {"quantizers"} for name in PROBES}
    assert all(MEASURES[name].quantized == bool(needs[name]) for name in PROBES)


def test_what_holds_nothing_to_draw_is_not_measured_again(runs):
    about = read_jsonl(runs / "fp" / "records" / "hessian_trace.jsonl")[-1]
    records.append(runs / "fp", "gradnorm", [{**about, "probe": "gradnorm", "quantity": "grad_norm@clean"}])
    study = read_study(runs / "fp")
    missing = not_measured(study, pictures.pictures(study)[1])
    ((name, why, command),) = missing.undrawn
    assert (name, command) == ("Figure 2", "fpq-analyze gradnorm")
    assert "no finite grad_norm_minibatch" in why
    assert "Figure 2" not in dict(missing.names)
    assert "gradnorm" not in missing.together


def test_foreign_runs_are_measured_with_what_says_how_to_read_them(runs):
    (runs / "lsq-w4a4" / "run.json").unlink()
    drift = {FIGURES["drift"]: ""}
    missing = dict(not_measured(read_study(runs), drift).names)
    assert missing["Drift"].endswith(f"--ckpt-dir {runs} --model tests.nets:tiny --data digits")
    missing = dict(not_measured(read_study(runs / "fp", runs / "lsq-w4a4"), drift).names)
    assert f"--ckpt-dir {runs / 'fp'} --records {runs / 'lsq-w4a4'} --model" in missing["Drift"]


def test_runs_of_ones_own_are_told_apart_and_compared(runs, tmp_path):
    about = read_jsonl(runs / "fp" / "records" / "hessian_trace.jsonl")[-1]
    about |= {"train_seed": None, "model": "mine:Net", "dataset": "mine:pixels", "sem_data": 1.0}
    for name, value in (("adam", 10.0), ("sgd", 14.0)):
        samples = [value + i for i in range(about["n_data"])]
        records.append(tmp_path / "own" / name, "hessian_trace", [{**about, "value": value, "samples": samples}])
    text = page(tmp_path / "own", tmp_path)
    assert "Among each other" in text
    assert "The trace of sgd is 4" in text
    colours = [re.search(r'background:(#\w+)"></span>' + name, text)[1] for name in ("adam", "sgd")]
    assert colours[0] != colours[1]
    assert "--model mine:Net --data mine:pixels" in text
    assert "package.module:factory" not in text
    assert "<dt>Clipped</dt>" not in text
    assert "beside an accuracy" not in text
    assert "How the networks were trained is not on record." in text
    assert "None" not in text
    assert "gradient descent" not in text


def test_weights_that_other_code_rounds_are_called_latent(runs, tmp_path):
    about = read_jsonl(runs / "fp" / "records" / "hessian_trace.jsonl")[-1]
    about |= {"train_seed": None, "model": "mine:Net", "definition": "latent", "method": "quantized"}
    records.append(tmp_path / "own" / "adam", "hessian_trace", [about])
    text = page(tmp_path / "own", tmp_path)
    assert "the latent weights behind the quantizers" in text
    missing = dict(not_measured(read_study(tmp_path / "own"), {FIGURES["landscape"]: "", FIGURES["density"]: ""}).names)
    assert missing["Landscape"].endswith("--data digits --weights requantized")
    assert missing["Density"].endswith("--data digits --definition latent")
    assert "Sharpness" not in missing
    assert Page(text).column("Runs", "Bits") == {"adam": "–"}
    assert "all weights" not in text


def test_many_runs_are_summed_up(tmp_path):
    for seed in range(12):
        config = {"method": "fp", "model": f"net{seed % 6}", "bits": None, "seed": seed, "epochs": 1, "lr": 0.1 * 3}
        (tmp_path / f"run{seed}").mkdir()
        config |= {"data": "digits", "data_root": None, "image_size": None, "init": None}
        write_json(tmp_path / f"run{seed}" / "run.json", {"config": config, "data": DIGITS})
    study = read_study(tmp_path)
    assert seeds_in_words(study.runs) == "0 to 11"
    assert seeds_in_words(study.runs[:2]) == " and ".join(sorted(str(run.seed) for run in study.runs[:2]))
    assert seeds_in_words([Run(tmp_path, described={"config": {}, "data": {}})]) == "unknown"
    text = page(tmp_path, tmp_path)
    assert "<h1>6 networks on digits: FP</h1>" in text
    assert "0.300000000" not in text


def test_help_has_an_example():
    assert "fpq-analyze report --ckpt-dir" in words(call("report", "--help").output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt-dir", "nowhere"], "No folder 'nowhere'"),
        (["--ckpt-dir", "."], "holds no run"),
        (["--ckpt-dir", ".", "-o", "no/where.html"], "No folder 'no'"),
        (["--ckpt-dir", ".", "-o", "."], "is a folder"),
    ],
)
def test_bad_input(arguments, message, tmp_path):
    assert message in " ".join(call("report", *arguments, code=1).stderr.split())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_old_page(measured, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("no space left on device")

    (tmp_path / "page.html").write_text("old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="no space"):
        write_report(measured / "fp", tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"


def test_cautions(runs, tmp_path):
    """Damage, stopped training, stale records, missing ends, odd numbers and hidden settings are named."""
    (runs / "broken").mkdir()
    (runs / "broken" / "run.json").write_text("{")
    lsq, fpq = runs / "lsq-w4a4", runs / "fpq-w4a4"
    rows = read_jsonl(fpq / "train.jsonl")
    (fpq / "train.jsonl").unlink()
    append_jsonl(fpq / "train.jsonl", rows[:2])
    write_json(lsq / "manifest.json", {"epoch_0002.pt": "0" * 64})
    append_jsonl(lsq / "train.jsonl", [{**rows[-1], "epoch": 3}])
    odd = {
        **read_jsonl(runs / "fp" / "records" / "hessian_trace.jsonl")[-1],
        "settings": "other",
        "key": "other",
        "last": 1,
    }
    append_jsonl(runs / "fp" / "records" / "hessian_trace.jsonl", [odd])
    eigs = read_jsonl(lsq / "records" / "hessian_eigs.jsonl")
    (lsq / "records" / "hessian_eigs.jsonl").unlink()
    append_jsonl(lsq / "records" / "hessian_eigs.jsonl", [{**row, "status": "tolerance not reached"} for row in eigs])
    density = fpq / "records" / "hessian_density.jsonl"
    density.write_text(density.read_text()[:-9])
    notes = "\n".join(write_report(runs, tmp_path / "page.html").cautions)
    for fact in (
        "broken is left out",
        "fpq-w4a4 is not finished: 1 of 2 epochs",
        "lsq-w4a4: the trace was measured up to epoch 2, training went to 3",
        "numbers are marked 'tolerance not reached'",
        "hessian_trace: 3 measurements are of checkpoints that are no longer there",
        "hessian_trace: the records also hold measurements with other settings",
        "records/hessian_density.jsonl': 1 damaged line is left out",
    ):
        assert fact in notes, (fact, notes)
    assert "Test accuracy" in Page((tmp_path / "page.html").read_text()).tables


def test_runs_of_other_programs_need_no_run_json(runs, tmp_path):
    (tmp_path / "other" / "net" / "records").mkdir(parents=True)
    shutil.copy(runs / "lsq-w4a4" / "records" / "hessian_trace.jsonl", tmp_path / "other" / "net" / "records")
    report = write_report(tmp_path / "other", tmp_path / "page.html")
    found = Page((tmp_path / "page.html").read_text())
    assert found.column("Runs", "Bits") == {"net": "W4A4"}
    assert found.column("Runs", "Trace")["net"] > 0
    assert report.cautions == []


def test_probes_the_report_does_not_know(runs, tmp_path):
    """Records of a probe of one's own are listed and named; torn ones are not there."""
    about = read_jsonl(runs / "fp" / "records" / "hessian_trace.jsonl")[-1]
    about |= {
        "probe": "own_measure",
        "definition": None,
        "estimator": None,
        "samples": None,
        "ci95": None,
        "sem_data": None,
        "sem": 0.5,
    }
    rows = [{**about, "layer": "conv", "quantity": f"q_{i}", "value": 1.0} for i in range(30)]
    rows.append({**about, "quantity": "sum", "value": 12345.6})
    records.append(runs / "fp", "own_measure", rows)
    for probe in ("hessian_eigs", "hessian_density"):
        for path in runs.rglob(f"records/{probe}.jsonl"):
            path.write_text(path.read_text().splitlines()[0][:-5])
    report = write_report(runs, tmp_path / "page.html")
    found = Page((tmp_path / "page.html").read_text())
    assert found.tables["Own measure"][1] == [["fp", None], ["2", 2.0], ["12,345.6\u00a0±\u00a00.98", 12345.6]]
    assert "own_measure" in found.column("Records", "Settings")
    assert {"Eigenvalues", "Density"} <= {name for name, _ in report.missing}
    assert "We measured what the probe 'own_measure' is about at 1 checkpoint, on 32" in found.text["p"]


def test_a_single_run_is_named(runs, tmp_path):
    assert Page(page(runs / "fp", tmp_path)).column("Runs", "Method") == {"fp": "FP"}


def test_large_figures_become_pictures(measured, tmp_path, monkeypatch):
    found = Page(page(measured / "fp", tmp_path))
    assert not [tag for tag, _ in found.attributes if tag == "img"]
    n_figures = sum(tag == "figure" for tag, _ in found.attributes)
    monkeypatch.setattr(pictures, "MAX_SVG", 1000)  # less than any
    found = Page(page(measured / "fp", tmp_path))
    images = [attributes for tag, attributes in found.attributes if tag == "img"]
    assert len(images) == n_figures > 0
    assert all(image["src"].startswith("data:image/png;base64,") and "against" in image["alt"] for image in images)


def test_findings_over_seeds(tmp_path):
    """Three seeds of LSQ and FPQ written by hand: mean difference and Student interval over the seeds."""
    traces = {"lsq": (10.0, 12.0, 11.0), "fpq": (7.0, 8.0, 9.0)}
    accuracies = {"lsq": (0.90, 0.91, 0.92), "fpq": (0.94, 0.95, 0.97)}
    for method in traces:
        for seed in range(3):
            run = tmp_path / f"{method}-{seed}"
            run.mkdir()
            config = {"method": method, "model": "resnet18", "bits": "W4A4", "seed": seed, "epochs": 1, "init": "fp"}
            config |= {"data": "cifar10", "data_root": None, "image_size": None}
            write_json(run / "run.json", {"config": config, "data": {**DIGITS, "name": "cifar10"}})
            append_jsonl(run / "train.jsonl", [{"epoch": 1, "test_accuracy": accuracies[method][seed]}])
            value = traces[method][seed]
            about = {"method": method, "model": "resnet18", "dataset": "cifar10", "data": "f", "bits": "W4A4"}
            about |= {
                "train_seed": seed,
                "epoch": 1,
                "checkpoint": run.name,
                "definition": "dequantized",
                "key": run.name,
            }
            about |= {
                "estimator": "exact",
                "n_data": 2,
                "seed": 0,
                "settings": "s",
                "layer": "all",
                "quantity": "trace",
            }
            samples = [value - 1, value + 1]
            records.append(
                run, "hessian_trace", [{**about, "value": value, "ci95": 1.0, "sem_data": 0.5, "samples": samples}]
            )
    study = read_study(tmp_path)
    curvature, accuracy, limits = findings.findings(study)
    half = stats.t.ppf(0.975, 2) * np.std([-3, -4, -2], ddof=1) / 3**0.5
    assert (
        f"over 3 training seeds: the trace is lower by 3 ± {half:.2g} on average (27 % of 11" in curvature.sentences[0]
    )
    assert "test accuracy is higher by 4.33 ±" in accuracy.sentences[0]
    assert "3 seeds" in limits.sentences[0]
    found = Page(page(tmp_path, tmp_path))
    (cell,) = (row[1] for row in found.tables["Test accuracy"] if row[0][0] == "FPQ")
    assert cell == ["95.33\u00a0±\u00a01.53 (3)", pytest.approx(np.mean(accuracies["fpq"]))]


def test_training_figure_is_the_mean_over_seeds():
    rows = pd.DataFrame(
        [
            (f"{method}-{seed}", method.upper(), method, "net", "data", bits, epoch, 0.8 + 0.01 * seed + 0.05 * epoch)
            for method, bits in (("fp", "FP"), ("lsq", "W4A4"), ("fpq", "W4A4"))
            for seed in range(3)
            for epoch in range(3)
        ],
        columns=["run", "variant", "method", "model", "dataset", "bits", "epoch", "test_accuracy"],
    )
    (axes,) = training_figure(rows).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"FP, epoch 2", "LSQ W4A4", "FPQ W4A4", "_"}  # the last: single runs
    np.testing.assert_allclose(lines["LSQ W4A4"].get_ydata(), [81, 86, 91])
    np.testing.assert_allclose(lines["FP, epoch 2"].get_ydata(), 91)
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    half = over_seeds([80, 81, 82])[1]
    assert (band.min(), band.max()) == pytest.approx((81 - half, 91 + half))
    assert "3 training runs" in training_caption(rows)
    assert "Each line is one" in training_caption(rows[rows["run"].str.endswith("0")])
    with pytest.raises(NothingToDraw, match="no test accuracy"):
        training_figure(rows[:0])


def test_loss_figure_draws_the_terms_apart():
    rows = pd.DataFrame(
        [
            (f"{method}-{seed}", method.upper(), method, "net", "data", "W4A4", epoch, term, (seed + 1) / epoch)
            for method, terms in (("lsq", ("loss", "loss_ce")), ("fpq", ("loss", "loss_ce", "loss_csd", "loss_own")))
            for seed in range(2)
            for epoch in (1, 2)
            for term in terms
        ],
        columns=["run", "variant", "method", "model", "dataset", "bits", "epoch", "term", "value"],
    )
    ce, csd, own = loss_figure(rows).axes
    assert [axes.get_title().replace("\n", " ") for axes in (ce, csd, own)] == [
        "Cross-entropy",
        "Distillation of features (CSD)",
        "Own",
    ]
    assert [line.get_label() for line in ce.lines if line.get_label() != "_"] == ["LSQ W4A4", "FPQ W4A4"]
    (line,) = (line for line in csd.lines if line.get_label() != "_")
    np.testing.assert_allclose(line.get_ydata(), [1.5, 0.75])
    assert "drawn apart" in loss_caption(rows)
    whole = rows[rows["term"] == "loss"]
    (axes,) = loss_figure(whole).axes
    assert axes.get_title() == "Loss"
    off = rows.assign(value=rows["value"].where(rows["term"] != "loss_csd", 0.0))  # a term of weight zero
    assert "Distillation of features (CSD)" not in [
        axes.get_title().replace("\n", " ") for axes in loss_figure(off).axes
    ]
    assert "apart" not in loss_caption(whole)
    with pytest.raises(NothingToDraw, match="no training loss"):
        loss_figure(rows[:0])


def test_citation_is_that_of_the_project():
    text = (Path(__file__).parent.parent / "CITATION.cff").read_text()
    for fact in (citations.TITLE, citations.AUTHORS, f"version: {fpq_analysis.__version__}"):
        assert fact in text
    entries = citations.bibtex(["fp", "fpq", "lsq+"])
    for key in ("pang2025stabilizing", "fpq_analysis", "esser2020lsq", "bhalgat2020lsqplus"):
        assert f"{{{key}," in entries
    assert "choi2018pact" not in entries
    assert entries.count("{") == entries.count("}")


def test_small_print():
    pairs = ((17.92, 19), (12345.678, 0.98), (0.0053, 0.0099), (-56.3, 110), (3.0, 0.0))
    texts = [shown(value, digits_beside(value, half)) for value, half in pairs]
    assert texts == ["17.9", "12,345.68", "0.0053", "−56.3", "3"]
    assert typeset("a-1 is -5.66 ± 17, 95 % of x-2") == "a-1 is −5.66\u00a0±\u00a017, 95\u00a0% of x-2"
    with pytest.raises(UserError, match="No folder"):
        read_study("nowhere")


def answer(address):
    with urllib.request.urlopen(address, timeout=60) as response:
        return response.read().decode()


def test_live(runs, tmp_path):
    """Served with what the file has not, made anew when a record is added, and ended by Ctrl-C without a word."""
    command = [sys.executable, "-m", "fpq_analysis", "report", "--ckpt-dir", str(runs / "fp"), "--serve", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        address = re.search(r"http://127\.0\.0\.1:\d+/", process.stderr.readline())[0]
        text = answer(address)
        assert answer(f"{address}version") == "1"
        assert '!== "1") location.reload()' in text
        with pytest.raises(urllib.error.HTTPError, match="404"):
            answer(f"{address}run.json")
        with socket.create_connection(re.search(r"//(.*):(\d+)", address).groups()) as gone:  # before its answer
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            gone.sendall(b"GET / HTTP/1.1\r\n\r\n")
        written = (tmp_path / "report.html").read_text()
        (tmp_path / "report.html").unlink()
        assert answer(address) == text
        assert "script-src" not in written
        assert written.count("<script") == text.count("<script") - 1 == 0
        append_jsonl(runs / "fp" / "train.jsonl", [{"epoch": 7, "test_accuracy": 0.123}])
        for _ in range(60):
            if answer(f"{address}version") == "2":
                break
            time.sleep(0.2)
        assert "12.30" in answer(address)
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        assert process.wait(60) == 0
    assert "report.html is new" in told
    assert "Traceback" not in told
    assert "Stopped" not in told


def test_live_keeps_the_page_that_it_has(tmp_path):
    """A page that cannot be made is a line, once for each change."""
    told = []

    def make():
        if (tmp_path / "train.jsonl").exists():
            raise UserError("no")
        return tmp_path / "page.html"

    (tmp_path / "page.html").write_text("<meta default-src 'none';><body></body>")
    page = live.Live(make, {tmp_path}, told.append)
    (tmp_path / "train.jsonl").write_text("")
    assert page.current() == page.current() == "1"
    assert told == ["The report stays as it was: no"]
    assert page.page().count("location.reload") == 1


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = call("report", "--ckpt-dir", str(tmp_path), "--serve", "--port", str(port), code=1)
    assert f"Port {port} of this machine cannot be had" in words(result.stderr)
    assert "--port 0" in words(result.stderr)


@pytest.mark.filterwarnings("error")  # matplotlib's, of axes without room
@pytest.mark.parametrize("columns", [1, 2])
def test_the_loss_of_many_runs_keeps_room_for_its_lines(columns):
    rows = pd.DataFrame(
        [
            (f"run{i}", f"LSQ (lr {i})", "lsq", "net", "data", "W4A4", epoch, term, 1.0 / epoch)
            for i in range(100)
            for epoch in (1, 2)
            for term in ("loss_ce", "loss_csd")
        ],
        columns=["run", "variant", "method", "model", "dataset", "bits", "epoch", "term", "value"],
    )
    with look(columns=columns):
        figure = loss_figure(rows)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][23:] == ["and 77 more"]
    rendered(figure, "svg")
    box = legend.get_window_extent()
    assert not any(axes.get_window_extent().overlaps(box) for axes in figure.axes)
    assert all(axes.get_window_extent().height > 50 for axes in figure.axes)

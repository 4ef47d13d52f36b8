"""Progress is shown where somebody watches, after a moment, and never changes what is measured."""

from __future__ import annotations

import io
import sys
import threading
import types
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from torch import nn

import fpq_analysis as fpq
from fpq_analysis import progress
from fpq_analysis.curvature.memory import map_batches
from fpq_analysis.progress import Progress, show_progress, tick
from tests.nets import tiny

IMAGES = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 10


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def at_once(monkeypatch):
    """No waiting, and a picture at every step."""
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    monkeypatch.setattr(progress, "INNER_PATIENCE", -1.0)
    monkeypatch.setattr(progress, "REFRESH", -1.0)
    monkeypatch.setattr(progress, "QUIET", -1.0)


@pytest.fixture
def on_terminal(monkeypatch, at_once):
    """Puts a terminal in place of stderr, which pytest itself replaces when a test begins."""

    def begin() -> Terminal:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return begin


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).eval()


FLOAT = tiny().eval()
QUANTIZED = fpq.quantize(FLOAT, fpq.QuantSpec.parse("W4A4")).eval()
fpq.calibrate(QUANTIZED, IMAGES[0], "mse")
CALLS = {
    "hessian_eigs": lambda: fpq.hessian_eigs(mlp(), IMAGES, 2),
    "hessian_density": lambda: fpq.spectral_density(mlp(), IMAGES, n_draws=2, n_steps=4),
    "hessian_trace": lambda: fpq.hessian_trace(mlp(), IMAGES, n_products=10),
    "hessian_trace split": lambda: fpq.hessian_trace(mlp(), IMAGES, method="split"),
    "hessian_trace exact": lambda: fpq.hessian_trace(QUANTIZED, IMAGES, micro_batch=5),
    "hessian_trace tol": lambda: fpq.hessian_trace(QUANTIZED, IMAGES, tol=0.5),
    "sharpness": lambda: fpq.sharpness(QUANTIZED, IMAGES, n_draws=2, n_flips=2),
    "gradnorm": lambda: fpq.gradient_norms(QUANTIZED, IMAGES, batch_size=5),
    "output_variance": lambda: fpq.output_variance(QUANTIZED, IMAGES, micro_batch=5),
    "features": lambda: fpq.feature_statistics(QUANTIZED, IMAGES, micro_batch=5),
    "drift": lambda: fpq.feature_drift(QUANTIZED, FLOAT, IMAGES, micro_batch=5),
    "noise": lambda: fpq.noise_response(QUANTIZED, IMAGES, micro_batch=5),
    "landscape": lambda: fpq.landscape(QUANTIZED, IMAGES, points=3),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_takes_time_shows_it_and_measures_the_same(name, on_terminal, monkeypatch):
    terminal = on_terminal()
    ends = []
    close = Progress.__exit__
    monkeypatch.setattr(Progress, "__exit__", lambda one, *error: (ends.append(one), close(one, *error)))
    shown = CALLS[name]().frame()
    assert f"{name.split()[0]} " in terminal.getvalue()
    for one in ends:  # none stops short of what it announced, or runs over it
        assert one.done > 0
        assert one.total is None or one.done == pytest.approx(one.total)
    with show_progress(False):
        silent = CALLS[name]().frame()
    assert shown.equals(silent)


def test_one_inside_another_stands_below_it(on_terminal):
    terminal = on_terminal()
    with Progress(2, "outer") as outer:
        outer.advance(busy=["a", "b"])
        with Progress(None, "inner", "products", 10):
            tick(25)
    first, second = terminal.getvalue().rsplit("outer", 1)[1].splitlines()[:2]
    assert "(a, b)" in terminal.getvalue()
    assert "1/2" in first
    assert "inner" in second
    assert "2 products" in second


def test_pieces_are_not_moved_by_samples(on_terminal):
    on_terminal()
    with Progress(2, "pieces") as pieces:
        list(map_batches([(torch.zeros(5),)], lambda batch: None))
        assert pieces.done == 0


def test_quick_calls_are_silent(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress(1000, "quick") as bar:
        for _ in range(1000):
            bar.advance()
    assert sys.stderr.getvalue() == ""


def told(monkeypatch, stream: io.StringIO) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(3, "work", "steps") as bar:
        bar.advance()
    return stream.getvalue()


def test_a_pipe_is_silent_unless_asked_for(monkeypatch, at_once):
    assert told(monkeypatch, io.StringIO()) == ""
    with show_progress():
        line = told(monkeypatch, io.StringIO())
    assert line.startswith("work: 1/3 steps, ")
    assert line.endswith(" left\n")
    assert told(monkeypatch, io.StringIO()) == ""


def test_the_switch_lasts_until_the_next_or_the_end_of_its_block(on_terminal):
    on_terminal()
    show_progress(False)
    try:
        with show_progress(True):
            assert progress._screen.kind() == "terminal"
        assert progress._screen.kind() == ""
    finally:
        show_progress(None)
    assert progress._screen.kind() == "terminal"


def test_a_notebook_has_a_cell_that_is_empty_in_the_end(monkeypatch, at_once):
    pytest.importorskip("IPython")
    import IPython
    import IPython.display

    seen = []
    cell = types.SimpleNamespace(update=lambda data, raw: seen.append(data["text/plain"]))
    monkeypatch.setattr(IPython, "get_ipython", lambda: types.SimpleNamespace(kernel=True))
    monkeypatch.setattr(IPython.display, "display", lambda data, **how: (seen.append(data["text/plain"]), cell)[1])
    with Progress(2, "work") as bar:
        bar.advance()
        bar.advance()
    assert "1/2" in seen[0]
    assert "2/2" in seen[1]
    assert seen[2] == ""


def kind_elsewhere() -> str:
    show_progress(True)
    return progress._screen.kind()


def test_threads_and_workers_are_silent(on_terminal):
    on_terminal()
    found = []
    thread = threading.Thread(target=lambda: found.append(progress._screen.kind()))
    thread.start()
    thread.join()
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        found.append(pool.submit(kind_elsewhere).result())
    assert found == ["", ""]


def test_a_terminal_that_is_gone_ends_nothing(monkeypatch, at_once):
    stream = Terminal()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress(1, "work") as bar:
        bar.advance()
    assert bar.done == 1


def test_a_number_of_the_command_line_is_not_lost_on_stderr(on_terminal, monkeypatch):
    on_terminal()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with Progress(2, "work") as bar:
        bar.advance()
        print("a result")
    assert sys.stdout.getvalue() == "a result\n"

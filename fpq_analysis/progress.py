"""Progress with the time left: a bar where somebody watches, a line from time to time where it was asked for.

Always on stderr or in a notebook's cell.  What takes time opens a `Progress`; they stand one above the other where one
is inside another.  What goes over the data calls `tick`, and need not know who counts.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from io import StringIO
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fpq_analysis.text import duration

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

# Seconds until there is something to see, so that quick calls stay silent; for what is inside another, a little longer.
PATIENCE, INNER_PATIENCE = 1.0, 5.0
# Seconds between two pictures of a bar, which nobody sees the difference of; and between lines.
REFRESH, QUIET = 0.25, 30.0
# Of what is done at a time so much is named.
SHOWN = 4


def show_progress(when: bool | None = True) -> AbstractContextManager[object]:
    """Say whether measuring and training show their progress, from now on, or inside a `with` block.

    Args:
        when: None, as it is at first: where somebody watches, that is on a terminal and in notebooks.  True: elsewhere,
            too, as a line every half a minute.  False: nowhere.  Workers, further ranks and threads are always silent.
    """
    before = ExitStack()
    before.callback(setattr, _screen, "when", _screen.when)
    _screen.when = when
    return before


def tick(samples: float) -> None:
    """So many samples were gone over, for the innermost `Progress` if it counts them."""
    if _screen.open and _screen.open[-1].size and threading.current_thread() is threading.main_thread():
        _screen.open[-1].advance(samples / _screen.open[-1].size)


class Progress:
    """Context manager; call `advance` after each piece of work, or let `tick` do so.

    Args:
        total: pieces of work; None where that is not known.
        what: is done.
        unit: of the pieces, such as `products`.
        size: samples that are gone over for a piece; 0: pieces are no matter of samples, and `tick` does nothing.
    """

    def __init__(self, total: float | None, what: str, unit: str = "", size: float = 0) -> None:
        self.total = total
        self.what = what
        self.unit = unit
        self.size = size
        self.done = 0.0
        self.busy: Sequence[str] = ()

    def __enter__(self) -> Progress:
        self.start = time.monotonic()
        self.patience = INNER_PATIENCE if _screen.open else PATIENCE
        if self.total != 0 and _screen.kind():
            _screen.open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self in _screen.open:
            _screen.open.remove(self)
            _screen.close()

    def advance(self, amount: float = 1.0, busy: Sequence[str] = ()) -> None:
        """So much more is done.

        Args:
            busy: what is being worked on, where that is several things at a time.
        """
        self.done += amount
        self.busy = busy
        if self in _screen.open:
            _screen.refresh()

    @property
    def title(self) -> str:
        """What is done, and what of it now."""
        now = ", ".join(self.busy[:SHOWN])
        more = f" and {len(self.busy) - SHOWN} more" if len(self.busy) > SHOWN else ""
        return f"{self.what} ({now}{more})" if now else self.what

    @property
    def count(self) -> str:
        """How much is done, and the time that is left; where that is not known, the time it took so far."""
        spent = time.monotonic() - self.start
        done, unit = int(self.done + 1e-6), f" {self.unit}" if self.unit else ""
        if self.total is None:
            return f"{done}{unit}, {duration(spent)}"
        left = f", {duration(spent / self.done * max(0.0, self.total - self.done))} left" if self.done else ""
        return f"{min(done, int(self.total))}/{int(self.total)}{unit}{left}"


class _Screen:
    """Where progress is seen: what is open, and the picture of it."""

    def __init__(self) -> None:
        self.when: bool | None = None
        self.open: list[Progress] = []
        self._live: Live | None = None  # on a terminal
        self._cell: Any = None  # in a notebook
        self._drawn = self._spoken = 0.0

    def kind(self) -> str:
        """`terminal`, `notebook`, `lines`, or nothing if there is no one to show it to."""
        distributed = sys.modules.get("torch.distributed")
        further = distributed is not None and distributed.is_available() and distributed.is_initialized()
        if (
            self.when is False
            or sys.stderr is None
            or multiprocessing.parent_process() is not None
            or threading.current_thread() is not threading.main_thread()
            or (further and distributed.get_rank() > 0)  # type: ignore[union-attr]
        ):
            return ""
        if _in_notebook():
            return "notebook"
        if sys.stderr.isatty():
            return "terminal"
        return "lines" if self.when else ""

    def refresh(self) -> None:
        """Draw what is open and has been so for a while, unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._drawn < REFRESH:
            return
        shown = [one for one in self.open if now - one.start > one.patience]
        if not shown:
            return
        self._drawn = now
        with suppress(OSError, ValueError):  # a terminal that is gone must not end a measurement
            match self.kind():
                case "terminal":
                    self._on_terminal(shown)
                case "notebook":
                    self._in_cell(shown)
                case "lines" if now - max(self._spoken, shown[0].start) > QUIET:
                    self._spoken = now
                    print("; ".join(f"{one.title}: {one.count}" for one in shown), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the picture away when nothing is open any more."""
        if self.open:
            return
        live, cell, self._live, self._cell, self._drawn = self._live, self._cell, None, None, 0.0
        with suppress(OSError, ValueError):
            if live is not None:
                live.stop()
            if cell is not None:
                cell.update({"text/html": "", "text/plain": ""}, raw=True)  # of an empty text a page shows a box

    def _on_terminal(self, shown: list[Progress]) -> None:
        if self._live is None:
            from rich.console import Console
            from rich.live import Live

            # Drawn on `advance` alone: a thread would take the interpreter from what is measured.
            how: dict[str, Any] = {"auto_refresh": False, "transient": True, "redirect_stdout": sys.stdout.isatty()}
            self._live = Live(console=Console(stderr=True), **how)
            self._live.start()
        self._live.update(_picture(shown), refresh=True)

    def _in_cell(self, shown: list[Progress]) -> None:
        from IPython.display import display
        from rich.console import Console

        console = Console(file=StringIO(), width=100, force_jupyter=False)
        with console.capture() as text:
            console.print(_picture(shown))
        data = {"text/plain": text.get()}
        if self._cell is None:
            self._cell = display(data, raw=True, display_id=True)
        else:
            self._cell.update(data, raw=True)


def _picture(shown: list[Progress]) -> Table:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    for one in shown:
        table.add_row(one.title, ProgressBar(one.total, one.done, width=30, pulse=one.total is None), one.count)
    return table


def _in_notebook() -> bool:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


_screen = _Screen()

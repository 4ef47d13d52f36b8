"""Progress with the time left: a bar on a terminal, elsewhere a line from time to time.  Always on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from fpq_analysis.text import duration

# Seconds between lines when nobody watches a terminal.
QUIET = 30.0


class Progress:
    """Context manager; call `advance` after each of `total` pieces of work."""

    def __init__(self, total: int, what: str) -> None:
        self.total = total
        self.what = what
        self.done = 0
        self.start = self.spoken = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar = None
        if self.total and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """One piece is done."""
        self.done += 1
        if self._bar is not None:
            self._bar.advance(self._task)
        elif time.monotonic() - self.spoken > QUIET:
            self.spoken = time.monotonic()
            left = (self.spoken - self.start) / self.done * (self.total - self.done)
            print(f"{self.what}: {self.done}/{self.total}, {duration(left)} left", file=sys.stderr, flush=True)

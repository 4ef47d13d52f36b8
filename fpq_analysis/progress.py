"""Progress with the time left: a bar on a terminal, elsewhere a line from time to time.  Always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from types import TracebackType

from fpq_analysis.text import duration

# Seconds between lines when nobody watches a terminal.
QUIET = 30.0
# Of what is done at a time so much is named.
SHOWN = 4


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

    def advance(self, busy: Sequence[str] = ()) -> None:
        """One piece is done.

        Args:
            busy: what is being worked on, where that is several things at a time.
        """
        self.done += 1
        now = ", ".join(busy[:SHOWN]) + (f" and {len(busy) - SHOWN} more" if len(busy) > SHOWN else "")
        if self._bar is not None:
            self._bar.update(self._task, advance=1, description=f"{self.what} ({now})" if now else self.what)
        elif time.monotonic() - self.spoken > QUIET:
            self.spoken = time.monotonic()
            left = (self.spoken - self.start) / self.done * (self.total - self.done)
            text = f"{self.what}: {self.done}/{self.total}, {duration(left)} left{now and f'; now {now}'}"
            print(text, file=sys.stderr, flush=True)

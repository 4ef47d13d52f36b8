"""The page while runs go on: served to browsers on this machine, and made anew when the files it speaks of change."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from fpq_analysis.errors import UserError, going_on
from fpq_analysis.report.page import write_report

FILES = ("run.json", "train.jsonl", "manifest.json", "records/*.json*")
REST = 5  # times as long as making the page took, before it is made again: what trains needs the machine as well
# What the served page has and the file has not: it asks which version is the newest, and loads that.
POLICY = "default-src 'none';", "default-src 'none'; script-src 'unsafe-inline'; connect-src 'self';"
SCRIPT = """<script>
setInterval(async () => {{
  const answer = await fetch("version").catch(() => null);
  if (answer && answer.ok && await answer.text() !== "{}") location.reload();
}}, 2000);
</script>
</body>"""


class Live:
    """The page of a folder as it is now.

    Args:
        make: writes the page and returns its path.
        folders: whose files it speaks of.
        log: called with a line for every page made, and for every one that could not be.
    """

    def __init__(self, make: Callable[[], Path], folders: set[Path], log: Callable[[str], None]) -> None:
        self.make, self.folders, self.log = make, folders, log
        self.lock, self.rested, self.version = threading.Lock(), 0.0, 1
        self.seen = self.stamps()  # first: what changes while the page is made counts
        self.text = make().read_text("utf-8")

    def stamps(self) -> set[tuple[Path, int, int]]:
        """Of all files: path, time and size."""
        found = set()
        for path in {path for folder in self.folders for pattern in FILES for path in folder.rglob(pattern)}:
            with contextlib.suppress(OSError):  # it is gone again
                about = path.stat()
                found.add((path, about.st_mtime_ns, about.st_size))
        return found

    def current(self) -> str:
        """The number of the page, after it was made anew if need be; where it cannot be, the old one stays."""
        with self.lock:
            if time.monotonic() >= self.rested and (found := self.stamps()) != self.seen:
                self.seen, began = found, time.monotonic()
                with going_on(lambda fault: self.log(f"The report stays as it was: {fault}"), "The report"):
                    path = self.make()
                    self.text = path.read_text("utf-8")
                    self.version += 1
                    self.log(f"{time.strftime('%H:%M:%S')} {path} is new.")
                self.rested = time.monotonic() + REST * (time.monotonic() - began)
            return str(self.version)

    def page(self) -> str:
        """The page, with what keeps it up to date."""
        script = SCRIPT.format(self.current())
        return self.text.replace(*POLICY, 1).replace("</body>", script, 1)


class Server(ThreadingHTTPServer):  # of threads, as browsers open connections that they do not use yet
    """Answers from `live`."""

    live: Live

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that went away before it had its answer is no news."""
        if (error := sys.exception()) and not isinstance(error, ConnectionError):
            self.live.log(f"{error}")


class Answer(BaseHTTPRequestHandler):
    """To one request."""

    server: Server

    def do_GET(self) -> None:
        """`/` is the page, `/version` its number."""
        live = self.server.live
        kind, answer = {"/": ("html", live.page), "/version": ("plain", live.current)}.get(self.path, ("", None))
        if answer is None:
            return self.send_error(404)
        content = answer().encode()
        self.send_response(200)
        self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)
        return None

    def log_message(self, *args: object) -> None:
        """Requests are no news."""


def serve(
    ckpt_dir: Path, path: Path, *, records: Path | None = None, port: int = 8765, log: Callable[[str], None] = print
) -> None:
    """Serve the report to browsers on this machine until Ctrl-C; see `write_report`.

    Args:
        port: of 127.0.0.1; 0 for any that is free.
        log: called with the address, and as in `Live`.

    Raises:
        UserError: if the port cannot be had, or the first page not be made.
    """
    try:
        server = Server(("127.0.0.1", port), Answer)
    except OSError as error:
        raise UserError(
            f"Port {port} of this machine cannot be had ({error.strerror}). Is another 'report --serve' running? End "
            "it, or choose another port; --port 0 takes any that is free."
        ) from error
    with server, contextlib.suppress(KeyboardInterrupt):
        folders = {Path(ckpt_dir), Path(records or ckpt_dir)}
        server.live = Live(lambda: write_report(ckpt_dir, path, records=records).path, folders, log)
        log(f"The report is at http://127.0.0.1:{server.server_port}/ and follows the runs. Ctrl-C ends it.")
        server.serve_forever()

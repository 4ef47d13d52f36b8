"""The command line: parse, call, print.  Every command is one Python call; torch is imported only when one runs.

Results go to stdout, everything else to stderr.  Exit codes: 0 all was done, 1 something could not be done (the message
says what), 2 the command was misused, 130 stopped by Ctrl-C.
"""

# One file a command; importing it registers the command, in the order of `--help`.
from fpq_analysis.cli import train, tables, hessian, noise, oscillation, compare, doctor, inspect, export, demo  # noqa: I001
from fpq_analysis.cli.app import app, main

__all__ = [
    "app",
    "compare",
    "demo",
    "doctor",
    "export",
    "hessian",
    "inspect",
    "main",
    "noise",
    "oscillation",
    "tables",
    "train",
]

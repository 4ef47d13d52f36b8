"""The command line: parse, call, print.  Every command is one Python call; torch is imported only when one runs.

Results go to stdout, everything else to stderr.  Exit codes: 0 all was done, 1 something could not be done (the message
says what), 2 the command was misused, 130 stopped by Ctrl-C.
"""

# One file a command, and one for those of `measures.py`; importing registers them, in the order of `--help`.
# isort: off
from fpq_analysis.cli import train
from fpq_analysis.cli import tables
from fpq_analysis.cli import hessian
from fpq_analysis.cli import probes
from fpq_analysis.cli import landscape
from fpq_analysis.cli import compare
from fpq_analysis.cli import figures
from fpq_analysis.cli import report
from fpq_analysis.cli import doctor
from fpq_analysis.cli import inspect
from fpq_analysis.cli import export
from fpq_analysis.cli import demo

# isort: on
from fpq_analysis.cli.app import app, main

__all__ = [
    "app",
    "compare",
    "demo",
    "doctor",
    "export",
    "figures",
    "hessian",
    "inspect",
    "landscape",
    "main",
    "probes",
    "report",
    "tables",
    "train",
]

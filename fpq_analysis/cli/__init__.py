"""The command line: parse, call, print.  Every command is one Python call; torch is imported only when one runs.

Results go to stdout, everything else to stderr.  Exit codes: 0 all was done, 1 something could not be done (the message
says what), 2 the command was misused, 130 stopped by Ctrl-C.
"""

# One file a command, and one for those of `measures.py`; importing registers them, in the order of `--help`.
# isort: off
from fpq_analysis.cli import train as train
from fpq_analysis.cli import tables as tables
from fpq_analysis.cli import hessian as hessian
from fpq_analysis.cli import probes as probes
from fpq_analysis.cli import landscape as landscape
from fpq_analysis.cli import compare as compare
from fpq_analysis.cli import figures as figures
from fpq_analysis.cli import report as report
from fpq_analysis.cli import watch as watch
from fpq_analysis.cli import doctor as doctor
from fpq_analysis.cli import inspect as inspect
from fpq_analysis.cli import export as export
from fpq_analysis.cli import demo as demo

# isort: on
from fpq_analysis.cli.app import app as app
from fpq_analysis.cli.app import main as main

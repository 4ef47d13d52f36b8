"""The disk: runs and their checkpoints, those of other programs, what is exported and inspected of them.

What is imported here needs no torch.  The modules that read weights do: `checkpoint`, `foreign`, `export`,
`inspection`.
"""

from fpq_analysis.runs.run import CHECKPOINT_NAME, FOREIGN_OPTIONS, PLACES, Header, Run, find_runs, number_of, versions
from fpq_analysis.runs.source import OwnRuns, Source, source_of
from fpq_analysis.runs.stamps import Stamp, file_hash

__all__ = [
    "CHECKPOINT_NAME",
    "FOREIGN_OPTIONS",
    "PLACES",
    "Header",
    "OwnRuns",
    "Run",
    "Source",
    "Stamp",
    "file_hash",
    "find_runs",
    "number_of",
    "source_of",
    "versions",
]

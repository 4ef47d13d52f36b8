"""The disk: runs and their checkpoints, those of other programs, what is exported and inspected of them.

What is imported here needs no torch.  The modules that read weights do: `checkpoint`, `foreign`, `export`,
`inspection`.
"""

from fpq_analysis.runs.run import MONITORED as MONITORED
from fpq_analysis.runs.run import PLACES as PLACES
from fpq_analysis.runs.run import Header as Header
from fpq_analysis.runs.run import Run as Run
from fpq_analysis.runs.run import find_runs as find_runs
from fpq_analysis.runs.run import no_checkpoints as no_checkpoints
from fpq_analysis.runs.run import number_of as number_of
from fpq_analysis.runs.run import seeds_of as seeds_of
from fpq_analysis.runs.run import versions as versions
from fpq_analysis.runs.source import OwnRuns as OwnRuns
from fpq_analysis.runs.source import Source as Source
from fpq_analysis.runs.source import one_run as one_run
from fpq_analysis.runs.source import source_of as source_of
from fpq_analysis.runs.stamps import file_hash as file_hash

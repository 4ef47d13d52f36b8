"""The disk: runs and their checkpoints, those of other programs, what is exported and inspected of them.

What is imported here needs no torch.  The modules that read weights do: `checkpoint`, `foreign`, `export`,
`inspection`.
"""

from fpq_analysis.runs.run import (
    CHECKPOINT_NAME,
    FOREIGN_OPTIONS,
    Header,
    Stamp,
    checkpoints,
    file_hash,
    find_runs,
    find_teacher,
    read_header,
    read_manifest,
    read_run,
    read_training,
    versions,
)

__all__ = [
    "CHECKPOINT_NAME",
    "FOREIGN_OPTIONS",
    "Header",
    "Stamp",
    "checkpoints",
    "file_hash",
    "find_runs",
    "find_teacher",
    "read_header",
    "read_manifest",
    "read_run",
    "read_training",
    "versions",
]

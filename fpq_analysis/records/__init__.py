"""What was measured: the table on disk, questions to it, differences and their errors, numbers in words."""

from fpq_analysis.records.table import (
    COLUMNS,
    append,
    done,
    home,
    load,
    measurement_key,
    read,
    read_rows,
    run_name,
    settings_key,
)

__all__ = [
    "COLUMNS",
    "append",
    "done",
    "home",
    "load",
    "measurement_key",
    "read",
    "read_rows",
    "run_name",
    "settings_key",
]

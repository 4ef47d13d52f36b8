"""What was measured: the table on disk, questions to it, differences and their errors, numbers in words."""

from fpq_analysis.records.table import COLUMNS as COLUMNS
from fpq_analysis.records.table import append as append
from fpq_analysis.records.table import done as done
from fpq_analysis.records.table import drop_after as drop_after
from fpq_analysis.records.table import home as home
from fpq_analysis.records.table import load as load
from fpq_analysis.records.table import measurement_key as measurement_key
from fpq_analysis.records.table import read as read
from fpq_analysis.records.table import read_rows as read_rows
from fpq_analysis.records.table import run_name as run_name
from fpq_analysis.records.table import settings_key as settings_key

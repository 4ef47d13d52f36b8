"""Tables of what a function measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from fpq_analysis.probes.result import Result


def table_of(measure: Callable[..., Result], *args: Any, **kwargs: Any) -> pd.DataFrame:
    """The table of a measurement."""
    return measure(*args, **kwargs).frame()

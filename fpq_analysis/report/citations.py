"""BibTeX of the paper, of this software, and of the methods that the runs used."""

from __future__ import annotations

from collections.abc import Iterable

from fpq_analysis import __version__
from fpq_analysis.methods import FPQ_PAPER, METHODS

TITLE = "fpq_analysis: Hessian and loss-landscape analysis of quantized networks"
AUTHORS = "The fpq_analysis authors"

SOFTWARE = f"""@software{{fpq_analysis,
  title   = {{{TITLE}}},
  author  = {{{{{AUTHORS}}}}},
  version = {{{__version__}}}
}}"""


def bibtex(methods: Iterable[str]) -> str:
    """The entries that a text about runs of these methods needs."""
    rows = [METHODS[name] for name in METHODS if name in set(methods)]
    # A method built on LSQ, say, needs LSQ's too: the plain method of a quantizer has its name.
    plain = [METHODS[row.quantizer] for row in rows if row.quantizer in METHODS]
    return "\n\n".join(dict.fromkeys([FPQ_PAPER, SOFTWARE, *(row.bibtex for row in plain + rows if row.bibtex)]))

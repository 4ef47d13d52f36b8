"""Every public name is in the API reference: the build fails for one that is left out."""

from __future__ import annotations

import importlib
import re
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

import fpq_analysis

# The rooms whose names, too, are for users; those that the package itself has stand with it.
ROOMS = ("curvature", "data", "linalg", "losses", "plots", "probes", "quantizers", "training")
PAGE = re.compile(r"\bdocs/([\w/]+)\.md")
NAME = re.compile(rf"(?<![`:])`({'|'.join(fpq_analysis.__all__)})`(?!`)")
logger = logging.getLogger(__name__)


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("autodoc-skip-member", _stands_elsewhere)
    app.connect("autodoc-process-docstring", _link)
    app.connect("env-check-consistency", _check)
    return {"parallel_read_safe": True}


def public_names(module: Any) -> list[str]:
    """What a room offers: its `__all__`, or what its `__init__` imports from its files."""
    return getattr(module, "__all__", None) or [
        name for name, value in vars(module).items() if not name.startswith("_") and not isinstance(value, ModuleType)
    ]


def _stands_elsewhere(app: Sphinx, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    if what == "module" and any(value is getattr(fpq_analysis, public) for public in fpq_analysis.__all__):
        return True
    return None


def _link(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """A name of the package in a docstring, and a page (docs/losses.md), are links on the site."""
    for i, line in enumerate(lines):
        lines[i] = PAGE.sub(r":doc:`/\1`", NAME.sub(r":py:obj:`~fpq_analysis.\1`", line))


def _check(app: Sphinx, env: Any) -> None:
    documented = env.domains["py"].objects
    for module in (fpq_analysis, *(importlib.import_module(f"fpq_analysis.{room}") for room in ROOMS)):
        for name in public_names(module):
            places = [module.__name__]
            if getattr(module, name) is getattr(fpq_analysis, name, None):
                places.append("fpq_analysis")
            if not any(f"{place}.{name}" in documented for place in places):
                logger.warning("%s.%s is public and not in the API reference", module.__name__, name)

"""The user's own code by its name: `package.module:function`."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from fpq_analysis.errors import UserError


def find(name: str, what: str) -> Any:
    """What `package.module:attribute` names; its module is imported, from the working folder, too.

    Args:
        what: it is to be, for errors: `model`.

    Raises:
        UserError: if it is not there, or its module cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UserError(f"'{name}' names no {what}. Give package.module:function.")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, and the installed command does not
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"Cannot import the {what} '{name}': {error}. Give package.module:function, where the package is "
            "installed, or lies in the working folder or in one on PYTHONPATH."
        ) from error
    except Exception as error:  # the user's code: anything can happen
        raise UserError(
            f"The module of the {what} '{name}' fails when it is imported: {type(error).__name__}: {error}."
        ) from error
    return found

"""The user's own code by its name: `package.module:function`."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from fpq_analysis.errors import UserError, did_you_mean

DEEP = 2  # folders below the working folder in which a misnamed module is looked for


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
    failed = f"Cannot import the {what} '{name}'"
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for numbers
            found: Any = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's code: anything can happen
        if _is_missing(error, module_name):
            raise UserError(f"{failed}: {_missing(module_name, attribute)}") from error
        if isinstance(error, SystemExit):
            raise UserError(
                f"{failed}: its module ends the program when it is imported{where(error)}. What a script does belongs "
                "below a line: if __name__ == '__main__':"
            ) from error
        text = error.msg if isinstance(error, SyntaxError) else error
        raise UserError(
            f"{failed}: its module fails when it is imported: {type(error).__name__}: {text}{where(error)}."
        ) from error
    module = found
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            file = getattr(module, "__file__", None)
            place = f" ({file})" if file else ""
            others = [other for other in vars(module) if not other.startswith("_")]
            meant = did_you_mean(attribute, others)
            raise UserError(
                f"{failed}: the module '{module_name}'{place} has no '{attribute}'{meant}. If another file is meant, "
                "name its module as Python imports it from the working folder: package.module."
            ) from error
    return found


def where(error: BaseException) -> str:
    """` (FILE, line N)` of an error: the last line of the user's own code that it came through, or nothing."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({_short(error.filename)}, line {error.lineno})"
    ours, library = str(Path(__file__).parent), sysconfig.get_path("stdlib")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        outside = not frame.filename.startswith((ours, library, "<")) and "site-packages" not in frame.filename
        if outside:
            return f" ({_short(frame.filename)}, line {frame.lineno})"
    return ""


def _short(file: str) -> str:
    return os.path.relpath(file) if file.startswith(os.getcwd() + os.sep) else file


def _is_missing(error: BaseException, module: str) -> bool:
    """Whether it is the module itself, or a package it is in, that is not there; not one that it imports."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return isinstance(error, TypeError) and module.startswith(".")  # a relative name, which begins nowhere
    return f"{module}.".startswith(f"{error.name}.")


def _missing(module: str, attribute: str) -> str:
    """What there is instead."""
    here = Path.cwd()
    plain = module.removesuffix(".py").replace("/", ".").replace("\\", ".").strip(".")
    if plain != module and (here / f"{plain.replace('.', '/')}.py").is_file():
        return f"a module is named without slashes and .py: {plain}:{attribute}"
    last = plain.rpartition(".")[2]
    patterns = ["*/" * depth + f"{last}.py" for depth in range(DEEP + 1)]
    files = [file.relative_to(here) for pattern in patterns for file in sorted(here.glob(pattern))]
    if files:
        meant = ".".join(files[0].with_suffix("").parts)
        return f"there is no module '{module}', but '{files[0]}': name it {meant}:{attribute}"
    near = did_you_mean(plain, [file.stem for file in here.glob("*.py")])
    return (
        f"there is no module '{module}'{near}, neither in the working folder '{here}' nor among what is installed. "
        "Call the command where the module lies, or put its folder on PYTHONPATH."
    )

"""Hash of the user's model code, so that results are not reused after it changes."""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

STDLIB = Path(sysconfig.get_path("stdlib")).resolve()
PACKAGES = {"site-packages", "dist-packages"}
# A script's name as it runs, and in the processes that it starts.
SCRIPT = ("__main__", "__mp_main__")
PLAIN = (bool, int, float, complex, str, bytes, type(None))


def source_hash(factory: Callable[..., Any]) -> str:
    """Short hash of the source of the module that defines `factory`, and of the user's modules it takes names from.

    Installed packages are not looked into, but for the factory's own.  Of a notebook or a script, the function counts
    with what it refers to, not the other cells and lines.  What was made at run time (the arguments of a
    `functools.partial`, what a closure holds) counts as far as it is plain values, functions and modules; of other
    objects, their class.
    """
    return _hash_once(factory) if isinstance(factory, FunctionType | type) else _hash(factory)


def factory_name(factory: Callable[..., Any]) -> str:
    """`package.module:factory` of a function or class; of a `functools.partial` or an object, of what it calls."""
    while isinstance(factory, functools.partial):
        factory = factory.func
    named = factory if hasattr(factory, "__qualname__") else type(factory)
    return f"{SCRIPT[0] if named.__module__ in SCRIPT else named.__module__}:{named.__qualname__}"


# Once: what is loaded stays what it was, whatever becomes of its file.  A module that is reloaded has new functions.
@functools.cache
def _hash_once(factory: Callable[..., Any]) -> str:
    return _hash(factory)


def _hash(factory: Any) -> str:
    pieces = sorted(set(_pieces(factory, _home(factory).partition(".")[0], {})))
    return hashlib.sha256(repr(pieces).encode()).hexdigest()[:16]


def _pieces(thing: Any, package: str, seen: dict[int, Any]) -> Iterator[str]:
    """Everything in reach of `thing` that says what it does; `seen` keeps what has had its turn alive, by its id."""
    if isinstance(thing, PLAIN):
        yield repr(thing)
        return
    if id(thing) in seen:
        return
    seen[id(thing)] = thing
    parts: list[Any] = []
    if isinstance(thing, ModuleType):
        if (text := _text(thing)) is not None and _is_followed(thing, package):
            yield text
            parts = [v if isinstance(v, ModuleType) else sys.modules.get(_home(v)) for v in list(vars(thing).values())]
    elif isinstance(thing, FunctionType | type):
        yield thing.__qualname__
        home = sys.modules.get(thing.__module__)
        functions = [thing] if isinstance(thing, FunctionType) else _functions(thing)
        for function in functions:
            parts += [*_held(function), function.__defaults__, function.__kwdefaults__]
        if home is not None and _text(home) is not None:
            parts.append(home)
        else:  # of a notebook, a script, an interactive session
            yield _source(thing, functions)
            parts += thing.__bases__ if isinstance(thing, type) else ()
            parts += [(name, f.__globals__.get(name)) for f in functions for name in sorted(_names(f.__code__))]
    elif isinstance(thing, dict):
        parts = list(thing.items())
    elif isinstance(thing, tuple | list | set | frozenset):
        yield f"{len(thing)} parts"
        parts = list(thing)
    elif isinstance(thing, functools.partial):
        parts = [thing.func, thing.args, thing.keywords]
    else:
        if hasattr(type(thing), "named_modules"):  # a network that is there already; its text is its form
            yield repr(thing)
        parts = [getattr(thing, "__func__", None), getattr(thing, "__self__", None), type(thing)]  # of a method
    for part in parts:
        yield from _pieces(part, package, seen)


def _functions(kind: type) -> list[FunctionType]:
    return [value for value in vars(kind).values() if isinstance(value, FunctionType)]


def _held(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue


def _source(thing: FunctionType | type, functions: list[FunctionType]) -> str:
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):  # typed in, or made by exec
        return repr([_instructions(function.__code__) for function in functions])


def _instructions(code: CodeType) -> list[Any]:
    plain = [repr(c) for c in code.co_consts if not isinstance(c, CodeType)]
    return [code.co_code, code.co_names, plain, *(_instructions(c) for c in code.co_consts if isinstance(c, CodeType))]


def _names(code: CodeType) -> set[str]:
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))


def _home(thing: Any) -> str:
    """Name of the module that defines a function or class, or else the class of an object."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    name = getattr(thing, "__module__", None) if isinstance(thing, FunctionType | type) else type(thing).__module__
    return name if isinstance(name, str) else ""


def _text(module: ModuleType) -> str | None:
    """A module's source; None for what runs as a script or notebook, and for what has none."""
    file = getattr(module, "__file__", None)
    if module.__name__ in SCRIPT or not file or not file.endswith(".py"):
        return None
    try:
        return Path(file).read_text(errors="replace")
    except OSError:
        return None


def _is_followed(module: ModuleType, package: str) -> bool:
    """Whether it is of the factory's package, or the user's own; networks of this package go by the probes' version."""
    name = module.__name__.partition(".")[0]
    if name == __name__.partition(".")[0]:
        return False
    file = Path(str(module.__file__)).resolve()
    installed = STDLIB in file.parents or not PACKAGES.isdisjoint(file.parts)
    return name == package or not installed

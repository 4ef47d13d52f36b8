"""Calls and what comes of them as bytes, to be handed from process to process."""

from __future__ import annotations

import pickle
from typing import Any


def packed(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """A call.  `pickle` finds functions by their names, so that they must be importable where it is done."""
    return pickle.dumps((fn, args, kwargs))


def done(call: bytes) -> bytes:
    """Make the call; whatever it returns or raises."""
    outcome: tuple[Any, Exception | None]
    try:
        fn, args, kwargs = pickle.loads(call)
        return pickle.dumps((fn(*args, **kwargs), None))
    except Exception as error:
        outcome = None, error
    try:
        pickle.loads(found := pickle.dumps(outcome))
        return found
    except Exception:  # not every exception can be handed on
        return pickle.dumps((None, RuntimeError(f"{type(outcome[1]).__name__}: {outcome[1]}")))


def unpacked(outcome: bytes) -> Any:
    """What the call returned, or else raise what it raised."""
    value, error = pickle.loads(outcome)
    if error is not None:
        raise error
    return value

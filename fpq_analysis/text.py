"""Numbers, times and lists in words, and text from outside, such as names of runs, made safe to show."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from fpq_analysis.errors import UserError


def number(x: float, digits: int) -> str:
    """`x` to so many significant digits, without an exponent where it is of a common size."""
    rounded = float(f"{x:.{digits}g}")
    return f"{rounded:.0f}" if 10 ** (digits - 1) <= abs(rounded) < 1e7 else f"{rounded:.{digits}g}"


def fraction(x: float) -> str:
    """`1/8` for 0.125; other numbers as they are."""
    inverse = 1 / x
    return f"1/{inverse:.0f}" if x < 1 and abs(inverse - round(inverse)) < 1e-9 else f"{x:g}"


def duration(seconds: float) -> str:
    """`4.2 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def listed(values: Iterable[object], last: str = "and") -> str:
    """`a, b and c`, each once."""
    words = list(dict.fromkeys(str(value) for value in values))
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def counted(n: int, what: str) -> str:
    """`1 fault`, `2 faults`."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def written(paths: Sequence[Path]) -> str:
    """Files of one name: `figures/figure5.png, .pdf, .txt`."""
    return ", ".join([str(paths[0]), *(path.suffix for path in paths[1:])])


def printable(text: str, keep: str = "") -> str:
    r"""`text` with every character that shows nothing, or that a terminal would obey, written out (\x1b for an escape).

    Args:
        keep: characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or _shows(c) else c.encode("unicode_escape").decode() for c in text)


def _shows(character: str) -> bool:
    kind = unicodedata.category(character)  # C: controls, surrogates, unassigned; Zl, Zp: ends of lines and paragraphs
    return kind[0] != "C" and kind not in ("Zl", "Zp")


def parse_shard(text: str) -> tuple[int, int]:
    """`2/4` to (2, 4).

    Raises:
        UserError: if it has another form, or is no part of the whole.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard {text} is not a part of a whole. Write 1/4, 2/4, 3/4 and 4/4 for four machines.")
    return int(match[1]), int(match[2])

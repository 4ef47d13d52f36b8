"""Text from outside, such as names of runs and files, made safe to show."""

from __future__ import annotations

import unicodedata


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

"""What a command printed, without the line breaks that depend on the length of a path."""

from __future__ import annotations


def words(text: str) -> str:
    """`text` with every stretch of white space made one space."""
    return " ".join(text.split())

"""Names from outside on a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpq_analysis.text import printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("lsq-w4a4", "lsq-w4a4"),
        ("Größe ± 3 λ²", "Größe ± 3 λ²"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("two\nlines\tand a tab", "two\\nlines\\tand a tab"),
        ("\u202egnp.exe", "\\u202egnp.exe"),  # what follows would be read from right to left
        ("\udcff", "\\udcff"),  # a byte of a file's name that is no UTF-8
        ("\u2028", "\\u2028"),
        ("\u00a0", "\u00a0"),
    ],
)
def test_what_is_shown(name, shown):
    assert printable(name) == shown


@given(st.text(st.characters()))
def test_any_text_can_be_printed(text):
    shown = printable(text)
    assert not any(ord(c) < 32 or ord(c) == 127 for c in shown)
    shown.encode()
    assert printable(shown) == shown
    assert printable(text, keep="\n").count("\n") == text.count("\n")

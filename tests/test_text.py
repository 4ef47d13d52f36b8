"""Numbers and lists in words, and names from outside on a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpq_analysis.text import duration, fraction, listed, number, printable


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


def test_numbers_in_words():
    assert [number(x, 3) for x in (1234.5, 0.00012345, -12.0, 3e7)] == ["1230", "0.000123", "-12", "3e+07"]
    assert [number(x, 2) for x in (137.3, 0.0123, 9.96, -75.9, 0.0)] == ["140", "0.012", "10", "-76", "0"]
    assert [fraction(x) for x in (0.125, 1, 1.5, 0.3)] == ["1/8", "1", "1.5", "0.3"]
    assert [duration(x) for x in (0, 4.25, 59.6, 61, 7500)] == [
        "0.0 s",
        "4.2 s",
        "1 min 00 s",
        "1 min 01 s",
        "2 h 05 min",
    ]


def test_lists_in_words():
    assert [listed(x) for x in ("", "a", "ab", "abca")] == ["", "a", "a and b", "a, b and c"]
    assert listed([1, 2], "or") == "1 or 2"

"""A page about a set of runs, from their files alone: `run.json`, `train.jsonl` and records.  No torch in this room.

study.py      what lies on disk
findings.py   comparisons, and what they say in sentences
tables.py     rows of cells
prose.py      the methods paragraphs; citations.py BibTeX
pictures.py   figures as inline SVG
page.py       all of it through page.html.jinja and page.css
"""

from fpq_analysis.report.page import write_report

__all__ = ["write_report"]

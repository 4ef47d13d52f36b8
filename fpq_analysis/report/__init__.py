"""A page about a set of runs, from their files alone: `run.json`, `train.jsonl` and records.  No torch in this room.

study.py        what lies on disk
comparisons.py  which runs stand against each other; findings.py what that says in sentences
cautions.py     what a reader should know before trusting it
cells.py        rows of cells; tables.py those of results, provenance.py those of where they come from
headings.py     what tables call quantities; missing.py what was not measured, with commands
prose.py        the methods paragraphs; citations.py BibTeX
pictures.py     figures as inline SVG
page.py         all of it through page.html.jinja and page.css; live.py the same, served while runs go on
paper.py        Tables 1-5 of the paper beside what was measured; no part of the page
"""

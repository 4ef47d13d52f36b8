# make demo           the whole job on embedded data: train, measure, figures, report
# make test           the test suite
# make test-portable  its numbers once more, as on another processor: the oldest instructions, one thread (no simulations)
# make test-slurm     the tests of Slurm, beside one that lasts as long (needs Debian's slurm-wlm and munge)
# make coverage       the test suite, and the share of the package's lines and branches it reaches
# make notebooks      the notebooks, on the demo's checkpoints
# make check          linter, formatter and type checker
# make docs           the documentation into docs/_build/html; a warning is an error
# make dist           sdist and wheel into dist/, and the wheel tried in an empty environment (DEMO=1: the demo too)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Of commands, files, pages and settings: what these print and write is the same on every processor.
NOT_OF_NUMBERS := blocks cli dask data docstrings doctor engines execution export extending factories figures files folder \
	foreign guard hostile inspection integrations intervals memory methods misuse monitor notebooks own_data pages \
	pipeline plots progress ranks records_and_plots references report results rooms runs sentences settings \
	slurm sweeps tables tensorboard text training transformers watch
OTHER_PROCESSOR := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1

.PHONY: demo test test-portable test-slurm coverage notebooks check docs dist clean

demo: $(VENV)/.installed
	$(BIN)/fpq-analyze demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

test-portable: $(VENV)/.installed-test
	$(OTHER_PROCESSOR) $(BIN)/python -m pytest -m "not simulation" $(NOT_OF_NUMBERS:%=--ignore=tests/test_%.py)

test-slurm: $(VENV)/.installed-test
	.ci/with-slurm $(BIN)/python -m pytest -n0 -m slurm

coverage: $(VENV)/.installed-test
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered --cov-report=html:build/coverage

notebooks: $(VENV)/.installed-test
	$(BIN)/jupytext --to ipynb --execute notebooks/*.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-dev
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs docs/_build/html

dist: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	DEMO=$(DEMO) PYTHON=$(PYTHON) .ci/try-wheel dist/*.whl

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps depend on pyproject.toml, so that a changed dependency is installed.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test

clean:
	rm -rf $(VENV)

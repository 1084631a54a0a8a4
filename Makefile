# Everything is installed into .venv. Each target installs only what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup demo test faults check docs release-check

help:
	@echo 'make setup   install what a user needs into .venv'
	@echo 'make demo    train 36 nano models and print their losses; takes some minutes'
	@echo 'make test    run the tests; PYTEST_ARGS="-k resume" chooses by name, PYTEST_ARGS="-m slow" runs the slow ones'
	@echo 'make faults  provoke every known fault, and print what was promised and what was seen; takes half an hour'
	@echo 'make check   run ruff and mypy'
	@echo 'make docs    build the documents into site/'
	@echo 'make release-check'
	@echo '             say whether this commit can be released: files that must agree, lint, types, documents, the wheel'

setup: $(VENV)/setup

$(VENV)/setup: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; set PYTHON=python3.11"; exit 1; }
	@echo "Installing PyTorch, the testbed and what figures need into $(VENV): 1.5 GB with a CPU build of PyTorch,"
	@echo "5.4 GB with the CUDA build that PyPI has for Linux. This takes some minutes, and only the first call does it."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[analysis,export]'
	@touch $@

# .venv/test, .venv/check and .venv/docs: the extra of that name is installed, on top of what a user needs.
$(VENV)/test $(VENV)/check $(VENV)/docs: $(VENV)/%: $(VENV)/setup
	@echo "Installing what \`make $*\` needs into $(VENV)"
	$(BIN)/pip install -q -c constraints.txt -e '.[$*]'
	@touch $@

demo: $(VENV)/setup
	scripts/demo.sh $(BIN)/python

test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile $(PYTEST_ARGS)

faults: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -p tests.faults.scorecard -m fault $(PYTEST_ARGS)

check: $(VENV)/check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy scaling_testbed

docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict

release-check: $(VENV)/check $(VENV)/docs
	$(BIN)/python scripts/release_check.py

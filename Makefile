# `make test` and `make bench` set themselves up: a virtual environment in $(VENV), pinned tools, the package built in place.
# In an environment that has torch, timm and the tools already: `make test PYTHON=python3 VENV=`.
PYTHON ?= python3
VENV ?= .venv
BENCH_ARGS ?= --quick
# pytest-xdist: a process per core; one that has run its tests takes over some of another's.
PYTEST_ARGS ?= -n logical --maxprocesses 8 --dist worksteal

ifeq ($(strip $(VENV)),)
RUN := $(PYTHON)
STAMPS := build
else
RUN := $(VENV)/bin/python
STAMPS := $(VENV)
endif

SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: env test lint format bench clean
.DELETE_ON_ERROR:

env: $(STAMPS)/.package-installed

ifeq ($(strip $(VENV)),)
$(STAMPS)/.requirements-installed:
	@$(RUN) -c "import torch, pybind11, ninja" || { echo "VENV= uses $(PYTHON) as it is: it needs torch, pybind11, ninja"; exit 1; }
	@mkdir -p $(STAMPS) && touch $@
else
$(STAMPS)/.requirements-installed: requirements-dev.txt
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { echo "Debian/Ubuntu: apt-get install python3-venv"; exit 1; }
	$(RUN) -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	@touch $@
endif

$(STAMPS)/.package-installed: $(STAMPS)/.requirements-installed $(SOURCES)
	$(RUN) -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	@touch $@

test: env lint
	$(RUN) -m pytest $(PYTEST_ARGS)

lint: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: env
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

bench: env
	$(RUN) -m benchmarks $(BENCH_ARGS)

clean:
	rm -rf build dist *.egg-info nfnets_kernels/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# `make test` and `make bench` set themselves up: a virtual environment in $(VENV), pinned tools, the package built in place.
# In an environment that has torch, timm and the tools already: `make test PYTHON=python3 VENV=`.
# `make dist` builds sdist and wheel; `make dist-check TORCH=2.11.0` tries them beside that torch, in a fresh environment.
PYTHON ?= python3
VENV ?= .venv
BENCH_ARGS ?= --quick
TORCH ?= 2.11.0
EXTRAS ?= bench,timm,lightning
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
PACKAGED := $(SOURCES) MANIFEST.in LICENSE README.md CHANGELOG.md CITATION.cff tests/smoke.py \
	$(shell find nfnets_kernels -name '*.py')

.PHONY: env test lint format bench campaign docs dist dist-check clean
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

# The robustness campaign of docs/robustness.md: most of an hour on 2 cores; CAMPAIGN_ARGS="--examples 200" is shorter.
campaign: env
	$(RUN) -m tests.campaign $(CAMPAIGN_ARGS)

# Into build/docs. The variable silences what mkdocs-material has to say about its future.
docs: env
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

dist: dist/.built

# The wheel is built from the unpacked sdist, so that one that lacks a file does not pass.
dist/.built: $(STAMPS)/.requirements-installed $(PACKAGED)
	rm -rf dist
	$(RUN) -m build
	@touch $@

dist-check: dist/.built
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && $(RUN) -m venv "$$folder" && \
	python="$$folder/bin/python" && wheel="$$(echo dist/*.whl)[$(EXTRAS)]" && \
	"$$python" -m pip install --disable-pip-version-check -q "torch==$(TORCH)" "$$wheel" && \
	"$$python" -m pip check && \
	"$$python" tests/smoke.py

clean:
	rm -rf build dist *.egg-info nfnets_kernels/_C*.so nfnets_kernels/_cuda*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

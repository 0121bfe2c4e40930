# Set-up, demo, tests and the three usual ways to train. `make` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where pip finds a CPU build of torch on a machine without an accelerator (on the main index of Linux packages the same
# version is the CUDA build, several GB larger). Set it empty to use your own index alone.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

MODEL ?= tiny
DATA ?= demo
NPROC ?=
NAME ?=
ARGS ?=
RUN ?= runs/demo/zero2
RUNS ?= $(sort $(dir $(wildcard runs/demo/*/manifest.json)))
LOGDIR ?= runs

# TensorBoard looks into hidden folders too: where something was replaced, the runs are named one by one.
comma := ,
space := $() $()
trashed = $(shell find $(LOGDIR) -name .trash -print 2>/dev/null)
kept = $(patsubst ./%,%,$(shell cd $(LOGDIR) && find . -name .trash -prune -o -name tensorboard -type d -print))
spec = $(subst $(space),$(comma),$(foreach run,$(kept),$(run):$(abspath $(LOGDIR))/$(run)))
curves = $(if $(trashed),--logdir_spec "$(spec)",--logdir $(LOGDIR))

# DATA is the name of a shipped choice or of any entry of data/dataset_info.json.
data_choice = $(if $(wildcard configs/hydra/data/$(1).yaml),data=$(1),data=registry 'data.names=[$(1)]')
train = $(BIN)/tunewright train model=$(MODEL) $(call data_choice,$(DATA)) $(if $(NPROC),cluster.num_processes=$(NPROC)) \
	$(if $(NAME),name=$(NAME)) $(1) $(ARGS)

.PHONY: help setup demo test test-chaos test-slow test-gpu test-versions gpu-check gpu-rehearsal docs-check lint datagen check zero2 zero3 single compare tensorboard chat bench bench-check bench-zero bench-memory bench-pace bench-start bench-data bench-datagen clean

help:  ## list the targets
	@echo "make TARGET [MODEL=tiny] [DATA=demo] [NPROC=2] [NAME=my-run] [ARGS=\"key=value ...\"]"
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.ready  ## create .venv and install the pinned, tested versions

$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no '$(PYTHON)': install Python 3.10 or newer, or write PYTHON=/path/of/it."; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "$(PYTHON) is $$($(PYTHON) --version): Python 3.10 or newer is needed, write PYTHON=/path/of/it."; exit 2; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if ls /dev/nvidia[0-9]* /dev/kfd >/dev/null 2>&1 || [ -z "$(TORCH_INDEX)" ]; then extra=""; \
	else extra="--retries 1 --extra-index-url $(TORCH_INDEX)"; fi; \
	echo "Installing torch (a CPU build where there is no accelerator)"; \
	$(BIN)/pip install -qq --disable-pip-version-check $$extra -c constraints.txt torch \
		2> >(grep -v "^WARNING: Retrying" >&2)
	@echo "Installing the pinned stack and tunewright (1 to 3 minutes)"
	@$(BIN)/pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
	@echo "Ready: $$($(BIN)/python -c 'from importlib.metadata import version as v; print(", ".join(p + " " + v(p) for p in ("torch", "transformers", "trl", "peft", "deepspeed", "bitsandbytes")))')"

demo: setup  ## train the shipped task with ZeRO-2, ZeRO-3 and QLoRA, compare them, ask base and tuned model
	@$(BIN)/tunewright demo

test: lint  ## lint, then the tests that CI runs: on CPU, without network
	$(BIN)/python -m pytest -m "not gpu and not slow and not chaos" $(ARGS)

test-chaos: setup  ## faults at random for an hour, each run started again until done: make test-chaos CHAOS_SECONDS=600
	$(BIN)/python -m pytest -m chaos -s $(ARGS)

test-slow: setup gpu-rehearsal  ## the rest of the support table, two steps with every setting at its extremes, the GPU kit rehearsed
	$(BIN)/python -m pytest -m slow $(ARGS)

test-gpu: setup  ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

test-versions: setup  ## tests on the oldest and the newest versions of the window, in environments of their own
	$(BIN)/python tests/versions.py $(ARGS)

gpu-check:  ## measure on a GPU, without network, in eight minutes; results in $$OUT or gpu-check/
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench/gpu/check.py $(ARGS)

gpu-rehearsal: setup  ## gather the wheels that a GPU machine lacks, and run the kit with small shapes on torch 2.11
	$(BIN)/python bench/gpu/rehearse.py $(ARGS)

docs-check: setup  ## run every command of README.md and docs/ in a copy: make docs-check ARGS="docs/data.md --keep"
	$(BIN)/python -m tests.docs_check $(ARGS)

lint: setup  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/python bench/rooms.py $(VENV)/rooms
	$(BIN)/mypy

datagen: setup  ## a dataset from a description: make datagen TASK="..." N=100 NAME=riddles
	$(BIN)/tunewright datagen task="$(TASK)" $(if $(NAME),name=$(NAME)) $(if $(N),examples=$(N)) $(ARGS)

check: setup  ## look at data before training on it: make check DATA=demo
	$(BIN)/tunewright data check model=$(MODEL) $(call data_choice,$(DATA)) $(ARGS)

zero2: setup  ## train on all GPUs (or 2 CPU ranks) with ZeRO-2
	$(call train,strategy=zero2)

zero3: setup  ## train on all GPUs (or 2 CPU ranks) with ZeRO-3
	$(call train,strategy=zero3)

single: setup  ## train on one device with QLoRA
	$(call train,strategy=single method=qlora)

compare: setup  ## table, curves and HTML page: make compare RUNS="runs/a runs/b"
	$(BIN)/tunewright compare $(RUNS)

tensorboard: setup  ## open the curves of every run under LOGDIR
	$(BIN)/tensorboard $(curves)

chat: setup  ## ask base and tuned model the same questions: make chat RUN=runs/demo/zero2
	$(BIN)/tunewright chat $(RUN)

bench: setup  ## training speed beside TRL, Trainer and, with PEER_PYTHON=its python, LLaMA-Factory: make bench ARGS=--docs
	$(BIN)/python bench/train.py $(ARGS)

bench-check: setup  ## whether a ratio of the newest bench result is below that of the last committed one
	$(BIN)/python bench/report.py check

bench-zero: setup  ## what ZeRO-3 costs beside ZeRO-2, and which settings of DeepSpeed lower it
	$(BIN)/python bench/zero.py $(ARGS)

bench-memory: setup  ## the most that a rank holds in memory, beside what is planned: make bench-memory ARGS="--only tiny,lora"
	$(BIN)/python bench/memory.py $(ARGS)

bench-pace: setup  ## steps a second as planned, as planned after measuring, and of a run then
	$(BIN)/python bench/pace.py $(ARGS)

bench-start: setup  ## how long --help, an error and the first optimiser step take, and where the time goes
	$(BIN)/python bench/start.py $(ARGS)

bench-data: setup  ## tokenising 100,000 rows beside datasets.map, and LLaMA-Factory with PEER=its virtual environment
	$(BIN)/python bench/data.py $(if $(PEER),--peer $(PEER)) $(ARGS)

bench-datagen: setup  ## datagen at 64 requests in flight beside one after the other, and its selection at 20,000 rows
	$(BIN)/python bench/datagen_rate.py $(ARGS)
	$(BIN)/python bench/datagen_select.py

clean:  ## remove tool caches; runs, .venv and the cache of models and tokens stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache

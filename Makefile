# What people and CI call. Each target makes .venv itself when it is missing or older than pyproject.toml.
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest --numprocesses auto --dist loadscope --no-loadscope-reorder
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY := true
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := 1

.PHONY: demo test nightly gpu check bench faults clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo "make demo    personalise the demo subjects on the bundled model (minutes, no GPU, no network)"
	@echo "make test    pass the tests"
	@echo "make nightly pass these and the tests that take minutes each"
	@echo "make gpu     pass the tests of what a GPU alone does"
	@echo "make check   style and types"
	@echo "make bench   time and memory of the whole recipe; REFERENCE=train_dreambooth.py compares with diffusers' script"
	@echo "make faults  every fault and threat with the tests that prove it"

demo: .venv/ready          ## photos -> evaluated, exported and registered model
	$(BIN)/dreambooth run

test: .venv/ready          ## real servers, processes and kills too
	$(PYTEST)

nightly: .venv/ready       ## these, and the ones that take minutes each
	$(PYTEST) -m ""

gpu: .venv/ready           ## in a process of its own: all other tests hide the GPU
	$(BIN)/python -m pytest -m gpu tests/test_gpu.py

check: .venv/ready         ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready         ## benchmarks/results/<date>-<hardware>.md; more options: BENCH="--steps 200 --repeats 5"
	$(BIN)/python -m benchmarks.bench $(if $(REFERENCE),--reference $(REFERENCE)) $(BENCH)

faults: .venv/ready        ## docs/faults.md from the marks of the tests
	$(BIN)/python tests/faults.py --write

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[base,dev]'
	touch $@

clean:                     ## what a run makes; photos, caches of class images and .venv stay
	rm -rf build models export metrics reports .scratch

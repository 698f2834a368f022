# `make` alone prints this help. `make demo` and `make test` each work on a fresh clone.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# A CPU-only machine may want: make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# One thread per process: the tests run in parallel and start several ranks each.
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
FUZZ ?= models=2000 tokens=4000 graphs=4000 layouts=10000
.PHONY: help setup demo test check support fuzz mutation bench bench-report bench-gpu notebooks clean

help:  ## print this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv and install everything (instant when it stands)

# torch goes first, by its exact version: what follows accepts it and does not replace it.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[hf,viz,dev]'
	@touch $@

demo: setup  ## train a small Llama dense and on 2 ranks, compare the two, write pictures to demo-output/
	$(BIN)/autosp-ir demo

test: setup  ## run every test (ARGS='tests/ir -k text' for some of them, ARGS='-m long' for the rest of grids)
	$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: setup  ## lint, format, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

support: setup  ## examine every architecture of the tests and write docs/support.md (minutes)
	$(ONE_THREAD) $(BIN)/python -m tests.doctor.support_page

fuzz: setup  ## go on with the recorded fuzzing run (hours on one core; FUZZ='layouts=1000' for less)
	$(ONE_THREAD) $(BIN)/python -W ignore -m tests.fuzz $(FUZZ) --record benchmarks/results/fuzz.json --resume

mutation: setup  ## break each layout rule and each check of the verifier, and count what the tests notice
	$(ONE_THREAD) $(BIN)/python -W ignore -m tests.mutation --json benchmarks/results/mutation.json $(ARGS)

bench: setup  ## time capture, passes and steps on this machine
	$(BIN)/python -m benchmarks

bench-report: setup  ## record a 32-layer Llama and time its report in Chromium
	$(BIN)/python -m benchmarks.report_speed

bench-gpu:  ## time one training step on two GPUs beside Ulysses by hand (ARGS='--modes ours,ring'; CUDA torch in python3)
	PYTHONPATH=.:passes python3 -m benchmarks.gpu_step $(ARGS)

notebooks: setup  ## execute every notebook; the results go to build/notebooks/
	$(BIN)/python -m pip install --quiet --editable '.[notebooks]'
	$(BIN)/jupyter nbconvert --to notebook --execute --output-dir build/notebooks notebooks/*.ipynb

clean:  ## remove .venv, caches and what the demo wrote
	rm -rf .venv .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist demo-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

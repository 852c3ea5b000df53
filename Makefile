# Two commands: `make serve` and `make test`. Everything lands in .venv.
# WORKERS=8 make test: eight processes run the tests, with one thread each.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help serve test quick portable check format docs mini generator clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

serve: $(VENV)/.runtime  ## start the service on the bundled checkpoint (DRORAE_* variables pass through)
	@exec $(BIN)/drorae serve

test: $(VENV)/.dev  ## run the tests
	$(PYTEST) -n $(WORKERS) --dist loadfile

quick: $(VENV)/.dev  ## run the tests that start no process and take no seconds
	$(PYTEST) -n $(WORKERS) --dist loadfile -m "not slow"

# As a CPU with AVX2 and no AVX-512 computes: PyTorch's kernels, oneDNN, MKL, and NumPy's OpenBLAS, by which
# Triton's interpreter multiplies.
AVX2_ONLY := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	OPENBLAS_CORETYPE=Haswell
NUMERICAL := tests/kernels/test_reference.py tests/kernels/test_folded.py tests/kernels/test_fused.py \
	tests/model/networks tests/model/test_tokenizer.py \
	tests/training/test_losses.py tests/training/distributed/test_ranks.py

portable: $(VENV)/.dev  ## run the numerical tests on AVX2 alone
	$(AVX2_ONLY) $(PYTEST) $(NUMERICAL)

check: $(VENV)/.dev  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite the sources in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.runtime  ## write the pages that are generated from the code
	$(BIN)/python docs/serving/settings.py > docs/serving/settings.md

mini: $(VENV)/.dev  ## retrain the bundled checkpoint (DRORAE_DATA names the image packs)
	PYTHON=$(BIN)/python training/recipes/mini/train.sh

generator: $(VENV)/.dev  ## retrain the bundled generator of samples, and measure it (DRORAE_DATA too)
	PYTHON=$(BIN)/python training/recipes/mini/generator.sh

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(VENV)/.runtime: requirements.lock pyproject.toml client/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.lock
	$(PIP) --no-deps --no-build-isolation --editable . --editable client
	touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.runtime
	$(PIP) -r requirements-dev.lock
	touch $@

# make demo, make test, make test-fast, make check, make docs: each makes .venv first if it is not there.
PYTHON ?= python3
export OMP_WAIT_POLICY = PASSIVE
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export PYTHONDONTWRITEBYTECODE =  # where it is set, as in many containers, every process would compile what it imports

.PHONY: demo test test-fast check docs test-matrix test-latest test-models test-serve bench proof gpu clean

.venv/ready: pyproject.toml setup.py constraints-cpu.txt $(wildcard kernels/c/*)
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip  # of 2025 it resolves in half the time of one of 2023
	PYTHONWARNINGS=ignore .venv/bin/python -m pip install --quiet --no-compile --constraint constraints-cpu.txt --editable '.[dev]'  # of 18,000 files a third is ever imported
	touch $@

demo: .venv/ready
	.venv/bin/compress demo

test: .venv/ready
	.venv/bin/python -m pytest -n auto --dist worksteal

# Without the tests that take more than about a second or start processes.
test-fast: .venv/ready
	.venv/bin/python -m pytest -n auto --dist worksteal -m "not slow"

check: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# README, CONTRIBUTING, docs/, the format, every command and the Python API as a site, in site/.
docs: .venv/ready
	.venv/bin/python -m pip install --quiet --constraint constraints-cpu.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

# Every type of models that transformers has, tiny, with all work: a quarter of an hour. CI has a sample (tests/compress/test_models.py).
test-models: .venv/ready
	.venv/bin/python -m tests.every

# The round-trip tests on transformers 5.0, a middle version and the latest, each in an environment of its own.
test-matrix:
	$(PYTHON) tests/matrix.py

# For a scheduler: the older releases, then the whole suite with the newest of everything. Fails if anything does.
# PIP_CONSTRAINT=constraints-cpu.txt keeps torch where it is.
test-latest:
	$(PYTHON) tests/matrix.py 5.0.0 5.10.1 upgraded

# A real vLLM on the CPU, in an environment of its own: engines, and servers with real clients. Five minutes, and five more the first time.
test-serve:
	$(PYTHON) tests/serving/environment.py

# Compile every GPU kernel for GPUs that need not be there, and hold its machine code to its budget.
proof: .venv/ready
	.venv/bin/python tests/kernels/static.py --full

# On a machine with a GPU, with the torch and Triton of PYTHON=...: prove, measure and tune in nine minutes, into runs/gpu.
# What it loads, runs/gpu-model, can be made anywhere.
gpu: runs/gpu-model
	$(PYTHON) -m compress.evals.bench.gpu --model runs/gpu-model

GPU_MODEL = {"model": "builtin", "passes": [{"kind": "any_precision", "objective": "weight", "sensitivity": "none"}]}
runs/gpu-model:
	$(MAKE) .venv/ready
	.venv/bin/python -c 'import compress; compress.run($(GPU_MODEL), "$@")'

bench: .venv/ready
	.venv/bin/python -m compress.evals.bench quantiser
	.venv/bin/python -m compress.evals.bench memory
	.venv/bin/python -m compress.evals.bench cpu

clean:
	rm -rf .venv .venv-matrix .venv-serve runs site build *.egg-info kernels/_bitplane.so

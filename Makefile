.DEFAULT_GOAL := help
.PHONY: help install serve test check lint bench clean

VENV ?= .venv
PORT ?= 8000
CONFIG ?=
PYTEST_FLAGS ?=

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## Create .venv with everything that serving needs
	@./install.sh $(VENV) worker

serve: install ## Serve the built-in model, or CONFIG=galley.yaml, on PORT=8000
	@$(VENV)/bin/galley serve $(CONFIG) --port $(PORT)

test: ## Install what tests need and run them all
	@./install.sh $(VENV) dev
	$(VENV)/bin/pytest --cov --cov-report=term $(PYTEST_FLAGS)

lint: ## Check style, types and the arrows between packages
	@./install.sh $(VENV) dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

check: lint test ## Everything that a change must pass

bench: ## Measure what loadtest/bench_serve.py measures, quickly
	@./install.sh $(VENV) dev
	$(VENV)/bin/python loadtest/bench_serve.py --quick

clean: ## Remove the virtual environment and caches of tools
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage htmlcov

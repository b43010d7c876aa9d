# `make demo` runs the main job, `make test` lint, types and tests, `make docs` builds site/; each sets itself up on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
WORKERS ?= 2
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: setup demo docs test
setup: $(STAMP)

demo: $(STAMP)
	$(BIN)/ppo-rlhf demo $(ARGS)

docs: $(STAMP)
	$(BIN)/zensical build --clean --strict

test: export OMP_NUM_THREADS = 1
test: export HF_HUB_OFFLINE = 1
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --cov --cov-report= $(ARGS)
ifeq ($(strip $(ARGS)),)
	$(BIN)/coverage report --show-missing --fail-under=100 --include='ppo_rlhf/core/*,ppo_rlhf/update.py'
endif

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

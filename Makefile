# The README's commands. `make demo` and `make test` need only Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test processes. The tests of a file run in order in one of them; most start one more process, some two.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-slow lint table clean

$(BIN)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' $(PIP_OPTIONS)
	touch $@

demo: $(BIN)/.installed  ## train the quickstart's four stages and question the model about images it never saw
	$(BIN)/python -m vlmtrain.train recipe=quickstart $(ARGS)

test: $(BIN)/.installed  ## all tests but the slow ones
	$(PYTEST)

test-slow: $(BIN)/.installed  ## all tests
	$(PYTEST) --slow

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

table: $(BIN)/.installed  ## measure connectors, exports and imports against their references and update the tables
	$(BIN)/python benchmarks/connector_table.py --write docs/connectors.md
	$(BIN)/python benchmarks/parity_table.py --write docs/recipes.md

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache

BIN := $(or $(LORA_MS_VENV),.venv)-test/bin

.PHONY: check quick format test quickstart setup

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	bash scripts/test.sh

# What takes less than two minutes: lint, types, and tests of the folders that compile few graphs.
QUICK := tests/test_structure.py tests/test_cli_flags.py tests/config tests/data tests/hostile \
	tests/commands/test_command_line.py tests/commands/test_bad_input.py

quick: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	bash scripts/test.sh -q -m "not slow" $(QUICK)

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test:
	bash scripts/test.sh

quickstart:
	bash scripts/quickstart.sh

setup:
	@bash scripts/test.sh --setup

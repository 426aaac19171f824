BIN := $(or $(LORA_MS_VENV),.venv)-test/bin

.PHONY: check format test quickstart setup

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	bash scripts/test.sh

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test:
	bash scripts/test.sh

quickstart:
	bash scripts/quickstart.sh

setup:
	@bash scripts/test.sh --setup

# Two commands do all the set-up: `make demo` and `make test`. `make lint` is what CI runs besides.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/installed
	@$(BIN)/python models/tiny-llava/scenes.py demo/pictures --seed 5 --count 1 > /dev/null
	@$(BIN)/local-llava convert models/tiny-llava --quant Q4_K_M -o demo --force
	@echo "picture:  demo/pictures/0000.png"
	@echo "question: What do you see?"
	@printf "answer:   "; $(BIN)/local-llava ask --model demo demo/pictures/0000.png "What do you see?"

# Several files of tests at a time. Threads of OpenMP that wait would otherwise spin on the cores that the others need.
test: $(VENV)/installed-dev
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# mypy does not follow the mapping of convert/ into the package in an editable install, so it reads what a wheel installs.
lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types build/lib && $(BIN)/pip install --quiet --no-deps --target build/types .
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p local_llava

$(VENV)/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

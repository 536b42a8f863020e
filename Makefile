# Every target sets up what it needs in a virtual environment: only python3, make and git have to
# be there. `make test PYTEST_ARGS="tests/cli -x"` runs some of the tests.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?= -n auto --maxprocesses 8 --dist loadfile
PROMPT ?= a large yellow star moving up on a striped dark blue background

BIN := $(VENV)/bin
READY := $(VENV)/.installed

.PHONY: demo app browser eval test test-oldest lint format docs docs-serve bench wheel clean

$(READY): pyproject.toml $(CONSTRAINTS)
	@echo "Setting up $(VENV): a few minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint $(CONSTRAINTS)
	@touch $@

demo: $(READY)  ## one video twice, dense and accelerated
	$(BIN)/dit-accel generate "$(PROMPT)" --model tiny-wan --method easycache \
		--compare --output outputs/demo.mp4 --force

app: $(READY)  ## the page in the browser, on http://127.0.0.1:7860
	$(BIN)/python app.py

# Tests of the page are skipped where this can't be done: it needs root and Debian's packages.
browser:  ## install chromium for the tests of the page, if it is missing
	@if command -v chromium >/dev/null; then echo "chromium is there"; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium \
			|| echo "chromium could not be installed: tests of the page will be skipped"; \
	else echo "chromium is missing: install it as root; tests of the page will be skipped"; fi

# Some ten minutes on two CPU cores. Blocks are small because the default model has only 2304
# tokens. benchmarks/standard.py measures all methods and models, on a GPU.
eval: $(READY)  ## what methods cost in quality, on a few prompts, with a report
	$(BIN)/dit-accel eval --methods radial,gna --density 0.6 --block-size 32 --prompts 2 \
		--device cpu --output outputs/eval

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-oldest:  ## the same tests with the oldest supported diffusers and transformers
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=constraints-oldest.txt

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)  ## the documentation, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(READY)  ## the documentation, on http://127.0.0.1:8000
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: $(READY)  ## the kernels beside their peers; needs a CUDA GPU to mean anything
	$(BIN)/dit-accel bench kernel --output outputs/kernel.json

wheel: $(READY)
	$(BIN)/python -m build --wheel --no-isolation

clean:
	rm -rf build dist outputs site $(VENV) $(VENV)-oldest .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

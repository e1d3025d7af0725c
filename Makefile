# make demo   compress the bundled model, ask it about a picture      make test   lint, types, every test
# make serve  Cog's HTTP server without Docker (PORT=5000)            make train  train the bundled model again
#
# PYTHON=python3.12         another interpreter (3.11 or 3.12)
# TORCH_INDEX=https://…     take torch from this package index, e.g. one with CPU-only builds
# WORKERS=2                 processes that share the tests, but for those that promise seconds or ratios

PYTHON ?= python3
PORT ?= 5000
RECIPE ?= small-int8-pruned
WORKERS ?= 2
QUESTION ?= Describe the picture.
PICTURE ?= examples/chart.png
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint types unit serve train setup clean

setup: $(READY)

$(READY): requirements-cpu.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' requirements-cpu.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

demo: setup
	$(BIN)/python -m gemma_opt compress $(RECIPE)
	@echo '> $(QUESTION)  ($(PICTURE))'
	@$(BIN)/python -m gemma_opt predict $(RECIPE) -i prompt='$(QUESTION)' -i image=@$(PICTURE) -i temperature=0

test: lint types unit

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

unit: export OMP_NUM_THREADS ?= 1
unit: setup
	$(BIN)/python -m pytest -m 'not timed' --numprocesses $(WORKERS) --dist worksteal
	$(BIN)/python -m pytest -m timed

serve: setup
	$(BIN)/python -m gemma_opt serve --port $(PORT)

train: setup
	$(BIN)/python scripts/train_small_gemma.py --out build/small-gemma3-first
	$(BIN)/python scripts/train_small_gemma.py --start-from build/small-gemma3-first --work build/small-gemma3-second \
		--steps 600 --learning-rate 5e-4 --seed 1 --more-shapes 0.6

clean:
	rm -rf .venv .cog build .pytest_cache .ruff_cache

# Every target works on a fresh machine with Python 3.11 and pip: the virtual environment is made on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test check bench upstream style

demo: $(READY)
	$(BIN)/mimo demo --text README.md --image examples/media/chart.png --video examples/media/clip_with_sound.mp4 \
	  --audio examples/media/speech.wav --audio examples/media/sweep.ogg

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mlinter --no-progress --no-cache modeling_mimo processors
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python benchmarks/run_all.py

# Transformers' own test mixins, from its source distribution; writes docs/upstream-tests.md
upstream: $(READY)
	$(BIN)/python tests/upstream/run.py

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

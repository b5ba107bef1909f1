# Every target works on a fresh machine with Python 3.11 and pip: the virtual environment is made on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

# the oldest line of Transformers that setup.cfg allows has an environment of its own
OLDEST := .venv-oldest
# what touches Transformers: loading, cache, generation, MTP, pipelines, server, Trainer, export
TOUCHES_TRANSFORMERS := $(addprefix tests/test_,adapters.py bitsandbytes.py cache_mimo_v2.py cli_serve.py compile.py \
  export_code.py fp8.py generation_mtp_mimo_v2.py loading.py micro.py modeling_mimo_v2.py modeling_mimo_v2_mtp.py \
  messages_mimo_v2.py mtp_training.py multimodal.py offload.py parallel.py pipelines.py refusals.py structure.py \
  switches.py training_collator.py training_lora.py training_trainer.py training_trl.py unknown_names.py \
  unknown_processor_names.py versions.py)

# where `make micro` keeps its stages; each is made once, a stopped one goes on where it was
RUNS := build/micro
RECIPE := examples/micro
# one for each core, or for each GPU where there are some
PROCESSES := 2
TORCHRUN := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node $(PROCESSES)

PYTEST := python -m pytest -n logical --maxprocesses 8 --dist worksteal

.PHONY: demo test test-oldest test-oldest-touched check bench upstream style micro

demo: $(READY)
	$(BIN)/mimo demo --image examples/media/chart.png --video examples/media/clip.mp4 \
	  --video examples/media/clip_with_sound.mp4 --audio examples/media/speech.wav --audio examples/media/sweep.ogg

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST)

test-oldest: $(OLDEST)/ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/$(PYTEST)

# the part of `make test-oldest` that CI runs
test-oldest-touched: $(OLDEST)/ready
	OMP_NUM_THREADS=1 $(OLDEST)/bin/$(PYTEST) $(TOUCHES_TRANSFORMERS)

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

# trains MiMo-Micro from nothing, about two hours on two cores, and puts it in the place of the shipped one
micro: $(RUNS)/heads/config.json
	$(BIN)/python $(RECIPE)/release.py $(RUNS)/heads modeling_mimo/data/micro
	OMP_NUM_THREADS=2 $(BIN)/mimo bench --micro --count 200 --precision fp8,nf4 --compare $(RUNS)/bf16 --mtp --json \
	  > $(RUNS)/scores.json
	$(BIN)/python $(RECIPE)/release.py $(RUNS)/heads modeling_mimo/data/micro --scores $(RUNS)/scores.json

$(RUNS)/codec/config.json: | $(READY)
	OMP_NUM_THREADS=2 $(BIN)/python $(RECIPE)/train_codec.py $(@D)

$(RUNS)/untrained/config.json: $(RUNS)/codec/config.json
	$(BIN)/python $(RECIPE)/build.py $(<D) $(@D)

$(RUNS)/towers/config.json: $(RUNS)/untrained/config.json
	OMP_NUM_THREADS=2 $(BIN)/python $(RECIPE)/train_towers.py $(<D) $(@D)

$(RUNS)/trunk/config.json: $(RUNS)/towers/config.json
	$(TORCHRUN) $(RECIPE)/train.py trunk $(<D) $(@D)

$(RUNS)/heads/config.json: $(RUNS)/trunk/config.json
	$(TORCHRUN) $(RECIPE)/train.py heads $(<D) $(@D)

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): constraints.txt
$(OLDEST)/ready: constraints-oldest.txt

.venv/ready .venv-oldest/ready: %/ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --quiet --upgrade pip
	$*/bin/python -m pip install --quiet --constraint $(filter constraints%,$^) torch
	$*/bin/python -m pip install --quiet --constraint $(filter constraints%,$^) --editable ".[dev]"
	touch $@

# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TRL    := .venv-trl
VERL_ENV := .venv-verl
BROWSER := $(VENV)/.browser
LOWEST  := 5.0.0
HIGHEST := 5.24.0
LOWEST_READY  := .venv-transformers-$(LOWEST)/.ready
HIGHEST_READY := .venv-transformers-$(HIGHEST)/.ready
RANGE_TESTS := $(addprefix tests/test_,policy.py prefix.py sampling.py decoding.py episodes.py critic.py \
	critic_vocabulary.py embedded.py checkpoint.py trainer.py vllm_sampler.py lora.py)
DOCS   := $(VENV)/.docs

.PHONY: setup demo test test-all test-browser test-verl test-ranges docs site pictures bench bench-gpu bench-trl faults results \
        lint format wheel-test learns clean

# The set-up is one pinned environment; it is remade when the pins change.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(BROWSER): $(READY) tests/browser/install
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[browser]'
	tests/browser/install $(BIN)/python
	touch $@

# The environment alone.
setup: $(READY)

# The second line shows the report of a study from its committed results; nothing is trained for it.
demo: $(READY)
	$(BIN)/dvpo demo
	$(BIN)/dvpo report configs/studies/mini.yaml --results benchmarks/results/mini_study.jsonl --output runs/mini-study.html

# A file of tests stays with one worker, each test on one thread: `make test WORKERS=8` on a larger machine.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test: $(READY) lint
	$(PYTEST) -m "not slow"

test-all: $(READY) lint test-browser site
	$(PYTEST)

# The report in a headless Chromium, which is installed if the machine has none.
test-browser: $(BROWSER)
	$(BIN)/python -m pytest tests/browser

$(DOCS): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# The pages' links, commands, settings and blocks of code, then the site: site/index.html opens from the disk.
docs: $(DOCS)
	$(BIN)/python -m pytest tests/test_docs.py
	$(MAKE) site

# A warning of Sphinx, such as a dead link, is an error.
site: $(DOCS)
	rm -rf site docs/reference
	$(BIN)/python -m sphinx -b html -q -E -W --keep-going docs site
	$(BIN)/python -m pytest tests/site

# Those of the method, drawn from its own functions; what is committed is what the pages show.
pictures: $(DOCS)
	$(BIN)/python docs/site/pictures.py

# The plug-in for verl, in an environment of its own: real Ray workers on a CPU. Against verl's main:
# `make test-verl VERL=git+https://github.com/verl-project/verl`; nothing depends on that.
$(VERL_ENV)/.ready: pyproject.toml requirements/verl.txt
	$(PYTHON) -m venv $(VERL_ENV)
	$(VERL_ENV)/bin/pip install --quiet --disable-pip-version-check -c requirements/verl.txt torch
	$(VERL_ENV)/bin/pip install --quiet --disable-pip-version-check -r requirements/verl.txt
	$(VERL_ENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# A canary puts another verl there, and the pinned one comes back the next time.
test-verl: $(VERL_ENV)/.ready
	$(if $(VERL),rm $< && $(VERL_ENV)/bin/pip install --quiet --no-deps --force-reinstall '$(VERL)')
	$(VERL_ENV)/bin/python -m pytest tests/with_verl --timeout 900

bench: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/quantile_loss.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/gae.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/growth.py

# For a machine with a GPU and a CUDA build of torch.
bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py

# TRL has an environment of its own, with our torch and transformers.
$(TRL)/.ready: requirements/trl.txt constraints.txt
	$(PYTHON) -m venv $(TRL)
	$(TRL)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch transformers
	$(TRL)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements/trl.txt
	touch $@

bench-trl: $(READY) $(TRL)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/step_against_trl.py --trl-python $(TRL)/bin/python

# The tests that touch transformers, at both ends of its range, each in an environment of its own (docs/dependencies.md).
test-ranges: $(LOWEST_READY) $(HIGHEST_READY)
	$(dir $(LOWEST_READY))bin/python -m pytest -m "not slow" $(RANGE_TESTS)
	$(dir $(HIGHEST_READY))bin/python -m pytest -m "not slow" $(RANGE_TESTS)

.venv-transformers-%/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(dir $@)
	grep -viE '^(transformers|tokenizers|huggingface_hub|hf-xet|safetensors|typer)==' constraints.txt > $(dir $@)constraints.txt
	$(dir $@)bin/pip install --quiet --disable-pip-version-check -c $(dir $@)constraints.txt torch
	$(dir $@)bin/pip install --quiet --disable-pip-version-check -c $(dir $@)constraints.txt transformers==$* -e '.[dev]'
	touch $@

# What a run survives, experiment by experiment; some minutes each on 2 cores (docs/faults.md).
faults: $(READY)
	$(BIN)/python benchmarks/faults/kills.py
	$(BIN)/python benchmarks/faults/signals.py
	$(BIN)/python benchmarks/faults/damage.py
	$(BIN)/python benchmarks/faults/endurance.py
	$(BIN)/python benchmarks/faults/rewards.py
	$(BIN)/python benchmarks/faults/nonfinite.py
	$(BIN)/python benchmarks/faults/fuzz.py

# Does it learn? Five seeds, two algorithms, two settings of the checker dial; about half an hour on 2 cores.
learns: $(READY)
	$(BIN)/python benchmarks/learns.py

# Tables and figures of docs/results.md from the committed rows; nothing is trained.
results: $(READY)
	$(BIN)/python benchmarks/noise_results.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(TRL) $(VERL_ENV) .venv-transformers-* build dist site docs/reference .mypy_cache .ruff_cache

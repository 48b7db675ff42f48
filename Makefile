# make demo | make test: each sets itself up in .venv on first use.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test coverage lint wheel lock notebooks papers clean

demo: $(READY)
	$(BIN)/pyro-vae demo

PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

test: $(READY)
	$(PYTEST)

# the same tests, traced: a fifth slower
coverage: $(READY)
	$(PYTEST) --cov --cov-report=term

# built, installed where nothing else is, and used from there
wheel: $(READY)
	rm -rf build
	VIRTUAL_ENV=$(VENV) $(BIN)/uv build --wheel --no-build-isolation --out-dir build/wheel
	$(PYTHON) -m venv build/empty
	VIRTUAL_ENV=build/empty $(BIN)/uv pip install --constraint requirements.lock build/wheel/*.whl
	cd build && empty/bin/pyro-vae demo --epochs 3 --digits 2 --out run --quiet
	cd build && empty/bin/pyro-vae report run --rows 2 --quiet

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

papers: $(READY)
	$(BIN)/python benchmarks/papers/list.py

notebooks: $(READY)
	$(BIN)/python benchmarks/notebooks.py

COMPILE := $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-header \
	--no-emit-index-url --no-annotate --extra flows --extra distributed pyproject.toml

lock: $(READY)
	$(COMPILE) --group dev -o requirements.lock
	$(COMPILE) --extra bench --constraint requirements.lock -o benchmarks/requirements.lock

$(READY): requirements.lock bootstrap.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pyro_vae needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r bootstrap.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --require-hashes -r requirements.lock
	VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .coverage .mypy_cache .pytest_cache .ruff_cache

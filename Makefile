# `make serve` and `make test` are the two commands; the rest is what they are made of.
PYTHON ?= python3
VENV := .venv
ENGINE := .venv-engine
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest

.PHONY: systemd test-systemd serve test check venv engine test-appliance test-e2e lock clean

serve: venv engine ## serve the demo model on http://127.0.0.1:8000 with the embedded engine
	$(VENV)/bin/spark-llm serve --profile demo

test: check test-appliance test-e2e ## everything that CI runs

check: venv ## lint and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test-appliance: venv ## the service's own tests; no engine is started
	$(PYTEST) tests/appliance

test-e2e: venv engine ## the main job with a real vLLM
	$(PYTEST) tests/e2e

venv: $(VENV)/.stamp ## the appliance and its test tools, from the hashed lock

$(VENV)/.stamp: tests/requirements.txt appliance/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; pass PYTHON=python3.x") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip --disable-pip-version-check install -q --require-hashes --only-binary=:all: -r tests/requirements.txt
	$(PY) -m pip --disable-pip-version-check install -q --no-deps --no-build-isolation -e appliance
	touch $@

systemd: venv ## systemd's own Python bindings, built from source (needs pkg-config and libsystemd-dev)
	$(PY) -m pip --disable-pip-version-check install -q --require-hashes --only-binary=:all: -r appliance/systemd/build.txt
	$(PY) -m pip --disable-pip-version-check install -q --require-hashes --no-build-isolation -r appliance/systemd/requirements.txt

test-systemd: venv engine systemd ## a real systemd as PID 1 in a container (root; tests/systemd/packages.txt names what it needs)
	$(PYTEST) tests/systemd

engine: ## vLLM's CPU build in an environment of its own
	appliance/engine/install.sh $(PYTHON) $(ENGINE)

lock: ## resolve all locks again (needs uv)
	appliance/engine/lock.sh
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-build \
	  appliance/pyproject.toml tests/requirements.in -o tests/requirements.txt

clean: ## remove both environments
	rm -rf $(VENV) $(ENGINE)

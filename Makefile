# tapfs: everything is one command. `make demo` shows it, `make test` proves it, `make bench` measures it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SANITIZED = build/sanitized
SOURCES = $(wildcard kernel/src/*.c kernel/src/*.h) kernel/build_engine.py
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: all demo test check suite sanitize bench clean system-build system-test

all: $(VENV)/.built

system-build:
	@scripts/system-packages build
system-test:
	@scripts/system-packages test

$(VENV)/.venv: pyproject.toml | system-build
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/install_requirements.py pyproject.toml
	touch $@

$(VENV)/.built: $(VENV)/.venv setup.py $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[fuse]'
	touch $@

demo: $(VENV)/.built
	@PATH="$(abspath $(BIN)):$$PATH" scripts/demo

# Lint, strict types, the suite, the suite's engine tests again under ASan and UBSan.
test: system-test $(VENV)/.built
	$(MAKE) --no-print-directory check suite sanitize

check: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python tapfs/kernel/build_engine.py --lint

suite: $(VENV)/.built
	$(BIN)/pytest -q --durations=10

sanitize: $(VENV)/.built
	$(BIN)/python tapfs/kernel/build_engine.py --sanitize $(SANITIZED)
	TAPFS_ENGINE_DIR=$(abspath $(SANITIZED)) ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD=$$($(CC) -print-file-name=libasan.so) $(BIN)/pytest -q tests/unit tests/property

bench: system-test $(VENV)/.built
	$(BIN)/python -m tests.bench $(BENCH)

clean:
	rm -rf build dist *.egg-info $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis kernel/*.so kernel/_engine.c kernel/*.o

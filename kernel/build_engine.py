"""Build the C engine as the cffi module `tapfs.kernel._engine`.

setup.py takes `ffibuilder` from here. As a script:

    python tapfs/kernel/build_engine.py                 build in place: kernel/_engine.abi3.so
    python tapfs/kernel/build_engine.py --sanitize DIR  the same with ASan and UBSan, into DIR
    python tapfs/kernel/build_engine.py --lint          our C under every warning; builds nothing

The tests run against a sanitized build so (tests/conftest.py loads it):

    TAPFS_ENGINE_DIR=DIR LD_PRELOAD="$(gcc -print-file-name=libasan.so)" \
        ASAN_OPTIONS=detect_leaks=0 python -m pytest
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import cffi

MODULE = "tapfs.kernel._engine"
LIBRARY = "_engine.abi3.so"

#: The repository, or an unpacked sdist, where `kernel` is a real folder below `tapfs`.
ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
#: Relative to it.
SOURCE_FOLDER = Path("tapfs/kernel/src")

#: The headers that Python sees: in each the declarations between the two cffi marks.
HEADERS = [
    *("engine/table_layout.h", "engine/engine.h", "engine/map_runs.h", "engine/bytes.h", "engine/references.h"),
    "copying/copying.h",
    *("serving/metrics.h", "serving/serving.h"),
    *("fuse/server.h", "nbd/nbd.h", "ublk/ublk.h", "vhost/vhost.h", "xen/xen.h"),
]

LIBRARIES = ["deflate", "ssl", "crypto", "z", "zstd", "pthread"]
FLAGS = ["-D_GNU_SOURCE", "-g", "-std=gnu11", "-fvisibility=hidden", "-Wall", "-Wextra"]
OPTIMIZED = ["-O2"]
SANITIZED = ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
#: For our own sources alone: what cffi generates was not written for these.
STRICT = ["-Wconversion", "-Wshadow", "-Wstrict-prototypes", "-Wpointer-arith", "-Werror"]

#: A header of all that the engine is compiled against, and the Debian package that brings it.
NEEDED = {
    "Python.h": "python3-dev",
    "libdeflate.h": "libdeflate-dev",
    "openssl/evp.h": "libssl-dev",
    "zlib.h": "zlib1g-dev",
    "zstd.h": "libzstd-dev",
}


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")


def _has_header(header: str) -> bool:
    of_python = [f"-I{folder}" for folder in {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}]
    command = [*_compiler(), *of_python, "-E", "-x", "c", "-o", os.devnull, "-"]
    text = f"#include <stddef.h>\n#include <{header}>\n"
    return subprocess.run(command, input=text, text=True, capture_output=True, check=False).returncode == 0


def require_headers() -> None:
    """End with one line that says what to install when the engine cannot be built here."""
    try:
        missing = [package for header, package in NEEDED.items() if not _has_header(header)]
    except FileNotFoundError as error:
        sys.exit(f"tapfs: the engine needs a C compiler, {error.filename} was not found: apt install gcc libc6-dev")
    if missing:
        sys.exit(f"tapfs: the engine needs headers that are not installed: apt install {' '.join(missing)}")


def _sources(base: Path, pattern: str) -> list[str]:
    folder = ROOT / SOURCE_FOLDER
    return sorted(str(base / SOURCE_FOLDER / path.relative_to(folder)) for path in folder.rglob(pattern))


def engine_builder(base: Path, optimization: list[str], link: list[str]) -> cffi.FFI:
    """The cffi builder of the engine, its sources named from `base`.

    setuptools wants paths relative to the root, a build in a scratch folder absolute ones.
    """
    builder = cffi.FFI()
    for header in HEADERS:
        text = (ROOT / SOURCE_FOLDER / header).read_text(encoding="utf-8")
        builder.cdef(text.partition("/* cffi: begin */")[2].partition("/* cffi: end */")[0])
    builder.set_source(
        MODULE,
        "".join(f'#include "{header}"\n' for header in HEADERS),
        sources=_sources(base, "*.c"),
        depends=_sources(base, "*.h"),
        include_dirs=[str(base / SOURCE_FOLDER)],
        libraries=LIBRARIES,
        extra_compile_args=[*FLAGS, *optimization],
        extra_link_args=link,
        py_limited_api=True,
    )
    return builder


def build(destination: Path, optimization: list[str], link: list[str]) -> Path:
    """Compile the engine and put the library into `destination`."""
    require_headers()
    with tempfile.TemporaryDirectory(prefix="tapfs-engine-") as scratch:
        built = Path(engine_builder(ROOT, optimization, link).compile(tmpdir=scratch, target=LIBRARY))
        destination.mkdir(parents=True, exist_ok=True)
        # Into place by rename: a running process keeps the library that it has mapped.
        fresh = destination / f"{LIBRARY}.new"
        fresh.write_bytes(built.read_bytes())
        return fresh.replace(destination / LIBRARY)


def lint() -> int:
    """Check our C under all warnings; the number of files that have any."""
    require_headers()
    failures = 0
    for source in _sources(ROOT, "*.c"):
        command = [*_compiler(), "-fsyntax-only", *FLAGS, *OPTIMIZED, *STRICT, f"-I{ROOT / SOURCE_FOLDER}", source]
        failures += subprocess.run(command, check=False).returncode != 0
    return failures


def main() -> int:
    """The script: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Build the C engine of tapfs.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--sanitize", metavar="DIR", type=Path, help="build with ASan and UBSan into DIR")
    what.add_argument("--lint", action="store_true", help="check the C sources, build nothing")
    arguments = parser.parse_args()
    if arguments.lint:
        return 1 if lint() else 0
    if arguments.sanitize:
        built = build(arguments.sanitize.absolute(), SANITIZED, ["-fsanitize=address,undefined"])
    else:
        built = build(ROOT / "tapfs" / "kernel", OPTIMIZED, [])
    sys.stdout.write(f"{built}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

require_headers()
ffibuilder = engine_builder(Path(), OPTIMIZED, [])

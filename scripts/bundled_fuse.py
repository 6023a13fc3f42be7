"""Build the pyfuse3 and the libfuse that a wheel carries, so that pip alone mounts, for one machine.

Both are under the LGPL: each stays a file of its own in `tapfs/bundled`, which its user may replace, and their sources
lie beside the wheels. libfuse is of Debian, built by its own meson. pyfuse3 is the sdist of PyPI, compiled for the
stable ABI of Python, which takes the changes of `ABI3`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
PYFUSE3 = "3.5.0"
#: The release of Debian whose libfuse it is: that which the suite runs with.
RELEASE = "bookworm"
#: The oldest Python, as Py_LIMITED_API.
LIMITED = "0x030b0000"

#: Files of pyfuse3, and what stands in them that the stable ABI has not: the macro that does not check, and an
#: extension type below Exception, which is there before the module's code runs.
ABI3 = {
    "internal.pxi": {"PyBytes_AS_STRING(": "PyBytes_AsString("},
    "__init__.pyx": {
        ", PyBytes_AS_STRING)": ")",
        "_pyfuse3.FUSEError = FUSEError\n": "",
        "cdef class FUSEError(": "class FUSEError(",
        "    cdef readonly int errno_\n": "",
        "    def __cinit__(self, errno):\n": "    def __init__(self, errno):\n        super().__init__(errno)\n",
        "return strerror(self.errno_)\n": "return strerror(self.errno_)\n\n_pyfuse3.FUSEError = FUSEError\n",
    },
}

_CROSS = """[binaries]
c = [{python!r}, '-m', 'ziglang', 'cc', '-target', {target!r}]
ar = [{python!r}, '-m', 'ziglang', 'ar']
[host_machine]
system = 'linux'
cpu_family = {machine!r}
cpu = {machine!r}
endian = 'little'
"""


def run(*words: str | Path, folder: Path, variables: dict[str, str]) -> None:
    """Run a step of the build, and end with what it said if it fails."""
    done = subprocess.run(
        words,
        cwd=folder,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"bundled_fuse.py: {' '.join(map(str, words))}\n{done.stdout[-4000:]}")


def fetch(folder: Path) -> list[Path]:
    """The sources of both, as they were published; once."""
    if not (folder / "done").exists():
        run(
            REPOSITORY / "scripts/foreign-packages", "source", RELEASE, folder, "fuse3", folder=REPOSITORY, variables={}
        )
        words = ("download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder / "sources", f"pyfuse3=={PYFUSE3}")
        run(sys.executable, "-m", "pip", *words, folder=REPOSITORY, variables={})
        (folder / "done").touch()
    return sorted((folder / "sources").iterdir())


def unpacked(sources: list[Path], suffix: str, folder: Path) -> Path:
    """The folder that the archive with that end of its name holds."""
    (archive,) = (path for path in sources if path.name.endswith(suffix))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
        return folder / tar.getnames()[0].partition("/")[0]


def build_libfuse(source: Path, machine: str, target: str, variables: dict[str, str]) -> Path:
    """The shared library. Its names of old versions have no symbols, which only lld minds."""
    python = sys.executable
    cross = source / "cross.ini"
    cross.write_text(_CROSS.format(python=python, target=target, machine=machine))
    options = ("--prefix=/usr", "--buildtype=release", "-Dutils=false", "-Dexamples=false", "-Dtests=false")
    linking = "-Dc_link_args=-Wl,--undefined-version,-s"
    meson = (python, "-m", "mesonbuild.mesonmain")
    run(*meson, "setup", "made", "--cross-file", cross, *options, linking, folder=source, variables=variables)
    run(*meson, "compile", "-C", "made", folder=source, variables=variables)
    return (source / "made/lib/libfuse3.so.3").resolve()


def build_pyfuse3(source: Path, libfuse: Path, headers: Path, target: str, variables: dict[str, str]) -> Path:
    """The package, its C for the stable ABI; it looks for the library in the folder above it."""
    package = source / "src/pyfuse3"
    for name, changes in ABI3.items():
        text = (package / name).read_text()
        for old, new in changes.items():
            if text.count(old) != 1:
                sys.exit(f"bundled_fuse.py: {name} of pyfuse3 {PYFUSE3} does not have once: {old!r}")
            text = text.replace(old, new)
        (package / name).write_text(text)
    python = sys.executable
    cython = ("-m", "cython", "-3", "-I", "Include", package / "__init__.pyx", "-o", package / "__init__.c")
    run(python, *cython, folder=source, variables=variables)
    includes = [f"-I{path}" for path in (headers / "include", headers / "made", package, sysconfig.get_path("include"))]
    macros = [f"-DPy_LIMITED_API={LIMITED}", "-DFUSE_USE_VERSION=32", "-D_FILE_OFFSET_BITS=64", "-DNDEBUG"]
    flags = ["-O2", "-fPIC", "-shared", "-s", "-w", "-fno-sanitize=all", "-Wl,-rpath,$ORIGIN/.."]
    compiler = (python, "-m", "ziglang", "cc", "-target", target)
    made = package / "__init__.abi3.so"
    words = (*flags, *macros, *includes, package / "__init__.c", libfuse, "-lpthread", "-lrt", "-o", made)
    run(*compiler, *words, folder=source, variables=variables)
    return package


def build(machine: str, target: str, scratch: Path, variables: dict[str, str], into: Path) -> list[Path]:
    """Lay out both below `into`; the sources are returned."""
    sources = fetch(REPOSITORY / "build/bundled")
    libfuse_source = unpacked(sources, ".orig.tar.xz", scratch)
    libfuse = build_libfuse(libfuse_source, machine, target, variables)
    package = build_pyfuse3(unpacked(sources, ".tar.gz", scratch), libfuse, libfuse_source, target, variables)
    (into / "pyfuse3").mkdir(parents=True)
    shutil.copy(libfuse, into / "libfuse3.so.3")
    for name in ("__init__.abi3.so", "_pyfuse3.py"):
        shutil.copy(package / name, into / "pyfuse3")
    return sources

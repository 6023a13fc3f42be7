"""Build the sdist, and from it alone the wheels that need no compiler, for both machines, into DIR.

usage: build_wheels.py DIR [x86_64] [aarch64]

The engine is compiled by Zig's C compiler (PyPI's `ziglang`) against the C library of manylinux_2_28, whichever machine
this is, and linked with static libraries of Debian (scripts/static-libraries). Nothing but its module's start is
visible of it, so that no other library of the process meets its OpenSSL. auditwheel says whether the tag is true. A
wheel has pyfuse3 and libfuse inside (scripts/bundled_fuse.py), whose sources go into DIR/sources.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import bundled_fuse

REPOSITORY = Path(__file__).parent.parent
GLIBC = (2, 28)
#: Machines, as wheels and as Debian call them.
MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
EXPORTS = "{ global: PyInit__engine; local: *; };\n"


def built(kind: str, source: Path, target: Path, *options: str, environment: dict[str, str] | None = None) -> Path:
    """The sdist or the wheel that setuptools makes of a source tree."""
    settings = repr({"--build-option": list(options)}) if options else "None"
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}, {settings}))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=source, env=os.environ | (environment or {}), stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"build_wheels.py: the {kind} could not be built:\n{done.stdout[-4000:]}")
    return target / done.stdout.splitlines()[-1]


def compiler_of(machine: str, scratch: Path) -> dict[str, str]:
    """The variables that have setuptools compile for a machine."""
    libraries = REPOSITORY / "build/static" / machine
    subprocess.run([REPOSITORY / "scripts/static-libraries", MACHINES[machine], libraries], check=True)
    exports = scratch / "exports.map"
    exports.write_text(EXPORTS)
    target = f"{machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    zig = f"{sys.executable} -m ziglang cc -target {target}"
    cache = str(REPOSITORY / "build/zig")
    return {
        "CC": f"{zig} -isystem {libraries / 'include'}",
        "LDSHARED": f"{zig} -shared -s -L{libraries / 'lib'} -Wl,--version-script={exports}",
        "ZIG_GLOBAL_CACHE_DIR": cache,
        "ZIG_LOCAL_CACHE_DIR": cache,
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",
    }


def check_tag(wheel: Path, tag: str) -> None:
    """End with a message unless auditwheel finds the tag to be true."""
    said = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", wheel], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    if f'platform tag: "{tag}"' not in " ".join(said.split()):
        sys.exit(f"build_wheels.py: {wheel.name} is no {tag}:\n{said}")


def main(words: list[str]) -> int:
    """Build them."""
    if not words or set(words[1:]) - MACHINES.keys():
        sys.exit(__doc__)
    target = Path(words[0]).absolute()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tapfs-dist-") as name:
        scratch = Path(name)
        sdist = built("sdist", REPOSITORY, target)
        sys.stdout.write(f"{sdist}\n")
        for machine in words[1:] or MACHINES:
            with tarfile.open(sdist) as archive:
                archive.extractall(scratch / machine, filter="data")
            (source,) = (scratch / machine).iterdir()
            tag = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{machine}"
            variables = compiler_of(machine, scratch)
            work = scratch / f"fuse-{machine}"
            zig_target = f"{machine}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
            caches = {name: variables[name] for name in ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")}
            sources = bundled_fuse.build(machine, zig_target, work, caches, source / "tapfs/bundled")
            (target / "sources").mkdir(exist_ok=True)
            for path in sources:
                shutil.copy(path, target / "sources")
            wheel = built("wheel", source, target, "--plat-name", tag, environment=variables)
            check_tag(wheel, tag)
            sys.stdout.write(f"{wheel}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

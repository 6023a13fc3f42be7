"""The part of a machine that changes from run to run: tapfs as it is in the working tree, the scenarios, the fixtures.

It is a small read-only file system of its own, so that the root file system need not be built again.
"""

from __future__ import annotations

import compileall
import hashlib
import importlib.metadata
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.laboratory.build import CACHE, HERE, TREE, Lab
from tests.laboratory.errors import LabError

SOURCES = (
    *("pyproject.toml", "setup.py", "tapfs", "formats", "kernel"),
    *("README.md", "CHANGELOG.md", "SECURITY.md", "docs", "examples", "scripts"),  # the guides that a wheel installs
)
BUILT = {"__pycache__", "_engine.c"}
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def make_payload(lab: Lab, image: Path) -> None:
    """Write the file system that a machine finds at /payload."""
    version = _python_of(lab)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="payload-") as temporary:
        folder = Path(temporary)
        shutil.copytree(_dependencies(version), folder / "site-packages")
        _install([str(_wheel()), "--no-deps"], folder / "site-packages")
        _copy_fuse_binding(version, folder / "site-packages")
        programs = folder / "site-packages/bin"
        for program in programs.iterdir():
            _, _, body = program.read_text(encoding="utf-8").partition("\n")
            program.write_text(f"#!/usr/bin/python3\n{body}", encoding="utf-8")
        programs.rename(folder / "bin")
        for tests in ("laboratory", "ublk", "xen"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(TREE / "tests" / tests, folder / "tests" / tests, ignore=ignored)
        shutil.copy(TREE / "tests/__init__.py", folder / "tests")
        (folder / "programs").mkdir()
        _compile(HERE / "disk_load.c", folder / "programs/disk-load")
        shutil.copytree(TREE / "fixtures", folder / "fixtures")
        shutil.copy(HERE / "dom0/init", folder / "init")
        shutil.copy(HERE / "host/init", folder / "init-host")
        if version == sys.version_info[:2]:
            unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
            compileall.compile_dir(
                folder, quiet=2, stripdir=str(folder), prependdir="/payload", invalidation_mode=unchecked
            )
        image.unlink(missing_ok=True)
        with image.open("wb") as file:
            file.truncate(64 << 20)
        make = ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-d", str(folder)]
        subprocess.run([*make, str(image)], check=True)


def _python_of(lab: Lab) -> tuple[int, int]:
    packages = (lab.folder / "packages.txt").read_text(encoding="utf-8")
    found = re.search(r"^libpython(\d+)\.(\d+)-stdlib_", packages, re.MULTILINE)
    if found is None:
        raise LabError("dom0 has no Python")
    return int(found[1]), int(found[2])


def _dependencies(version: tuple[int, int]) -> Path:
    """What tapfs depends on, as dom0's Python wants it; fetched once for each list."""
    settings = tomllib.loads((TREE / "pyproject.toml").read_text(encoding="utf-8"))
    wanted: list[str] = settings["project"]["dependencies"]
    text = "\n".join((*wanted, str(version), *PLATFORMS))
    folder = CACHE / f"dependencies-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        platforms = [f"--platform={platform}" for platform in PLATFORMS]
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as temporary:
            target = Path(temporary) / "site-packages"
            dom0_python = f"--python-version={version[0]}.{version[1]}"
            _install([*wanted, "--only-binary=:all:", "--implementation=cp", dom0_python, *platforms], target)
            for old in CACHE.glob("dependencies-*"):
                shutil.rmtree(old)
            target.rename(folder)
    return folder


def _copy_fuse_binding(version: tuple[int, int], target: Path) -> None:
    """The pyfuse3 of this Python, if dom0's has the same version: PyPI has none that is built. Else nothing mounts."""
    if version != sys.version_info[:2]:
        return
    for path in importlib.metadata.files("pyfuse3") or []:
        copy = target / path
        if path.suffix != ".pyc" and ".." not in path.parts:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path.locate(), copy)


def _install(what: list[str], target: Path) -> None:
    _pip("install", "--target", str(target), "--no-compile", "--upgrade", *what)


def _wheel() -> Path:
    """The wheel of the working tree with its engine, built again when a source has changed."""
    folder = CACHE / f"wheel-{_key()}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="building-") as temporary:
            # In a copy: a build leaves files behind, and takes up those that it finds.
            copy = Path(temporary) / "tree"
            for path in _sources():
                target = copy / path.relative_to(TREE)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target, follow_symlinks=False)
            made = Path(temporary) / "wheel"
            _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(made), str(copy))
            for old in CACHE.glob("wheel-*"):
                shutil.rmtree(old)
            made.rename(folder)
    return next(folder.glob("*.whl"))


def _key() -> str:
    key = hashlib.sha256(sys.version.encode())
    for path in _sources():
        key.update(f"{path.relative_to(TREE)}\n".encode())
        key.update(path.read_bytes() if not path.is_symlink() else b"")
    return key.hexdigest()[:16]


def _sources() -> Iterator[Path]:
    for name in SOURCES:
        top = TREE / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            built = path.suffix in {".so", ".o"} or BUILT.intersection(path.parts)
            if not built and (path.is_symlink() or path.is_file()):
                yield path


def _compile(source: Path, program: Path) -> None:
    """A program for dom0 and, as it needs no libraries, for guests."""
    compile_static = ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s", "-o", str(program), str(source)]
    answer = subprocess.run(compile_static, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise LabError(f"cc failed:\n{answer.stderr[-2000:]}")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise LabError(f"pip {arguments[0]} failed:\n{(answer.stdout + answer.stderr).strip()[-2000:]}")

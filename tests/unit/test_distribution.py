"""The distribution: the sdist has the guides, a wheel is built from it alone, and the wheel has all that it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

_NOT_TRACKED = (".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", ".hypothesis")


def built(kind: str, source: Path, target: Path) -> Path:
    """What setuptools makes of a source tree: the sdist or the wheel."""
    program = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(target)!r}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=source, capture_output=True, text=True, check=True)
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("distribution")
    tree = folder / "tree"
    shutil.copytree(REPOSITORY, tree, symlinks=True, ignore=shutil.ignore_patterns(*_NOT_TRACKED))
    with tarfile.open(built("sdist", tree, folder)) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the wheel that the sdist makes."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(built("wheel", source, folder)) as archive:
        archive.extractall(folder / "site")  # noqa: S202  our own
    return folder / "site"


def modules(folder: Path) -> set[str]:
    walked = os.walk(folder, followlinks=True)
    return {
        os.path.relpath(os.path.join(at, name), folder)
        for at, _, names in walked
        for name in names
        if name[-3:] == ".py"
    }


def test_the_sdist_has_the_guides_and_every_module(source: Path) -> None:
    for name in (
        "README.md",
        "CHANGELOG.md",
        "ARCHITECTURE.md",
        "HACKING.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "LICENSE",
    ):
        assert (source / name).read_bytes() == (REPOSITORY / name).read_bytes()
    docs = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "docs").rglob("*") if path.is_file()}
    assert {path for path in docs if not (source / path).is_file()} == set()
    assert (source / "tapfs/formats/README.md").is_file()
    assert (source / "tapfs/kernel/CONCURRENCY.md").is_file()
    assert modules(source / "tapfs") == modules(REPOSITORY / "tapfs")


def test_the_wheel_has_every_module_the_driver_guide_and_the_kit(installed: Path) -> None:
    assert modules(installed / "tapfs") == modules(REPOSITORY / "tapfs")
    for name in (
        "py.typed",
        "kernel/_engine.pyi",
        "kernel/_engine.abi3.so",
        "formats/README.md",
        "testing/__main__.py",
    ):
        assert (installed / "tapfs" / name).is_file(), name
    assert not [path for path in installed.rglob("*") if path.suffix in (".c", ".h")]


def test_the_wheel_says_under_which_license_it_is(installed: Path) -> None:
    (about,) = installed.glob("*.dist-info")
    assert "\nLicense-Expression: Apache-2.0\n" in (about / "METADATA").read_text()
    assert (about / "licenses/LICENSE").read_bytes() == (REPOSITORY / "LICENSE").read_bytes()


def test_the_wheel_has_the_manual_and_the_completions(installed: Path) -> None:
    (data,) = installed.glob("*.data/data/share")
    assert len(list((data / "man/man1").iterdir())) > 35
    assert (data / "man/man5/tapfs-formats.5").is_file()
    assert "_tapfs()" in (data / "bash-completion/completions/tapfs").read_text()


def test_the_kit_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    program = "import tapfs.testing.__main__ as kit, sys; print(kit.__file__); sys.exit(kit.main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", program, "qcow", "--seeds", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(str(installed))
    create = f"import tapfs; tapfs.create_image({str(tmp_path / 'a')!r}, tapfs.NewImage('qcow', 1 << 20))"
    create += f"; tapfs.open({str(tmp_path / 'a')!r}, writable=True).close()"
    subprocess.run([sys.executable, "-c", create], cwd=tmp_path, env=environment, check=True)

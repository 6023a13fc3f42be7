"""The distribution: the sdist has the guides, a wheel is built from it alone, and the wheel has all that it needs."""

from __future__ import annotations

import os
import re
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
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the sdist makes."""
    return built("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The contents of the wheel."""
    site = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)  # noqa: S202  our own
    return site


@pytest.fixture(scope="module")
def debian(source: Path, wheel: Path) -> Path:
    """The wheel laid out as the package of Debian has it."""
    root = wheel.parent / "debian"
    subprocess.run([sys.executable, source / "scripts/debian_tree.py", root, wheel], check=True)
    return root


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
        "NOTICE",
        "Makefile",
        "scripts/demo",
        "debian/control",
        "packaging/tapfs.xml",
        "examples/partitions.py",
    ):
        assert (source / name).read_bytes() == (REPOSITORY / name).read_bytes()
    docs = {path.relative_to(REPOSITORY) for path in (REPOSITORY / "docs").rglob("*") if path.is_file()}
    assert {path for path in docs if not (source / path).is_file()} == set()
    assert (source / "tapfs/formats/README.md").is_file()
    assert (source / "tapfs/kernel/CONCURRENCY.md").is_file()
    assert modules(source / "tapfs") == modules(REPOSITORY / "tapfs")
    assert list(source.rglob("*.pyc")) == []


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
    for name in ("LICENSE", "NOTICE"):
        assert (about / "licenses" / name).read_bytes() == (REPOSITORY / name).read_bytes()
    named = {word for word in (REPOSITORY / "NOTICE").read_text().split() if word.startswith("licenses/")}
    there = {f"licenses/{path.name}" for path in (about / "licenses/licenses").iterdir()}
    assert named == there
    assert len(there) == 6


def test_the_wheel_has_the_manual_and_the_completions(installed: Path) -> None:
    (data,) = installed.glob("*.data/data/share")
    assert len(list((data / "man/man1").iterdir())) > 35
    assert (data / "man/man5/tapfs-formats.5").is_file()
    assert "_tapfs()" in (data / "bash-completion/completions/tapfs").read_text()


def test_every_guide_is_installed_and_its_links_lead_somewhere(installed: Path) -> None:
    """Who has installed a package has no repository; help and messages name guides by their files in docs/."""
    (guides,) = installed.glob("*.data/data/share/doc/tapfs")
    names = {path.relative_to(guides) for path in guides.rglob("*") if path.is_file()}
    wanted = [*(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "examples").glob("*.py"), REPOSITORY / "README.md"]
    assert {path.relative_to(REPOSITORY) for path in wanted} <= names
    links = {
        (name, target)
        for name in names
        if name.suffix == ".md"
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", (guides / name).read_text())
        if "://" not in target
    }
    assert len(links) > 50
    dead = [(name, target) for name, target in links if not (guides / name).parent.joinpath(target).exists()]
    assert dead == []
    said = [path.read_text() for path in (installed / "tapfs/cli").rglob("*.py")]
    named = {Path(name) for text in said for name in re.findall(r"\bdocs/[\w/-]+\.md", text)}
    assert len(named) > 5
    assert named <= names


def test_the_kit_runs_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    program = "import tapfs.testing.__main__ as kit, sys; print(kit.__file__); sys.exit(kit.main(sys.argv[1:]))"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", program, "qcow", "--seeds", "1"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(str(installed))
    create = f"import tapfs; tapfs.create({str(tmp_path / 'a')!r}, 'qcow', 1 << 20)"
    create += f"; tapfs.open({str(tmp_path / 'a')!r}, writable=True).close()"
    subprocess.run([sys.executable, "-c", create], cwd=tmp_path, env=environment, check=True)


def test_the_package_of_debian_has_programs_helpers_and_units(debian: Path) -> None:
    packages = debian / "usr/lib/python3/dist-packages"
    for program, words in {"usr/bin/tapfs": ["--version"], "usr/sbin/mount.tapfs": ["--help"]}.items():
        done = subprocess.run(
            [sys.executable, "-P", debian / program, *words],
            env=os.environ | {"PYTHONPATH": str(packages)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "tapfs" in done.stdout
    assert {path.name for path in (debian / "usr/bin").iterdir()} == {"tapfs", "qcow-create", "img2qcow", "qcow2raw"}
    assert (debian / "etc/xen/scripts/block-tapfs").readlink() == Path("/usr/lib/tapfs/block-tapfs")
    assert (debian / "usr/lib/tapfs/block-tapfs").stat().st_mode & 0o111
    assert (
        "ExecStart=/usr/bin/tapfs blktapctrl\n"
        in (debian / "usr/lib/systemd/system/tapfs-blktapctrl.service").read_text()
    )
    assert (debian / "usr/share/zsh/vendor-completions/_tapfs").is_file()
    assert not list(packages.glob("*.data"))
    assert (debian / "usr/share/doc/tapfs/docs/mount.md").is_file()
    handler = re.search(
        r"^Exec=(\S+)", (debian / "usr/share/applications/tapfs-mount-files.desktop").read_text(), re.MULTILINE
    )
    assert handler is not None
    assert os.access(debian / handler[1].removeprefix("/"), os.X_OK)


def test_the_versions_agree(installed: Path) -> None:
    (about,) = installed.glob("*.dist-info")
    changelog = (REPOSITORY / "debian/changelog").read_text()
    assert about.name == f"tapfs-{changelog.partition('(')[2].partition(')')[0]}.dist-info"

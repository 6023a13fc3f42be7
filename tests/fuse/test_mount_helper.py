"""`mount -t fuse.tapfs` by mount.fuse.tapfs, fstab lines, and the options for owner and mode."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, Ran, unpack
from tests.fuse.conftest import Mounts, wait_for

pytestmark = pytest.mark.usefixtures("root")

_HELPER = Path("/sbin/mount.fuse.tapfs")
_NOBODY = 65534


@pytest.fixture
def helper(mounts: Mounts, tmp_path: Path) -> Iterator[None]:
    """The helper where mount(8) looks for it; one that is installed there is put back afterwards."""
    script = tmp_path / "mount.fuse.tapfs"
    code = "import sys; from tapfs.cli.fuse_helper import main; sys.exit(main())"
    script.write_text(
        f"#!/bin/sh\nPYTHONPATH={REPOSITORY} TAPFS_RUNTIME_DIR={shlex.quote(str(mounts.runtime))}"
        f' exec {sys.executable} -c {shlex.quote(code)} "$@"\n'
    )
    script.chmod(0o755)
    kept = _HELPER.rename(tmp_path / "kept") if os.path.lexists(_HELPER) else None
    _HELPER.symlink_to(script)
    try:
        yield
    finally:
        _HELPER.unlink()
        if kept is not None:
            kept.rename(_HELPER)


def mount(*words: object) -> Ran:
    """Run the host's mount command."""
    done = subprocess.run(["mount", *map(str, words)], check=False, capture_output=True, text=True, timeout=60)
    return Ran(done.returncode, done.stdout, done.stderr)


def modes(directory: Path) -> list[tuple[int, int, int]]:
    """Mode, user and group of the directory and of its disk."""
    found = [path.stat() for path in (directory, directory / "disk")]
    return [(status.st_mode & 0o777, status.st_uid, status.st_gid) for status in found]


def readable_by_nobody(path: Path) -> bool:
    """Whether another user can read a file; everything above it lets him through."""
    command = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups"]
    command += ["head", "-c1", str(path)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.usefixtures("helper")
def test_mount(mounts: Mounts, sample: Path) -> None:
    directory = mounts.directory()
    assert mount("-t", "fuse.tapfs", "-o", "ro", sample, directory) == Ran(0, "", "")
    assert (directory / "disk").read_bytes() == sample.read_bytes()
    assert modes(directory) == [(0o555, 0, 0), (0o400, 0, 0)]
    mounts.umount(directory)


@pytest.mark.usefixtures("helper")
def test_options(mounts: Mounts, tmp_path: Path) -> None:
    image, scratch = tmp_path / "image.qcow", tmp_path / "scratch.qcow"
    key = tmp_path / "key"
    key.write_text("secret\n")
    assert mounts.run("create", "-f", "qcow", image, "1M").code == 0
    for options, mode in (
        ("rw,format=qcow", 0o600),
        ("rw,format=qcow,ro", 0o400),
        (f"overlay={scratch},engine=pyfuse3", 0o600),
        (f"temp,nofail,noauto,_netdev,x-systemd.device-timeout=5,key_file={key}", 0o600),
    ):
        directory = mounts.directory()
        assert mount("-t", "fuse.tapfs", "-o", options, image, directory) == Ran(0, "", "")
        assert modes(directory)[1][0] == mode
        mounts.umount(directory)
    assert scratch.exists()


@pytest.mark.usefixtures("helper")
def test_files(mounts: Mounts, tmp_path: Path) -> None:
    image, directory = tmp_path / "image.raw", mounts.directory()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    assert mount("-t", "fuse.tapfs", "-o", "files,rw,format=raw,nofail", image, directory) == Ran(0, "", "")
    assert (directory / "lost+found").is_dir()
    (directory / "new").touch()
    subprocess.run(["umount", directory], check=True)
    wait_for(lambda: not mounts.left_behind())


@pytest.mark.usefixtures("helper")
def test_fstab(mounts: Mounts, sample: Path, tmp_path: Path) -> None:
    directory = mounts.directory()
    fstab = tmp_path / "fstab"
    where = str(directory).replace(" ", "\\040")
    fstab.write_text(f"{sample} {where} fuse.tapfs ro,allow_other,umask=027,gid=5,nofail 0 0\n")
    assert mount("--fstab", fstab, directory) == Ran(0, "", "")
    assert modes(directory) == [(0o550, 0, 5), (0o440, 0, 5)]
    mounts.umount(directory)


@pytest.mark.usefixtures("helper")
@pytest.mark.parametrize(
    "case",
    [
        ("nonsense", 1, "no such mount option: 'nonsense'"),
        ("format=qcow", 32, "qcow"),
        ("key_file", 1, "a value"),
        ("rw", 32, "say format=raw if it is one"),
    ],
)
def test_failures(mounts: Mounts, sample: Path, case: tuple[str, int, str]) -> None:
    options, code, words = case
    failed = mount("-t", "fuse.tapfs", "-o", options, sample, mounts.directory())
    assert failed.code == code
    assert failed.err.startswith("mount.fuse.tapfs: error: ")
    assert words in failed.err
    assert mounts.left_behind() == []


@pytest.mark.parametrize(
    "case",
    [
        ([], [(0o555, 0, 0), (0o400, 0, 0)]),
        (["-o", "allow_other"], [(0o555, 0, 0), (0o444, 0, 0)]),
        (["-o", "uid=1000,gid=100,umask=077"], [(0o500, 1000, 100), (0o400, 1000, 100)]),
        (["--temp", "-o", "allow_other,umask=002"], [(0o555, 0, 0), (0o664, 0, 0)]),
    ],
)
def test_owner_and_mode(mounts: Mounts, sample: Path, case: tuple[list[str], list[tuple[int, int, int]]]) -> None:
    options, expected = case
    directory = mounts.mount(sample, *options)
    assert modes(directory) == expected
    mounts.umount(directory)


def test_allow_other(mounts: Mounts, sample: Path) -> None:
    """Others get in only with allow_other; then the mode decides."""
    for path in (mounts.folder, *mounts.folder.parents):
        if path.owner() == "root" and path.name.startswith("pytest-"):
            path.chmod(0o755)
    mounts.folder.chmod(0o755)
    for options, allowed in (([], False), (["-o", "allow_other"], True), (["-o", "allow_other,umask=077"], False)):
        directory = mounts.mount(sample, *options)
        assert readable_by_nobody(directory / "disk") is allowed
        mounts.umount(directory)


def test_encrypted(mounts: Mounts, tmp_path: Path) -> None:
    """The helper has no terminal: the key comes from a file."""
    image = unpack(REPOSITORY / "fixtures/blktap/standalone-2007-le-l1.qcow.xz", tmp_path)
    words = [sys.executable, "-c", "import sys; from tapfs.cli.fuse_helper import main; sys.exit(main())"]
    directory = mounts.directory()
    done = subprocess.run(
        [*words, image, directory, "-o", "ro,key_file=/nonexistent"],
        check=False,
        capture_output=True,
        text=True,
        env=mounts.environment | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 32
    assert "/nonexistent" in done.stderr

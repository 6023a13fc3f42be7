"""`mount -t fuse.tapfs` by mount.fuse.tapfs, fstab lines, and the options for owner and mode."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tapfs.fuse.mount_table import mounted_file_systems
from tests.conftest import REPOSITORY, Ran, unpack
from tests.fuse.conftest import Mounts, refused, wait_for

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


def shown(directory: Path, column: str) -> set[str]:
    """What findmnt shows of a mount."""
    words = ["findmnt", "-no", column, directory]
    return set(subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip().split(","))


def escaped(path: Path) -> str:
    """A path as fstab(5) has it."""
    return "".join(c if c.isalnum() or c in "/_-.,é" else f"\\{ord(c):03o}" for c in str(path))


@pytest.mark.usefixtures("helper", "no_new_loop_device")
@pytest.mark.parametrize("name", ["plain.raw", "a,b #c\\d é.raw", "comma,.raw"])
@pytest.mark.parametrize(
    "options", ["ro,nofail", "rw,format=raw", "ro,files,nofail", "rw,temp", "rw,overlay={overlay}"]
)
def test_mounting_all_again(mounts: Mounts, flat: Path, tmp_path: Path, name: str, options: str) -> None:
    """The second `mount -a` finds everything mounted, whatever the image is named and shows."""
    image, directory, fstab = tmp_path / name, mounts.directory(), tmp_path / "fstab"
    flat.rename(image)
    options = options.format(overlay=escaped(tmp_path / "scratch.qcow"))
    fstab.write_text(f"{escaped(image)} {escaped(directory)} fuse.tapfs {options} 0 0\n")
    for _ in range(2):
        assert mount("--all", "--fstab", fstab) == Ran(0, "", "")
        assert mounts.mounted() == [str(directory)]
        assert len(mounts.processes()) == 1
    if "files" not in options:
        (source,) = [each.source for each in mounted_file_systems() if each.mount_point == str(directory)]
        assert source == str(image)
    mounts.umount(directory)


@pytest.mark.usefixtures("helper")
def test_another_mount_of_the_image_is_an_error(mounts: Mounts, flat: Path) -> None:
    """What is there is not what the line asks for: writable, files, or another image."""
    directory = mounts.mount(flat, "--engine", mounts.engine)
    for options, image in (("rw,format=raw", flat), ("ro,files", flat), ("ro", flat.parent)):
        failed = mount("-t", "fuse.tapfs", "-o", options, image, directory)
        assert failed.code == 32
        assert "is a mount point already" in failed.err
    mounts.umount(directory)


@pytest.mark.usefixtures("helper")
def test_an_image_that_is_missing(mounts: Mounts, tmp_path: Path, sample: Path) -> None:
    missing, directory = tmp_path / "missing.qcow", mounts.directory()
    assert mount("-t", "fuse.tapfs", "-o", "ro,nofail", missing, directory) == Ran(0, "", "")
    assert mount("-t", "fuse.tapfs", "-o", "ro", missing, directory).code == 32
    assert mount("-t", "fuse.tapfs", "-o", "ro,nofail,format=qcow", sample, directory).code == 32
    assert mounts.left_behind() == []


@pytest.mark.usefixtures("helper", "no_new_loop_device")
def test_options_of_other_file_systems(mounts: Mounts, flat: Path) -> None:
    """Those of FUSE change nothing; those of the file system inside reach it, and mean nothing to the disk."""
    directory = mounts.directory()
    fuse = "default_permissions,big_writes,max_read=131072,nonempty"
    assert mount("-t", "fuse.tapfs", "-o", f"ro,{fuse}", flat, directory) == Ran(0, "", "")
    mounts.umount(directory)
    options = f"rw,format=raw,files,{fuse},errors=remount-ro,discard"
    assert mount("-t", "fuse.tapfs", "-o", options, flat, directory) == Ran(0, "", "")
    shown = subprocess.run(
        ["findmnt", "-no", "FS-OPTIONS", directory], check=True, capture_output=True, text=True
    ).stdout
    assert {"errors=remount-ro", "discard"} <= set(shown.strip().split(","))
    mounts.umount(directory)
    for option in ("discard", "errors=remount-ro"):
        failed = mount("-t", "fuse.tapfs", "-o", f"ro,{option}", flat, directory)
        assert failed.code == 1
        assert f"{option.partition('=')[0]} is for files" in failed.err
        assert failed.err.endswith("see 'mount.fuse.tapfs --help'\n")
    failed = mount("-t", "fuse.tapfs", "-o", "ro,partition=1", flat, directory)
    assert (failed.code, "partition=N is for files" in failed.err) == (1, True)


@pytest.mark.usefixtures("helper", "no_new_loop_device")
@pytest.mark.parametrize("more", ["", ",files"])
def test_remounting(mounts: Mounts, flat: Path, tmp_path: Path, more: str) -> None:
    directory, fstab = mounts.directory(), tmp_path / "fstab"
    fstab.write_text(f"{escaped(flat)} {escaped(directory)} fuse.tapfs rw,format=raw{more} 0 0\n")
    assert mount("--fstab", fstab, directory) == Ran(0, "", "")
    written = directory / ("new" if more else "disk")

    def write() -> None:
        with written.open("r+b" if written.exists() else "wb") as file:
            file.write(b"x")

    write()
    with written.open("r+b"):
        busy = mount("--fstab", fstab, "-o", "remount,ro", directory)
        assert (busy.code, "is busy: a file is open for writing" in busy.err) == (32, True)
    assert mount("--fstab", fstab, "-o", "remount,ro", directory) == Ran(0, "", "")
    with refused(errno.EROFS):
        write()
    assert mount("--fstab", fstab, "-o", "remount,rw", directory) == Ran(0, "", "")
    write()
    flags = subprocess.run(
        ["findmnt", "-no", "VFS-OPTIONS", directory], check=True, capture_output=True, text=True
    ).stdout
    assert {"rw", "nosuid", "nodev"} <= set(flags.strip().split(","))
    mounts.umount(directory)
    nothing = mount("--fstab", fstab, "-o", "remount,ro", directory)
    assert (nothing.code, "no image is mounted here" in nothing.err) == (32, True)
    assert mount("--fstab", fstab, "-o", "ro", directory) == Ran(0, "", "")
    for_writing = mount("--fstab", fstab, "-o", "remount,rw", directory)
    assert (for_writing.code, "its image was opened read-only" in for_writing.err) == (32, True)
    mounts.umount(directory)


def test_by_mount_fuse(mounts: Mounts, flat: Path, tmp_path: Path) -> None:
    """Without our helper in /sbin mount(8) runs mount.fuse, which runs `tapfs IMAGE DIR -o OPTIONS`."""
    program = tmp_path / "bin" / "tapfs"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tapfs.cli "$@"\n')
    program.chmod(0o755)
    environment = mounts.environment | {
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }
    directory = mounts.directory()
    for options, code in (("ro", 0), ("ro,files,partition=0", 0), ("ro,nonsense", 1), ("ro,format=qcow", 32)):
        done = subprocess.run(
            ["mount.fuse3", flat, directory, "-t", "tapfs", "-o", options],
            check=False,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == code, done
        if code == 0:
            assert done.stderr == ""
            assert shown(directory, "FSTYPE") == {"ext4" if "files" in options else "fuse.tapfs"}
            assert (
                "nosuid"
                in subprocess.run(
                    ["findmnt", "-no", "OPTIONS", directory], check=True, capture_output=True, text=True
                ).stdout
            )
            mounts.umount(directory)
        else:
            assert done.stderr.startswith("tapfs: error: ")


def test_a_mistyped_command_is_no_call_of_mount_fuse(mounts: Mounts) -> None:
    mistyped = mounts.run("crate", "x.qcow", "-o", "size=1M")
    assert (mistyped.code, "no such command: 'crate'" in mistyped.err) == (64, True)

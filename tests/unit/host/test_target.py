"""Targets of new images: no other user chooses or gets the file, and a file that cannot be replaced is found first."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.jobs import create
from tapfs.jobs.convert import convert_to_new
from tapfs.jobs.create import NewImage, create_image
from tests.unit.host.other_user import OTHER_USER, as_other_user

MIB = 1 << 20
NEW = NewImage("raw", MIB)

#: In the entries of an access control list: not for one user.
NO_ID = 0xFFFFFFFF

#: Everything that makes a file under a name that a user gives.
Maker = Callable[[Path | str, Path], None]


def by_create(path: Path | str, sample: Path) -> None:
    create_image(str(path), NEW, overwrite=True)


def by_convert(path: Path | str, sample: Path) -> None:
    with tapfs.open(sample, format="raw") as source:
        convert_to_new(source, str(path), NewImage("raw", source.size))


def by_overlay(path: Path | str, sample: Path) -> None:
    tapfs.open(sample, format="raw", overlay=path).close()


MAKERS = [by_create, by_convert, by_overlay]


def refusal(make: Maker, path: Path | str, sample: Path) -> ImageError:
    with pytest.raises(ImageError) as raised:
        make(path, sample)
    return raised.value


@pytest.fixture
def no_unnamed_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without O_TMPFILE, such as a FUSE file system."""
    original = os.open

    def refused(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)
        return original(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refused)


@pytest.fixture
def usual_mask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize("make", MAKERS)
def test_another_s_link_is_not_followed_where_everybody_may_make_one(
    make: Maker, sticky: Path, sample: Path, tmp_path: Path
) -> None:
    private = tmp_path / "private"
    private.mkdir()
    (private / "old").write_bytes(b"old")
    for there in ("new", "old"):
        as_other_user('ln -sf "$1" "$2"', private / there, sticky / "out")
        error = refusal(make, sticky / "out", sample)
        assert error.kind is ErrorKind.DENIED
        assert f"belongs to user {OTHER_USER}" in str(error)
    as_other_user('rm "$2"; ln -s "$1" "$2"', private, sticky / "out")
    assert refusal(make, sticky / "out/new", sample).kind is ErrorKind.DENIED
    assert os.listdir(private) == ["old"]
    assert (private / "old").read_bytes() == b"old"


@pytest.mark.parametrize("make", MAKERS)
def test_links_of_ours_and_of_the_folder_s_owner_are_followed(
    make: Maker, sticky: Path, sample: Path, tmp_path: Path
) -> None:
    (sticky / "ours").symlink_to(tmp_path / "first")
    make(sticky / "ours", sample)
    assert (tmp_path / "first").stat().st_size > 0
    assert (sticky / "ours").is_symlink()
    os.chown(sticky, OTHER_USER, OTHER_USER)
    as_other_user('ln -s "$1" "$2"', tmp_path / "second", sticky / "theirs")
    make(sticky / "theirs", sample)
    assert (tmp_path / "second").stat().st_size > 0
    sticky.chmod(0o755)
    os.chown(sticky, 0, 0)
    (sticky / "plain").symlink_to(tmp_path / "third")
    os.chown(sticky / "plain", OTHER_USER, OTHER_USER, follow_symlinks=False)
    make(sticky / "plain", sample)
    assert (tmp_path / "third").exists()


@pytest.mark.parametrize("make", [by_create, by_convert])
@pytest.mark.parametrize("content", ["", "old"])
def test_another_s_file_is_replaced_by_one_that_is_ours(
    make: Maker, content: str, sticky: Path, sample: Path, usual_mask: None
) -> None:
    out = sticky / "out"
    as_other_user('umask 0; printf "$2" > "$1"', out, content)
    make(out, sample)
    status = out.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, 0o644)
    as_other_user('umask 077; : > "$1"', sticky / "private")
    make(sticky / "private", sample)
    assert stat.S_IMODE((sticky / "private").stat().st_mode) == 0o600


def test_another_s_overlay_is_not_written(sticky: Path, sample: Path, tmp_path: Path) -> None:
    by_overlay(sticky / "out", sample)
    os.chown(sticky / "out", OTHER_USER, OTHER_USER)
    before = (sticky / "out").read_bytes()
    assert refusal(by_overlay, sticky / "out", sample).kind is ErrorKind.DENIED
    assert (sticky / "out").read_bytes() == before
    os.chown(sticky, OTHER_USER, OTHER_USER)
    by_overlay(sticky / "out", sample)


def test_a_file_of_ours_keeps_its_permissions(tmp_path: Path, sample: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"old")
    out.chmod(0o640)
    os.chown(out, -1, OTHER_USER)
    entries = [(1, 6, NO_ID), (2, 6, OTHER_USER), (4, 4, NO_ID), (0x10, 6, NO_ID), (0x20, 0, NO_ID)]
    access = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(out, "system.posix_acl_access", access)
    by_convert(out, sample)
    status = out.stat()
    assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (OTHER_USER, 0o660)
    assert os.getxattr(out, "system.posix_acl_access") == access
    (tmp_path / "other").hardlink_to(out)
    by_create(out, sample)
    assert (tmp_path / "other").read_bytes() == sample.read_bytes()
    assert os.getxattr(out, "system.posix_acl_access") == access


@pytest.mark.parametrize("old_mode", [None, 0o604])
def test_nobody_reads_a_file_under_a_hidden_name(
    tmp_path: Path, no_unnamed_files: None, usual_mask: None, old_mode: int | None
) -> None:
    out = tmp_path / ("out" + "\N{SNOWMAN}" * 80)
    if old_mode is not None:
        out.write_bytes(b"old")
        out.chmod(old_mode)
    with create.new_image(str(out), NEW, overwrite=True) as image:
        image.write(0, b"secret")
        image.flush()
        (hidden,) = [path for path in tmp_path.iterdir() if path != out]
        assert stat.S_IMODE(hidden.stat().st_mode) == 0o600
    assert stat.S_IMODE(out.stat().st_mode) == (0o644 if old_mode is None else old_mode)
    assert os.listdir(tmp_path) == [out.name]


def test_a_host_that_sets_no_permissions_has_the_image_for_its_owner(
    tmp_path: Path, no_unnamed_files: None, usual_mask: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fchmod(descriptor: int, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchmod", fchmod)
    create_image(str(tmp_path / "out"), NEW)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["out"]
    (tmp_path / "out").chmod(0o400)
    with pytest.raises(tapfs.ImageError):
        create_image(str(tmp_path / "out"), NEW, overwrite=True)


def test_a_hidden_file_is_gone_after_a_failure(tmp_path: Path, no_unnamed_files: None) -> None:
    with pytest.raises(KeyError), create.new_image(str(tmp_path / "out"), NEW):
        raise KeyError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format_name", ["raw", "qcow"])
def test_what_is_replaced_is_locked_until_then(tmp_path: Path, format_name: str) -> None:
    """Who began to use it meanwhile would go on with a file that has no name any more."""
    out = tmp_path / "out"
    new = NewImage(format_name, MIB)
    create_image(str(out), new)
    with create.new_image(str(out), new, overwrite=True):
        for writable in (False, True):
            with pytest.raises(ImageError) as raised:
                tapfs.open(out, format=format_name, writable=writable)
            assert raised.value.kind is ErrorKind.LOCKED
    tapfs.open(out, format=format_name, writable=True).close()


def new_qcow(path: Path) -> Path:
    tapfs.create(str(path), "qcow", MIB)
    return path


def test_what_comes_meanwhile_is_replaced_only_if_it_is_not_in_use(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with create.new_image(str(out), NewImage("raw", 2 * MIB), overwrite=True):
        tapfs.create(str(out), "qcow", MIB)
    assert out.stat().st_size == 2 * MIB
    out.unlink()
    with contextlib.ExitStack() as users:
        with pytest.raises(ImageError) as raised, create.new_image(str(out), NEW, overwrite=True):
            users.enter_context(tapfs.open(new_qcow(out)))
        assert raised.value.kind is ErrorKind.LOCKED
    assert os.listdir(tmp_path) == ["out"]


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[Path]:
    """A file that is a mount point, as the volume of a container may be."""
    (tmp_path / "volume").touch()
    (tmp_path / "folder").mkdir()
    point = tmp_path / "folder/out"
    point.touch()
    subprocess.run(["mount", "--bind", str(tmp_path / "volume"), str(point)], check=True)
    yield point
    subprocess.run(["umount", str(point)], check=True)


@pytest.mark.parametrize("make", [by_create, by_convert])
def test_a_mount_point_is_written_in_place(make: Maker, mount_point: Path, sample: Path) -> None:
    make(mount_point, sample)
    assert mount_point.stat().st_size >= MIB
    error = refusal(make, mount_point, sample)
    assert (error.kind, "empty the file" in str(error)) == (ErrorKind.LOCKED, True)
    os.truncate(mount_point, 0)
    with pytest.raises(ImageError), create.new_image(str(mount_point), NEW) as image:
        image.write(MIB, b"half")
    assert mount_point.stat().st_size == 0
    assert os.listdir(mount_point.parent) == ["out"]


_AS_USER = """
import os, sys
sys.path[:] = {path!r}
import tapfs, tapfs.jobs.create, tapfs.disk.probe, tapfs.formats.raw, tapfs.kernel.engine, encodings.idna, dataclasses
os.setgroups([]); os.setgid({user}); os.setuid({user})
try:
    tapfs.create(sys.argv[1], "raw", 1 << 20, overwrite=True)
except tapfs.ImageError as error:
    print(error.kind, error)
"""


def create_as_other_user(path: Path) -> str:
    """What `tapfs create --force` says to the other user."""
    script = _AS_USER.format(path=sys.path, user=OTHER_USER)
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    return done.stdout


def test_a_folder_that_may_not_be_written(sticky: Path) -> None:
    out = sticky / "out"
    out.touch()
    os.chown(out, OTHER_USER, OTHER_USER)
    sticky.chmod(0o755)
    assert create_as_other_user(out) == ""
    assert (out.stat().st_size, out.stat().st_uid) == (MIB, OTHER_USER)
    said = create_as_other_user(out)
    assert said.startswith("denied")
    assert "may not be written; empty the file" in said
    assert "may not be written" in create_as_other_user(sticky / "none")


def test_a_folder_that_may_be_written_but_not_read(sticky: Path) -> None:
    sticky.chmod(0o733)
    assert create_as_other_user(sticky / "out") == ""
    assert (sticky / "out").stat().st_size == MIB


def test_another_s_file_in_a_sticky_folder(sticky: Path) -> None:
    out = sticky / "out"
    out.write_bytes(b"old")
    out.chmod(0o666)
    assert "only they may replace it" in create_as_other_user(out)
    assert out.read_bytes() == b"old"
    assert out.stat().st_uid == 0
    (sticky / "empty").touch()
    (sticky / "empty").chmod(0o666)
    create_as_other_user(sticky / "empty")
    assert (sticky / "empty").stat().st_size == MIB  # the folder's owner could read it anyway
    os.chown(sticky / "empty", 1, 1)
    os.truncate(sticky / "empty", 0)
    assert "belongs to user 1" in create_as_other_user(sticky / "empty")
    assert (sticky / "empty").stat().st_size == 0


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", ["n" * 256, "none/x", "new/", "file/x"])
def test_names_that_cannot_be_are_known_before_anything_is_made(
    make: Maker, name: str, tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("tapfs.kernel.engine.execute_on_files", None)
    with pytest.raises(ImageError):
        make(f"{tmp_path}/{name}", sample)
    assert os.listdir(tmp_path) == ["file"]

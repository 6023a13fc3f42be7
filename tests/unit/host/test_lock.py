"""Hosts that have no locks, and hosts that have them and give none."""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.host import lock

Refuse = Callable[[int], None]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Have the host answer every question about a lock with an errno."""

    def use(number: int) -> None:
        def refused(_descriptor: int, command: int, *_: object) -> bytes:
            assert command in (fcntl.F_OFD_SETLK, fcntl.F_OFD_GETLK)
            raise OSError(number, "")

        monkeypatch.setattr(lock.fcntl, "fcntl", refused)

    return use


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    return path


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_host_without_locks_is_used_without(image: Path, refuse: Refuse, number: int) -> None:
    refuse(number)
    with tapfs.open(image, format="raw", writable=True) as disk:
        disk.write(0, b"x")


def test_a_lock_manager_that_is_down_is_no_permission_to_write(image: Path, refuse: Refuse) -> None:
    """Others may hold locks that it does not tell of."""
    refuse(errno.ENOLCK)
    with pytest.raises(ImageError, match="the lock manager of its host does not answer") as raised:
        tapfs.open(image, format="raw", writable=True)
    assert raised.value.kind is ErrorKind.IO
    assert "rpc.statd" in (raised.value.remedy or "")


def test_a_reader_is_warned_of_it(image: Path, refuse: Refuse) -> None:
    refuse(errno.ENOLCK)
    with (
        pytest.warns(RuntimeWarning, match="cannot be locked now"),
        tapfs.open(image, format="raw") as disk,
    ):
        assert disk.read(0, 1) == b"\0"
    # Who shares the image anyway asks nobody.
    with tapfs.open(image, format="raw", shared=True) as disk:
        assert disk.read(0, 1) == b"\0"


def test_the_other_uses_of_a_lock_are_refused(image: Path, refuse: Refuse) -> None:
    refuse(errno.ENOLCK)
    with image.open("rb") as file:
        for use in (
            lambda: lock.mark_requests(file.fileno(), str(image), 1, already_open=False),
            lambda: lock.refuse_other_writers(file.fileno(), str(image)),
        ):
            with pytest.raises(ImageError) as raised:
                use()
            assert raised.value.kind is ErrorKind.IO

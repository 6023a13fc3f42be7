"""Local copies that are kept between runs: a sparse file with what has come, and a list of the blocks that are in it.

A list names a block only if its bytes were durable before. So after a crash of the host it is right, or there is none:
* a list is written beside the old one and takes its name when the copy has been synced;
* before a block is given up, or the copy is used for other bytes, the list is removed, durably.

A copy is one process's at a time, by a lock that ends with the last descriptor of the copy.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import stat
import time
import zlib
from contextlib import suppress
from typing import NamedTuple, Self

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.host.remote.address import Address
from tapfs.host.remote.source import Facts

_VERSION = 1

#: The lock is asked for so often, so many seconds apart: a process that has ended may still be writing its list.
_LOCK_TRIES, _LOCK_SECONDS = 20, 0.05


class KeptList(NamedTuple):
    """Where the list of a copy is, and what it says it is of."""

    path: str
    head: bytes

    @classmethod
    def of(cls, path: str, address: Address, facts: Facts, block_bytes: int, copy: int) -> Self:
        """The list of the open copy of an object, which is told by its address, identity and length.

        The copy is told by its number on the host: who still has a copy that was removed may write its list later.
        """
        said = {"version": _VERSION, "address": address.text, "identity": facts.identity, "file": os.fstat(copy).st_ino}
        head = json.dumps({**said, "size": facts.size, "block_bytes": block_bytes}, sort_keys=True)
        return cls(path, head.encode() + b"\n")

    def load(self, count: int) -> bytearray | None:
        """One byte for each of `count` blocks, 1 where the copy has it; None if there is no list of this object."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        with os.fdopen(descriptor, "rb") as file:
            if os.fstat(descriptor).st_uid != os.geteuid() or file.read(len(self.head)) != self.head:
                return None
            with suppress(zlib.error):
                blocks = bytearray(zlib.decompressobj().decompress(file.read(), count + 1))
                return blocks if len(blocks) == count and blocks.count(0) + blocks.count(1) == count else None
        return None

    def save(self, copy: int, blocks: bytes) -> None:
        """Make the list durable, once the copy is. Raises OSError."""
        os.fsync(copy)
        new = f"{self.path}.new"
        with suppress(FileNotFoundError):
            os.unlink(new)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self.head + zlib.compress(blocks, 1))
            file.flush()
            os.fsync(descriptor)
        os.rename(new, self.path)
        _sync_folder(self.path)

    def remove(self) -> None:
        """Have no list, durably. Raises OSError."""
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        _sync_folder(self.path)


class KeptCopy(NamedTuple):
    """An open and locked copy: its descriptor, and the path of its list."""

    descriptor: int
    list_path: str

    @classmethod
    def open(cls, folder: str, address: Address) -> Self | None:
        """The copy of an address in a folder, which is made if it is not there; None if another process has it.

        Raises ImageError.
        """
        base = os.path.join(os.path.abspath(folder), hashlib.sha256(address.text.encode()).hexdigest()[:32])
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(f"{base}.data", flags, 0o600)
        except OSError as error:
            raise from_os_error(error, path=folder, op="keep a local copy") from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            os.close(descriptor)
            message = "holds a copy that is another user's"
            raise ImageError(
                ErrorKind.DENIED, message, path=folder, op="keep a local copy", remedy="name another folder"
            )
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOCK_SECONDS)
                continue
            return cls(descriptor, f"{base}.blocks")
        os.close(descriptor)
        return None

    def drop(self) -> None:
        """Take the name of the copy away, and its list: it is a copy without a name then. Raises OSError."""
        KeptList(self.list_path, b"").remove()
        os.unlink(f"{self.list_path.removesuffix('.blocks')}.data")
        os.ftruncate(self.descriptor, 0)


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

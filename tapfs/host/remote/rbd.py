"""Images of a Ceph cluster by librbd: ``rbd:POOL/IMAGE[@SNAPSHOT][:OPTION=VALUE…]``, as QEMU writes it.

The Python binding of librbd is a package of the system (python3-rbd of Debian) and not of PyPI.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tapfs.errors import ErrorKind, ImageError
from tapfs.host.remote.address import Address
from tapfs.host.remote.source import Facts

#: The file that tells librados of the cluster, unless the address names another.
_CONFIGURATION = "/etc/ceph/ceph.conf"


class RbdName(NamedTuple):
    """What an address says: a pool, maybe a namespace in it, an image, maybe a snapshot, and options of librados."""

    pool: str
    namespace: str
    image: str
    snapshot: str | None
    options: dict[str, str]


def name_of(address: Address) -> RbdName:
    """The parts of an address; a backslash stands before a sign that means itself. Raises ImageError."""
    place, *pairs = (part.replace("\\:", ":") for part in re.split(r"(?<!\\):", address.text[len("rbd:") :]))
    steps = [re.sub(r"\\(.)", r"\1", step) for step in re.split(r"(?<!\\)/", place)]
    options = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
    image, _, snapshot = steps[-1].partition("@")
    if len(steps) not in (2, 3) or not image or not steps[0]:
        raise ImageError(
            ErrorKind.INVALID_ARGUMENT,
            "is no name of a Ceph image",
            path=str(address),
            op="open",
            remedy="write rbd:POOL/IMAGE, with @SNAPSHOT and :conf=FILE:id=USER where they are needed",
        )
    return RbdName(steps[0], steps[1] if len(steps) == 3 else "", image, snapshot or None, options)


class RbdSource:
    """One image of a cluster: a `tapfs.host.remote.source.WritableSource`. librbd takes many requests at once."""

    def __init__(self, address: Address, *, timeout_seconds: float, writable: bool = False) -> None:
        self._name = str(address)
        name = name_of(address)
        try:
            rados, self._rbd = importlib.import_module("rados"), importlib.import_module("rbd")
        except ImportError as error:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "rbd: addresses need librbd's Python binding",
                path=self._name,
                op="open",
                remedy="install the system's package (python3-rbd of Debian), and use an environment that sees it"
                " (python3 -m venv --system-site-packages)",
            ) from error
        self._errors: tuple[type[Exception], ...] = (rados.Error, self._rbd.Error)
        self._missing: tuple[type[Exception], ...] = (rados.ObjectNotFound, self._rbd.ImageNotFound)
        others = {key: value for key, value in name.options.items() if key not in {"conf", "id"}}
        others.setdefault("rados_osd_op_timeout", f"{timeout_seconds:g}")
        others.setdefault("rados_mon_op_timeout", f"{timeout_seconds:g}")
        self._undo: list[Callable[[], Any]] = []
        try:
            with self._explained("open"):
                configuration = name.options.get("conf", _CONFIGURATION)
                cluster = rados.Rados(conffile=configuration, rados_id=name.options.get("id"), conf=others)
                cluster.connect(timeout=int(timeout_seconds))
                self._undo.append(cluster.shutdown)
                pool = cluster.open_ioctx(name.pool)
                self._undo.append(pool.close)
                pool.set_namespace(name.namespace)
                read_only = not writable or name.snapshot is not None
                self._image = self._rbd.Image(pool, name.image, snapshot=name.snapshot, read_only=read_only)
                self._undo.append(self._image.close)
                # A snapshot stays as it is for good, so its number is the identity of its bytes.
                identity = None if name.snapshot is None else f"{self._image.id()}@{name.snapshot}"
                self.facts = Facts(self._image.size(), identity, 0, writable=not read_only)
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, length: int) -> memoryview:
        """See `tapfs.host.remote.source.Source.read`."""
        with self._explained("read", offset):
            data = memoryview(self._image.read(offset, length))
        if len(data) != length:
            message = f"the cluster gave {len(data)} bytes, not {length}"
            raise ImageError(ErrorKind.IO, message, path=self._name, offset=offset, op="read")
        return data

    def write(self, offset: int, data: bytes) -> None:
        """See `tapfs.host.remote.source.WritableSource.write`."""
        with self._explained("write", offset):
            if data.count(0) == len(data):
                self._image.write_zeroes(offset, len(data))
            else:
                self._image.write(data, offset)

    def flush(self) -> None:
        """See `tapfs.host.remote.source.WritableSource.flush`."""
        with self._explained("flush"):
            self._image.flush()

    def close(self) -> None:
        """Let go of the image and of the cluster."""
        while self._undo:
            self._undo.pop()()

    @contextmanager
    def _explained(self, op: str, offset: int | None = None) -> Generator[None]:
        """Make ImageErrors of the library's errors."""
        try:
            yield
        except self._missing as error:
            raise ImageError(ErrorKind.NOT_FOUND, f"is not there: {error}", path=self._name, op=op) from error
        except self._errors as error:
            message = f"the cluster or the way to it failed: {error}"
            raise ImageError(ErrorKind.IO, message, path=self._name, offset=offset, op=op) from error

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

#: The cluster is asked for the data of at most so many bytes at once.
_MOST_ASKED_BYTES = 64 << 30

#: The signs between the parts of an address; behind a backslash they mean themselves.
_COLON = re.compile(r"(?<!\\):")
_SLASH = re.compile(r"(?<!\\)/")


class RbdName(NamedTuple):
    """What an address says: a pool, maybe a namespace in it, an image, maybe a snapshot, and options of librados."""

    pool: str
    namespace: str
    image: str
    snapshot: str | None
    options: dict[str, str]


def name_of(address: Address) -> RbdName:
    """The parts of an address; a backslash stands before a sign that means itself. Raises ImageError."""
    place, *pairs = (part.replace("\\:", ":") for part in _COLON.split(address.text[len("rbd:") :]))
    steps = [re.sub(r"\\(.)", r"\1", step) for step in _SLASH.split(place)]
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


def is_pool(address: Address) -> bool:
    """Whether an address names a pool, or with a slash at its end a pool or a namespace in one, and no image."""
    place = _COLON.split(address.text[len("rbd:") :])[0]
    steps = _SLASH.split(place)
    return bool(steps[0]) and (len(steps) == 1 or not steps[-1])


def images_of_pool(address: Address, *, timeout_seconds: float = 60) -> list[str]:
    """The addresses of the images of a pool, by their names. Raises ImageError."""
    place, *options = _COLON.split(address.text[len("rbd:") :])
    place = place.removesuffix("/")
    cluster = _Cluster(address, name_of(Address.known(":".join((f"rbd:{place}/*", *options)))), timeout_seconds)
    try:
        with cluster.explained("list"):
            names = sorted(cluster.rbd.RBD().list(cluster.pool))
    finally:
        cluster.close()
    escaped = [name.replace("\\", "\\\\").replace(":", "\\:") for name in names]
    return [":".join((f"rbd:{place}/{name}", *options)) for name in escaped]


class _Cluster:
    """A connection to a cluster, and an open pool of it."""

    def __init__(self, address: Address, name: RbdName, timeout_seconds: float) -> None:
        """Connect. Raises ImageError."""
        self._name = str(address)
        try:
            rados, self.rbd = importlib.import_module("rados"), importlib.import_module("rbd")
        except ImportError as error:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "rbd: addresses need librbd's Python binding",
                path=self._name,
                op="open",
                remedy="install the system's package (python3-rbd of Debian), and use an environment that sees it"
                " (python3 -m venv --system-site-packages)",
            ) from error
        self._errors: tuple[type[Exception], ...] = (rados.Error, self.rbd.Error)
        self._missing: tuple[type[Exception], ...] = (rados.ObjectNotFound, self.rbd.ImageNotFound)
        others = {key: value for key, value in name.options.items() if key not in {"conf", "id"}}
        others.setdefault("rados_osd_op_timeout", f"{timeout_seconds:g}")
        others.setdefault("rados_mon_op_timeout", f"{timeout_seconds:g}")
        #: What takes back what was opened, in order.
        self.undo: list[Callable[[], Any]] = []
        try:
            with self.explained("open"):
                configuration = name.options.get("conf", _CONFIGURATION)
                cluster = rados.Rados(conffile=configuration, rados_id=name.options.get("id"), conf=others)
                cluster.connect(timeout=int(timeout_seconds))
                self.undo.append(cluster.shutdown)
                self.pool = cluster.open_ioctx(name.pool)
                self.undo.append(self.pool.close)
                self.pool.set_namespace(name.namespace)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of all that was opened."""
        while self.undo:
            self.undo.pop()()

    @contextmanager
    def explained(self, op: str, offset: int | None = None) -> Generator[None]:
        """Make ImageErrors of the library's errors."""
        try:
            yield
        except self._missing as error:
            raise ImageError(ErrorKind.NOT_FOUND, f"is not there: {error}", path=self._name, op=op) from error
        except self._errors as error:
            message = f"the cluster or the way to it failed: {error}"
            raise ImageError(ErrorKind.IO, message, path=self._name, offset=offset, op=op) from error


class RbdSource:
    """One image of a cluster: a `tapfs.host.remote.source.WritableSource`. librbd takes many requests at once."""

    def __init__(self, address: Address, *, timeout_seconds: float, writable: bool = False) -> None:
        self._name = str(address)
        name = name_of(address)
        self._cluster = cluster = _Cluster(address, name, timeout_seconds)
        try:
            with cluster.explained("open"):
                read_only = not writable or name.snapshot is not None
                self._image = cluster.rbd.Image(cluster.pool, name.image, snapshot=name.snapshot, read_only=read_only)
                cluster.undo.append(self._image.close)
                # A snapshot stays as it is for good, so its number is the identity of its bytes.
                identity = None if name.snapshot is None else f"{self._image.id()}@{name.snapshot}"
                self.facts = Facts(self._image.size(), identity, 0, writable=not read_only)
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, length: int) -> memoryview:
        """See `tapfs.host.remote.source.Source.read`."""
        with self._cluster.explained("read", offset):
            data = memoryview(self._image.read(offset, length))
        if len(data) != length:
            message = f"the cluster gave {len(data)} bytes, not {length}"
            raise ImageError(ErrorKind.IO, message, path=self._name, offset=offset, op="read")
        return data

    def data_ranges(self, offset: int, length: int) -> tuple[list[tuple[int, int]], int]:
        """See `tapfs.host.remote.source.Mapped.data_ranges`: what the image, or a parent of it in the cluster, has."""
        ranges: list[tuple[int, int]] = []
        stop = offset + min(length, _MOST_ASKED_BYTES)

        def found(start: int, count: int, exists: bool) -> None:  # noqa: FBT001  librbd calls it so
            if exists:
                ranges.append((start, count))

        with self._cluster.explained("ask for the data", offset):
            self._image.diff_iterate(offset, stop - offset, None, found)
        return sorted(ranges), stop

    def write(self, offset: int, data: bytes) -> None:
        """See `tapfs.host.remote.source.WritableSource.write`."""
        with self._cluster.explained("write", offset):
            if data.count(0) == len(data):
                self._image.write_zeroes(offset, len(data))
            else:
                self._image.write(data, offset)

    def flush(self) -> None:
        """See `tapfs.host.remote.source.WritableSource.flush`."""
        with self._cluster.explained("flush"):
            self._image.flush()

    def close(self) -> None:
        """Let go of the image and of the cluster."""
        self._cluster.close()

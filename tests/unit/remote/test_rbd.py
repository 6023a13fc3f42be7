"""Ceph images: their names, and what stands in for librbd, whose package is the system's."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

from tapfs import ErrorKind, ImageError
from tapfs.host.remote.address import Address
from tapfs.host.remote.rbd import RbdSource, name_of


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("rbd:pool/image", ("pool", "", "image", None, {})),
        ("rbd:pool/space/image@one", ("pool", "space", "image", "one", {})),
        (
            "rbd:pool/image:conf=/etc/c.conf:mon_host=a\\:6789:id=me",
            ("pool", "", "image", None, {"conf": "/etc/c.conf", "mon_host": "a:6789", "id": "me"}),
        ),
        ("rbd:p\\/l/image", ("p/l", "", "image", None, {})),
    ],
)
def test_names(text: str, parts: tuple[object, ...]) -> None:
    assert tuple(name_of(Address.known(text))) == parts


@pytest.mark.parametrize("text", ["rbd:image", "rbd:/image", "rbd:pool/", "rbd:a/b/c/d"])
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ImageError) as raised:
        name_of(Address.known(text))
    assert raised.value.kind is ErrorKind.INVALID_ARGUMENT


class FailureError(Exception):
    """An error of librbd."""


class MissingError(FailureError):
    """An image that is not there."""


class Pool:
    """An I/O context."""

    def set_namespace(self, _name: str) -> None: ...
    def close(self) -> None: ...


class Cluster:
    """A connection."""

    def __init__(self, **_how: object) -> None: ...
    def connect(self, *, timeout: int) -> None: ...
    def open_ioctx(self, _name: str) -> Pool:
        return Pool()

    def shutdown(self) -> None: ...


class Image:
    """An image of 1000 bytes."""

    content = bytearray(b"x" * 1000)
    done: list[str] = []  # noqa: RUF012

    def __init__(self, _pool: Pool, name: str, **_how: object) -> None:
        if name != "image":
            raise MissingError(name)

    def id(self) -> str:
        return "7"

    def size(self) -> int:
        return 1000

    def read(self, offset: int, length: int) -> bytes:
        if offset == 666:
            raise FailureError("[errno 110] timed out")
        return bytes(self.content[offset : offset + length])

    def write(self, data: bytes, offset: int) -> None:
        self.content[offset : offset + len(data)] = data
        self.done.append("write")

    def write_zeroes(self, offset: int, length: int) -> None:
        self.content[offset : offset + length] = bytes(length)
        self.done.append("zero")

    def flush(self) -> None:
        self.done.append("flush")

    def close(self) -> None:
        self.done.append("close")


def test_an_image_is_read_written_and_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, Any] = {
        "rados": SimpleNamespace(Rados=Cluster, Error=FailureError, ObjectNotFound=MissingError),
        "rbd": SimpleNamespace(Image=Image, Error=FailureError, ImageNotFound=MissingError),
    }
    monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
    source = RbdSource(Address.known("rbd:pool/image"), timeout_seconds=5, writable=True)
    assert (source.facts.size, source.facts.writable) == (1000, True)
    source.write(10, b"abc")
    source.write(20, bytes(5))
    source.flush()
    assert bytes(source.read(9, 5)) == b"xabcx"
    for offset, said in ((666, "timed out"), (998, "gave 2 bytes")):
        with pytest.raises(ImageError, match=said) as raised:
            source.read(offset, 10)
        assert raised.value.kind is ErrorKind.IO
    source.close()
    assert Image.done == ["write", "zero", "flush", "close"]
    with pytest.raises(ImageError) as raised:
        RbdSource(Address.known("rbd:pool/other"), timeout_seconds=5)
    assert raised.value.kind is ErrorKind.NOT_FOUND
    snapshot = RbdSource(Address.known("rbd:pool/image@one"), timeout_seconds=5, writable=True)
    assert (snapshot.facts.identity, snapshot.facts.writable) == ("7@one", False)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImageError, match="python3-rbd") as raised:
        RbdSource(Address.known("rbd:pool/image"), timeout_seconds=5)
    assert raised.value.kind is ErrorKind.UNSUPPORTED

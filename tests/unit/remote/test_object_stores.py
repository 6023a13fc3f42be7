"""Images in object stores that others wrote: what is there is read, and what is not, or has changed, is told."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.host.remote.address import Address
from tapfs.host.remote.objects import objects_below
from tests.unit.remote.stores import Store, azure, google, overlay, s3

SIZE = 3 << 20


@pytest.fixture(params=[s3, google, azure], ids=["s3", "gs", "az"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    made: Callable[[Callable[[str, str], None]], Iterator[Store]] = request.param
    yield from made(monkeypatch.setenv)


def test_an_object_is_read_until_it_changes(store: Store) -> None:
    content = random.Random(7).randbytes(SIZE)
    store.put("dir/a disk.raw", content)
    with tapfs.open(f"{store.url}/dir/a%20disk.raw", format="raw") as disk:
        assert disk.size == SIZE
        assert disk.read(SIZE - 100, 100) == content[-100:]
    with pytest.raises(ImageError, match="no such object") as raised:
        tapfs.open(f"{store.url}/dir/none", format="raw")
    assert raised.value.kind is ErrorKind.NOT_FOUND
    with tapfs.open(f"{store.url}/dir/a%20disk.raw", format="raw") as disk:
        store.put("dir/a disk.raw", content[::-1])
        with pytest.raises(ImageError, match="has changed since it was opened"):
            disk.read(SIZE - 100, 100)
    store.put("other/disk.raw", b"another")
    listed = objects_below(Address.known(f"{store.url}/dir/"))
    assert listed is not None
    assert [(each.address, each.size) for each in listed] == [(f"{store.url}/dir/a%20disk.raw", SIZE)]


def test_a_chain_in_a_store_is_read_and_nothing_outside_its_root(store: Store) -> None:
    """The overlay is named by the user, its parent by the overlay."""
    assert re.fullmatch(r"(s3|gs|az)://box", store.url)
    content = bytearray(random.Random(8).randbytes(1 << 20))
    store.put("base.raw", bytes(content))
    store.put("over.qcow2", overlay("base.raw", bytes(content), b"changed"))
    with pytest.raises(ImageError, match=r"base\.raw") as raised:
        tapfs.open(f"{store.url}/over.qcow2")
    assert raised.value.kind is ErrorKind.DENIED
    content[:7] = b"changed"
    with tapfs.open(f"{store.url}/over.qcow2", gate=tapfs.Gate.inside(f"{store.url}/")) as disk:
        assert disk.read(0, disk.size) == content

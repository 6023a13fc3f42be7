"""A source elsewhere that claims a length which no file has is refused, before anything is made as long."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tapfs import ErrorKind, ImageError
from tapfs.host.remote import source
from tapfs.host.remote.address import Address
from tapfs.host.remote.options import USUAL, RemoteOptions
from tapfs.host.remote.source import Facts


@pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1, -1])
@pytest.mark.parametrize("opens", [source.open_source, source.open_writable])
def test_a_length_that_no_file_has_is_an_error(
    monkeypatch: pytest.MonkeyPatch, opens: Callable[[Address, RemoteOptions], object], size: int
) -> None:
    closed: list[int] = []
    found = SimpleNamespace(facts=Facts(size, None, 0, writable=True), close=lambda: closed.append(size))

    def open_it(*_: object, **__: object) -> SimpleNamespace:
        return found

    monkeypatch.setattr(source, "_opened", open_it)
    monkeypatch.setattr(source, "_served", open_it)
    address = Address.parse("nbd://127.0.0.1/disk")
    assert address is not None
    with pytest.raises(ImageError, match="no file has as many") as raised:
        opens(address, USUAL)
    assert raised.value.kind is ErrorKind.CORRUPT
    assert closed == [size]

"""The processor's CRC-32C is that of the definition, at any address and length, and drivers get it."""

from __future__ import annotations

import importlib
import random

import pytest

from tapfs import checksums
from tapfs.kernel import crc32c as by_engine
from tapfs.kernel._engine import lib


def test_it_is_the_same_as_in_python() -> None:
    importlib.import_module("tapfs.kernel.engine")  # who loads the engine gives its function to drivers
    if not lib.tapfs_has_crc32c():
        assert checksums._sum is checksums.in_python
        return
    choice = random.Random(1)
    data = choice.randbytes(5000) + bytes(3000)
    assert by_engine.crc32c(b"123456789") == 0xE3069283
    for _ in range(200):
        start = choice.randrange(len(data))
        piece = data[start : start + choice.choice([0, 1, 7, 8, 9, 63, 64, 5000])]
        assert by_engine.crc32c(piece) == checksums.in_python(piece)
    assert checksums._sum is by_engine.crc32c


def test_either_is_used_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    before = checksums.crc32c(b"some bytes")
    monkeypatch.setattr(checksums, "_sum", checksums.in_python)
    assert checksums.crc32c(b"some bytes") == before

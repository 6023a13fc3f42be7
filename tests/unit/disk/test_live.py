"""Changes of an image that is served: what is durable when they return."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tapfs
from tapfs.disk.live import resized

SIZE = 1 << 20


def test_a_new_length_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(SIZE))
    durable: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: durable.append(os.fstat(descriptor).st_size))
    with tapfs.open(path, format="raw", writable=True) as image:
        larger = resized(image, 2 * SIZE, force=False)
        assert durable == [2 * SIZE]
        assert larger.size == 2 * SIZE
        larger.abandon()

"""The guard of metadata that the engine is told, also after it had no memory to take it."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

import tapfs
from tapfs.errors import ImageError
from tapfs.kernel import tables


def test_a_guard_that_found_no_memory_is_set_by_the_next_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.qcow2"
    tapfs.create(path, "qcow2", 64 << 20, options={"cluster_size": "4096"})
    with tapfs.open(path, format="qcow2", writable=True) as disk:
        real, counts = tables.lib, list[int]()

        class Poor:
            """The engine's functions, of which one has no memory."""

            enough = True

            def __getattr__(self, name: str) -> object:
                return getattr(real, name)

            def tapfs_disk_guard(self, *words: Any) -> int:
                if not self.enough:
                    return -errno.ENOMEM
                counts.append(words[5])
                return real.tapfs_disk_guard(*words)

        poor = Poor()
        monkeypatch.setattr(tables, "lib", poor)
        disk.write(0, b"1" * 4096)
        poor.enough = False
        told = len(counts)
        with pytest.raises((ImageError, MemoryError)) as raised:
            disk.flush()
        # The error is kept, and with it the frames that raised it, while the driver makes another table.
        disk.write(32 << 20, b"2" * 4096)
        poor.enough = True
        disk.flush()
        assert len(counts) > told, "the engine was never told"
        assert raised.value
    assert tapfs.check(path, format="qcow2").corruptions == 0

"""A parent whose host takes its time: it stops who needs its map, and nobody else."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs.extent import Extent
from tapfs.formats.qcow.driver import QcowDriver

SIZE = 4 << 20
CLUSTER = 4096


def ended(call: Callable[[], object]) -> object:
    """What a call gives that nothing may stop."""
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(call()), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "it waits for the parent"
    return results[0]


def test_commits_and_reads_of_the_top_layer_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The drivers are asked for every map.
    monkeypatch.setattr(QcowDriver, "table_layout", lambda _: None)
    base, top = tmp_path / "base.qcow", tmp_path / "top.qcow"
    tapfs.create(str(base), "qcow", SIZE)
    with tapfs.open(base, writable=True) as disk:
        disk.write(0, b"b" * SIZE)
    tapfs.create(str(top), "qcow", backing=str(base), backing_format="qcow")
    asked, answer = threading.Event(), threading.Event()
    with tapfs.open(top, writable=True) as disk:
        disk.write(0, b"t" * CLUSTER)
        parent = disk.layers[1].driver
        map_of_parent = parent.map

        def slow(offset: int, length: int) -> list[Extent]:
            asked.set()
            assert answer.wait(60)
            return map_of_parent(offset, length)

        monkeypatch.setattr(parent, "map", slow)
        found: list[bytes] = []
        reader = threading.Thread(target=lambda: found.append(disk.read(SIZE // 2, 2 * CLUSTER)))
        reader.start()
        mapped: list[int] = []
        mapper = threading.Thread(target=lambda: mapped.extend(run.depth for run in disk.extents(SIZE // 4, CLUSTER)))
        mapper.start()
        try:
            assert asked.wait(60)
            for number in range(1, 20):
                ended(lambda number=number: disk.write(number * CLUSTER, bytes([number]) * CLUSTER))  # type: ignore[misc]
            assert ended(lambda: disk.read(0, CLUSTER)) == b"t" * CLUSTER
            assert ended(lambda: disk.read(19 * CLUSTER, CLUSTER)) == bytes([19]) * CLUSTER
            ended(disk.flush)
            ended(lambda: disk.write_zeroes(CLUSTER, CLUSTER))
            ended(lambda: disk.write(CLUSTER, b"again"))
            assert ended(lambda: {run.depth for run in disk.extents(0, 20 * CLUSTER)}) == {0}
            ended(lambda: disk.description(None))
            assert not found
            assert not mapped
        finally:
            answer.set()
            reader.join()
            mapper.join()
        assert found == [b"b" * (2 * CLUSTER)]
        assert mapped == [1]
        assert disk.read(CLUSTER, CLUSTER) == b"again".ljust(CLUSTER, b"\0")
    assert tapfs.check(top).corruptions == 0

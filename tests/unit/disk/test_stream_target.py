"""Filling an image as a stream keeps its metadata in bounds and is whole in the end."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import tapfs
from tapfs.disk import stream_target
from tapfs.driver import Codec
from tapfs.jobs import create
from tapfs.jobs.create import NewImage
from tapfs.kernel.engine import compress

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

CLUSTER = 4096


def test_metadata_that_is_drained_on_the_way_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_target, "_UNFLUSHED_LIMIT", 5000)
    generator = random.Random(1)
    content = bytearray()
    path = tmp_path / "packed.qcow"
    with create.new_image(str(path), NewImage("qcow", 2500 * CLUSTER)) as image:
        stream = image.stream_writer()
        held = 0
        for number in range(2500):
            kind = generator.choice(("text", "noise", "hole"))
            data = generator.randbytes(CLUSTER) if kind == "noise" else bytes(CLUSTER)
            if kind == "text":
                data = bytes(generator.choices(b"abc", k=CLUSTER))
                (payload,) = compress(Codec.RAW_DEFLATE, data, CLUSTER)
                assert payload is not None
                stream.write_compressed(number * CLUSTER, payload)
            elif kind == "noise":
                stream.write_plain(number * CLUSTER, data)
            held = max(held, image.unflushed_bytes)
            content += data
        stream.finish()
    assert held < 20_000  # all of the tables would be 5 * 4096
    report = tapfs.check(path)
    assert (report.corruptions, report.leaks) == (0, 0)
    with tapfs.open(path) as image:
        assert image.read(0, image.size) == content

"""Edits: the plans of a change to an image as a whole, executed one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs.disk.chain import Layer, OpenOptions
from tapfs.errors import ErrorKind, ImageError
from tapfs.jobs.editing import edit_image
from tapfs.plan import Copy, Grow, Plan, Shorten, Write, plan

RAW = OpenOptions(format="raw")


def test_each_plan_is_on_the_disk_before_the_next_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"first")

    def edit(layer: Layer) -> Iterator[Plan]:
        yield plan([Grow(0, 4096)], [Copy(0, 100, 0, 5)])
        assert layer.file.read(100, 5) == b"first"
        yield plan([Write(0, 0, b"second")], [Shorten(0, 105)])
        assert path.stat().st_size == 105

    edit_image(str(path), RAW, edit)
    assert path.read_bytes() == b"second".ljust(100, b"\0") + b"first"


def test_an_image_in_use_is_not_edited(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(512))
    with tapfs.open(path, format="raw", writable=True), pytest.raises(ImageError) as caught:
        edit_image(str(path), RAW, lambda _: iter([plan([Write(0, 0, b"x")])]))
    assert caught.value.kind is ErrorKind.LOCKED
    assert path.read_bytes() == bytes(512)

"""`tapfs bitmap`, `map --bitmap`, and the bitmaps that `info` shows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as api
from tests.conftest import Ran

Run = Callable[..., Ran]


@pytest.fixture
def image(tapfs: Run, tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    assert tapfs("create", "-q", "-f", "qcow2", path, "8M").code == 0
    return path


def marked(path: Path, name: str) -> list[tuple[int, int]]:
    with api.read_bitmap(path, name) as found:
        return [(each.offset, each.length) for each in found.ranges]


def test_a_bitmap_is_added_changed_and_removed(tapfs: Run, image: Path) -> None:
    assert tapfs("bitmap", image).out == f"{image}: no bitmaps\n"
    assert tapfs("bitmap", "--add", image, "a") == (0, "", "")
    assert tapfs("bitmap", "--add", "--disable", "-g", "4K", image, "b") == (0, "", "")
    lines = [line.split() for line in tapfs("bitmap", image).out.splitlines()]
    assert lines == [
        ["NAME", "GRANULARITY", "ENABLED", "CONSISTENT"],
        ["a", "64", "KiB", "yes", "yes"],
        ["b", "4", "KiB", "no", "yes"],
    ]
    assert "bitmaps:        a: granularity 64 KiB, enabled, consistent" in tapfs("info", image).out
    assert "b: granularity 4 KiB, not enabled, consistent" in tapfs("info", image).out
    assert tapfs("bitmap", "--enable", image, "b").code == 0
    found = json.loads(tapfs("bitmap", "--remove", image, "a", "--json").out)
    assert found["path"] == os.fspath(image)
    assert found["bitmaps"] == [{"name": "b", "granularity": 4096, "enabled": True, "consistent": True}]
    assert tapfs("check", "-q", image).code == 0


def test_bitmaps_are_merged_in_one_image_and_from_another(tapfs: Run, image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    tapfs("create", "-q", "-f", "qcow2", other, "8M")
    for path, name, start in ((image, "a", 1 << 20), (image, "b", 3 << 20), (other, "c", 5 << 20)):
        api.add_bitmap(path, name, granularity=512)
        api.store_bitmap(path, name, [(start, 1000)])
    assert (
        tapfs("bitmap", "--merge", "b", "--merge", "c", "-b", other, "-F", "qcow2", image, "a").code == 17
    )  # no "b" there
    assert tapfs("bitmap", "--merge", "b", image, "a").code == 0
    assert tapfs("bitmap", "--merge", "c", "-b", other, "-F", "qcow2", image, "a").code == 0
    assert marked(image, "a") == [(1 << 20, 1024), (3 << 20, 1024), (5 << 20, 1024)]
    assert tapfs("bitmap", "--clear", "--merge", "b", image, "a").code == 0
    assert marked(image, "a") == [(3 << 20, 1024)]
    smaller = tmp_path / "smaller.qcow2"
    tapfs("create", "-q", "-f", "qcow2", smaller, "4M")
    api.add_bitmap(smaller, "s")
    ran = tapfs("bitmap", "--merge", "s", "-b", smaller, image, "a")
    assert ran.code == 64
    assert "does not fit" in ran.err


def test_the_map_of_a_bitmap(tapfs: Run, image: Path) -> None:
    api.add_bitmap(image, "a", granularity=4096)
    api.store_bitmap(image, "a", [(0, 1), (1 << 20, 8192), ((8 << 20) - 1, 1)])
    assert [line.split() for line in tapfs("map", "--bitmap", "a", image).out.splitlines()] == [
        ["Offset", "Length", "Size"],
        ["0x0", "0x1000", "4", "KiB"],
        ["0x100000", "0x2000", "8", "KiB"],
        ["0x7ff000", "0x1000", "4", "KiB"],
    ]
    document = json.loads(tapfs("map", "--bitmap", "a", "-s", "1K", "-l", "2M", "--json", image).out)
    assert (document["name"], document["granularity"]) == ("a", 4096)
    assert [(each["start"], each["length"], each["dirty"]) for each in document["extents"]] == [
        (1024, 3072, True),
        (4096, (1 << 20) - 4096, False),
        (1 << 20, 8192, True),
        ((1 << 20) + 8192, (1 << 20) + 1024 - 8192, False),
    ]
    whole = json.loads(tapfs("map", "--bitmap", "a", "--output=json", image).out)["extents"]
    assert sum(each["length"] for each in whole) == 8 << 20
    assert whole[-1]["dirty"]
    assert json.loads(tapfs("map", "--bitmap", "a", "-s", "8M", "--json", image).out)["extents"] == []
    assert tapfs("map", "--bitmap", "a", "--snapshot", "x", image).code == 64
    assert tapfs("map", "--bitmap", "b", image).code == 17


def test_a_bitmap_that_follows_no_more_is_said_to(tapfs: Run, image: Path) -> None:
    api.add_bitmap(image, "a")
    data = bytearray(image.read_bytes())
    data[95] = 0  # a writer that does not know bitmaps has cleared the bit
    image.write_bytes(data)
    ran = tapfs("map", "--bitmap", "a", image)
    assert ran.code == 2
    assert "bitmap 'a' is inconsistent: the disk has changed without it" in ran.err
    assert "enabled, not consistent" in tapfs("info", image).out
    assert tapfs("bitmap", "--remove", image, "a").code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a",), "say what to do with NAME"),
        (("--add",), "NAME is needed"),
        (("--remove", "-g", "4096", "a"), "-g goes with --add"),
        (("--add", "-b", "x", "a"), "-b goes with --merge"),
        (("--merge", "x", "-F", "raw", "a"), "-F is the format of -b FILE"),
        (("--add", "-g", "x", "a"), "not a size"),
    ],
)
def test_words_that_make_no_sense(tapfs: Run, image: Path, words: tuple[str, ...], message: str) -> None:
    options, names = [word for word in words if word != "a"], [word for word in words if word == "a"]
    ran = tapfs("bitmap", *options, image, *names)
    assert ran.code == 64
    assert message in ran.err


def test_formats_without_bitmaps_say_so(tapfs: Run, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(4096))
    for words in ((), ("--add", "a"), ("--merge", "x", "a")):
        options, names = words[:-1], words[-1:]
        ran = tapfs("bitmap", *options, "-f", "raw", tmp_path / "raw", *names)
        assert ran.code == 12
        assert "raw images keep no bitmaps" in ran.err


def test_python(image: Path) -> None:
    api.add_bitmap(image, "a", enabled=False)
    assert [(each.name, each.enabled) for each in api.bitmaps(image)] == [("a", False)]
    api.store_bitmap(image, "a", [(70_000, 10)])
    assert marked(image, "a") == [(65536, 65536)]
    api.enable_bitmap(image, "a")
    api.disable_bitmap(image, "a")
    api.add_bitmap(image, "b")
    api.merge_bitmap(image, "b", "a")
    assert marked(image, "b") == marked(image, "a")
    api.clear_bitmap(image, "b")
    assert marked(image, "b") == []
    api.remove_bitmap(image, "a")
    assert [each.name for each in api.bitmaps(image)] == ["b"]

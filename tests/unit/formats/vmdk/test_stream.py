"""streamOptimized disks as tapfs writes them: every byte of the layout, by a reader that walks the markers."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tapfs as tapfs_package
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vmdk.descriptor import parse_descriptor
from tapfs.jobs.create import NewImage
from tests.conftest import Ran

Run = Callable[..., Ran]
DONE = (0, "", "")
GRAIN = 65536
SPAN = 512 * GRAIN
#: streamOptimized by name, and what goes with it.
OPTIONS = ["-O", "vmdk", "-o", "subformat=streamOptimized"]


def walked(content: bytes) -> Iterator[tuple[str, int, bytes]]:
    """The sections behind the header in their order: what it is, where, and its content."""
    at = 128 * 512
    while at < len(content):
        value, size, kind = struct.unpack_from("<QII", content, at)
        if size:
            payload = content[at + 12 : at + 12 + size]
            end = at + -(-(12 + size) // 512) * 512
            assert not any(content[at + 12 + size : end])
            yield "grain", value, zlib.decompress(payload)
            at = end
            continue
        assert not any(content[at + 16 : at + 512])
        name = {0: "end", 1: "table", 2: "directory", 3: "footer"}[kind]
        yield name, at + 512, content[at + 512 : at + 512 + value * 512]
        at += 512 + value * 512


def converted(tapfs: Run, tmp_path: Path, disk: bytes, *options: str) -> bytes:
    raw, image = tmp_path / "raw", tmp_path / "disk.vmdk"
    raw.write_bytes(disk)
    assert tapfs("convert", "-f", "raw", *options, *OPTIONS, raw, image) == DONE
    assert tapfs("compare", "-f", "raw", raw, image).code == 0
    return image.read_bytes()


@pytest.mark.parametrize("options", [[], ["-c"]])
def test_the_layout(tmp_path: Path, tapfs: Run, options: list[str]) -> None:
    choice = random.Random(1)
    size = 3 * SPAN + 100 * 1024
    disk = bytearray(size)
    parts = {
        0: choice.randbytes(GRAIN),
        7: b"text" * (GRAIN // 4),
        3 * 512: b"more" * 1000,
        3 * 512 + 1: b"last" * 9000,
    }
    for number, data in parts.items():
        disk[number * GRAIN : number * GRAIN + len(data)] = data
    content = converted(tapfs, tmp_path, bytes(disk), *options)
    sections = list(walked(content))
    names = [name for name, _, _ in sections]
    # Tables 1 and 2 have no grains, and are left out.
    assert names == ["grain", "grain", "table", "grain", "grain", "table", "directory", "footer", "end"]
    grains = [(lba // 128, data) for name, lba, data in sections if name == "grain"]
    assert grains == [(number, data.ljust(GRAIN, b"\0")) for number, data in parts.items()]
    tables = [(at, data) for name, at, data in sections if name == "table"]
    (directory_at, directory), (_, footer) = sections[6][1:], sections[7][1:]
    assert struct.unpack_from("<4I", directory) == (tables[0][0] // 512, 0, 0, tables[1][0] // 512)
    for (_, table), numbers in zip(tables, ([0, 7], [0, 1]), strict=True):
        entries = struct.unpack("<512I", table)
        assert [number for number, entry in enumerate(entries) if entry] == numbers
        for number in numbers:
            assert struct.unpack_from("<Q", content, entries[number] * 512)[0] % SPAN // 128 % 512 == number
    header = content[:512]
    assert struct.unpack_from("<4sIIQQQQIQQQB4sH", header) == (
        *(b"KDMV", 3, 0x30001, size // 512, 128, 1, 20, 512, 0, (1 << 64) - 1, 128, 0, b"\n \r\n", 1),
    )
    assert footer == header[:56] + struct.pack("<Q", directory_at // 512) + header[64:]
    said = parse_descriptor(content[512 : 512 * 21], "x")
    assert said.create_type == "streamOptimized"
    assert said.value("ddb.adaptertype") == "ide"
    assert said.value("ddb.virtualhwversion") == "4"


def test_compression_is_streamoptimized(tmp_path: Path, tapfs: Run) -> None:
    raw, image = tmp_path / "raw", tmp_path / "disk.vmdk"
    raw.write_bytes(b"text" * 50_000)
    assert tapfs("convert", "-c", "-f", "raw", "-O", "vmdk", raw, image) == DONE
    assert b'createType="streamOptimized"' in image.read_bytes()[:2048]
    ran = tapfs("convert", "-c", "-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", raw, image)
    assert ran.code == 12
    assert "subformat=monolithicFlat is not written compressed" in ran.err


@pytest.mark.parametrize("size", [512, GRAIN, SPAN + 512])
def test_empty_disks(tmp_path: Path, tapfs: Run, size: int) -> None:
    content = converted(tapfs, tmp_path, bytes(size))
    assert [name for name, _, _ in walked(content)] == ["directory", "footer", "end"]
    made = tmp_path / "made.vmdk"
    assert tapfs("create", "-f", "vmdk", "-o", "subformat=streamOptimized", made, str(size)) == DONE
    assert len(made.read_bytes()) == len(content)
    assert tapfs("check", made).code == 0


def test_what_does_not_shrink_is_packed_all_the_same(tmp_path: Path, tapfs: Run) -> None:
    noise = random.Random(2).randbytes(5 * GRAIN)
    content = converted(tapfs, tmp_path, noise)
    assert b"".join(data for name, _, data in walked(content) if name == "grain") == noise
    assert len(content) < len(noise) * 1.02 + 80 * 1024


def test_tables_are_written_as_the_stream_goes_on(tmp_path: Path, tapfs: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tapfs.disk.stream_target._UNFLUSHED_LIMIT", 1)
    disk = bytearray(6 * SPAN)
    for index in range(6):
        disk[index * SPAN + 1000] = index + 1
    names = [name for name, _, _ in walked(converted(tapfs, tmp_path, bytes(disk)))]
    assert names == ["grain", "table"] * 6 + ["directory", "footer", "end"]


def test_it_is_written_once(tmp_path: Path, tapfs: Run) -> None:
    path = tmp_path / "disk.vmdk"
    assert tapfs("create", "-f", "vmdk", "-o", "subformat=streamOptimized", path, "1M") == DONE
    with pytest.raises(ImageError) as raised:
        tapfs_package.open(path, writable=True)
    assert raised.value.kind is ErrorKind.READ_ONLY
    assert "another subformat" in (raised.value.remedy or "")
    new = NewImage("vmdk", 1 << 20, options={"subformat": "streamOptimized"})
    from tapfs.jobs.create import new_image

    with pytest.raises(ImageError) as raised, new_image(str(tmp_path / "new.vmdk"), new) as image:
        image.write(0, b"x")
    assert raised.value.kind is ErrorKind.READ_ONLY
    assert not (tmp_path / "new.vmdk").exists()


@pytest.mark.parametrize("more", ["zeroed_grain=on"])
def test_options_that_do_not_go_with_it(tmp_path: Path, tapfs: Run, more: str) -> None:
    path = tmp_path / "disk.vmdk"
    assert tapfs("create", "-f", "vmdk", "-o", f"subformat=streamOptimized,{more}", path, "1M").code == 12
    assert tapfs("create", "-f", "vmdk", path, "1M") == DONE
    child = tmp_path / "child.vmdk"
    ran = tapfs("create", "-f", "vmdk", "-o", "subformat=streamOptimized", "-b", path, "-F", "vmdk", child)
    assert ran.code == 12
    assert "sparse and writable" in ran.err


def test_disks_over_two_tib(tmp_path: Path, tapfs: Run) -> None:
    path = tmp_path / "disk.vmdk"
    assert tapfs("create", "-f", "vmdk", "-o", "subformat=streamOptimized", path, "10T") == DONE
    assert tapfs("map", path).code == 0
    assert tapfs("create", "-f", "vmdk", "-o", "subformat=streamOptimized", tmp_path / "x", "63T").code != 0

"""qcow2 images made by hand: every kind of entry, extension and name, and what of a damaged header is refused."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.driver import BackingReference, OpenRequest, Severity
from tapfs.extent import Extent, Kind
from tapfs.formats.qcow2 import FORMAT
from tapfs.formats.qcow2.backing import backing_reference
from tapfs.testing.model import MemoryFile, read_extents
from tests.conftest import Ran
from tests.qcow2_images import COMPRESSED, COPIED, ZERO, Plain, by_hand, deflated, packed_entry

Run = Callable[..., Ran]

BITS = 12
CLUSTER = 1 << BITS
SIZE = 6 * CLUSTER
NOISE = random.Random(1).randbytes(CLUSTER)


def plain(**changes: Any) -> Plain:
    """An image of six clusters of 4 KiB: data, nothing, zeros, and whatever the changes say."""
    wanted: dict[str, Any] = {"size": SIZE, "cluster_bits": BITS, "content": {5: NOISE}}
    wanted["entries"] = {0: 5 * CLUSTER | COPIED}
    return Plain(**(wanted | changes))


def mapped(data: bytes, **request: Any) -> list[Extent]:
    driver = FORMAT.open(MemoryFile(data), OpenRequest(**request))
    return driver.map(0, driver.geometry.virtual_size)


def error(data: bytes, **request: Any) -> ImageError:
    with pytest.raises(ImageError) as raised:
        mapped(data, **request)
    assert raised.value.path == "memory.img"
    return raised.value


def test_entries_of_every_kind(tmp_path: Path) -> None:
    payload = deflated(b"packed " * 585 + b"\0")
    entries = {
        0: 5 * CLUSTER | COPIED,
        1: ZERO,
        2: 6 * CLUSTER | COPIED | ZERO,
        3: packed_entry(7 * CLUSTER + 100, len(payload), BITS),
        5: 6 * CLUSTER | COPIED,
    }
    content = {5: NOISE, 6: NOISE[::-1], 7: bytes(100) + payload}
    data = plain(entries=entries, content=content).build()
    kinds = [(extent.offset, extent.kind, extent.in_place) for extent in mapped(data, writable=False)]
    assert kinds == [
        (0, Kind.DATA, False),
        (CLUSTER, Kind.ZERO, False),
        (3 * CLUSTER, Kind.COMPRESSED, False),
        (4 * CLUSTER, Kind.UNALLOCATED, False),
        (5 * CLUSTER, Kind.DATA, False),
    ]
    backing = b"B" * SIZE
    expected = by_hand(data, backing)
    assert expected[4 * CLUSTER : 5 * CLUSTER] == b"B" * CLUSTER
    assert expected[3 * CLUSTER : 4 * CLUSTER] == b"packed " * 585 + b"\0"
    driver = FORMAT.open(MemoryFile(data), OpenRequest())
    assert read_extents(driver, MemoryFile(data), 0, SIZE, backing) == expected
    (tmp_path / "a").write_bytes(data)
    with tapfs.open(tmp_path / "a") as disk:
        assert disk.format_name == "qcow2"
        assert disk.read(0, SIZE) == by_hand(data)


@pytest.mark.parametrize("bits", [9, 12, 16, 21])
def test_the_fields_of_a_compressed_entry_move_with_the_cluster(tmp_path: Path, bits: int) -> None:
    cluster = 1 << bits
    content = (b"%d clusters " % bits * cluster)[:cluster]
    payload = deflated(content)
    start = 5 * cluster + 77  # the payload crosses into the next cluster where it is as long
    image = Plain(
        2 * cluster,
        bits,
        entries={1: packed_entry(start, len(payload), bits)},
        content={5: bytes(77) + payload},
        file_clusters=7,
    )
    (tmp_path / "a").write_bytes(image.build())
    with tapfs.open(tmp_path / "a") as disk:
        assert disk.read(0, 2 * cluster) == bytes(cluster) + content
        assert disk.read(cluster + 5, 100) == content[5:105]


def test_a_file_that_was_cut_inside_a_cluster_is_corrupt(tmp_path: Path) -> None:
    data = plain(entries={0: 7 * CLUSTER | COPIED}, content={7: NOISE}).build()[: 7 * CLUSTER + 700]
    (tmp_path / "a").write_bytes(data)
    message = f"the file was cut: it ends {CLUSTER - 700} bytes before the data does"
    with tapfs.open(tmp_path / "a") as disk, pytest.raises(ImageError, match=message) as raised:
        disk.read(0, SIZE)
    assert raised.value.kind is ErrorKind.CORRUPT
    (finding,) = tapfs.check(tmp_path / "a").findings
    assert (finding.severity, finding.host_offset) == (Severity.CORRUPTION, raised.value.offset)
    assert finding.message.endswith(message)


def test_a_file_may_end_where_the_disk_does(tmp_path: Path) -> None:
    entries, last = {0: 7 * CLUSTER | COPIED, 1: 8 * CLUSTER | COPIED}, CLUSTER + 512
    image = plain(entries=entries, content={7: NOISE, 8: NOISE}, size=last, file_clusters=9)
    (tmp_path / "a").write_bytes(image.build()[: 8 * CLUSTER + 512])
    with tapfs.open(tmp_path / "a") as disk:
        assert disk.read(0, last) == NOISE + NOISE[:512]
    assert not any("was cut" in each.message for each in tapfs.check(tmp_path / "a").findings)


IMPOSSIBLE = {
    "past the end": (9 * CLUSTER | COPIED, "past the end of the file"),
    "packed past the end": (packed_entry(9 * CLUSTER, 100, BITS), "past the end of the file"),
    "unaligned": (5 * CLUSTER + 512 | COPIED, "not aligned to a cluster"),
    "the header": (packed_entry(300, 100, BITS), "inside the header"),
    "the L1 table": (3 * CLUSTER | COPIED, "inside the L1 table"),
    "the refcount table": (CLUSTER | COPIED, "inside the refcount table"),
    "packed and owned alone": (COMPRESSED | COPIED | 5 * CLUSTER, "is compressed and says that it is owned alone"),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_an_entry_that_cannot_be_true_is_an_error_at_its_place(tmp_path: Path, kind: str) -> None:
    """Some readers give zeros there and say nothing."""
    entry, says = IMPOSSIBLE[kind]
    data = plain(entries={2: entry}).build()
    found = error(data)
    assert (found.kind, found.offset) == (ErrorKind.CORRUPT, 4 * CLUSTER + 16)
    assert says in found.message
    assert found.message.startswith("L2 entry 2 of table 0: ")
    (tmp_path / "a").write_bytes(data)
    with tapfs.open(tmp_path / "a") as disk, pytest.raises(ImageError, match=says):
        disk.read(0, SIZE)


def test_version_2_knows_no_zeros() -> None:
    data = plain(version=2, entries={1: 5 * CLUSTER | COPIED | ZERO}).build()
    assert "version 2 does not know" in error(data).message
    assert "version 2 does not know" in error(plain(version=2, entries={1: ZERO}).build()).message


def test_subclusters() -> None:
    bits, cluster = 16, 1 << 16
    sub = cluster // 32
    entries = {
        0: (5 * cluster | COPIED, 0b0111 | 0b1000 << 32),
        1: (0, 0xFFFFFFFF << 32),
        2: (6 * cluster | COPIED, 0),
        3: (6 * cluster | COPIED, 0xFFFFFFFF),
    }
    image = Plain(4 * cluster, bits, entries=entries, content={5: NOISE * 16, 6: NOISE[::-1] * 16}, incompatible=16)
    data = image.build()
    shown = [(each.offset // sub, each.length // sub, each.kind) for each in mapped(data)]
    assert shown == [
        (0, 3, Kind.DATA),
        (3, 1, Kind.ZERO),
        (4, 28, Kind.UNALLOCATED),
        (32, 32, Kind.ZERO),
        (64, 32, Kind.UNALLOCATED),
        (96, 32, Kind.DATA),
    ]
    driver = FORMAT.open(MemoryFile(data), OpenRequest())
    backing = b"below" * cluster
    assert read_extents(driver, MemoryFile(data), 0, 4 * cluster, backing) == by_hand(data, backing)
    for words, says in (((5 * cluster, 1 | 1 << 32), "allocated and zero"), ((0, 1), "no place")):
        assert says in error(Plain(4 * cluster, bits, entries={1: words}, incompatible=16).build()).message
    packed = Plain(4 * cluster, bits, entries={1: (packed_entry(5 * cluster, 99, bits), 1)}, incompatible=16)
    assert "is compressed and has subclusters" in error(packed.build()).message


# -- header ----------------------------------------------------------------------------------------


def changed(at: int, number: int, width: int = 4, **image: Any) -> bytes:
    data = bytearray(plain(**image).build())
    data[at : at + width] = number.to_bytes(width, "big")
    return bytes(data)


REFUSED: dict[str, tuple[bytes, ErrorKind, int, str]] = {
    "magic": (b"QFI\xfc" + bytes(4096), ErrorKind.INVALID_FORMAT, 0, "no qcow2 magic"),
    "cut": (plain().build()[:80], ErrorKind.INVALID_FORMAT, 0, "ends inside the header"),
    "version": (changed(4, 4), ErrorKind.INVALID_FORMAT, 4, "qcow version 4"),
    "small clusters": (changed(20, 8), ErrorKind.INVALID_FORMAT, 20, "cluster_bits is 8"),
    "large clusters": (changed(20, 22), ErrorKind.INVALID_FORMAT, 20, "cluster_bits is 22"),
    "size": (changed(24, 1 << 63, 8), ErrorKind.OUT_OF_BOUNDS, 24, "must be below 2^63"),
    "more than L1 maps": (changed(24, 1 << 40, 8), ErrorKind.INVALID_FORMAT, 36, "too small for the disk"),
    "cipher": (changed(32, 3), ErrorKind.UNSUPPORTED, 32, "crypt_method is 3"),
    "LUKS": (changed(32, 2), ErrorKind.CORRUPT, 32, "no header extension says where the LUKS header is"),
    "huge L1": (changed(36, 0x7FFFFFFF), ErrorKind.OUT_OF_BOUNDS, 36, "the limit is 33554432"),
    "L1 off a cluster": (changed(40, 3 * CLUSTER + 512, 8), ErrorKind.CORRUPT, 40, "not on a cluster"),
    "L1 past the end": (changed(40, 80 * CLUSTER, 8), ErrorKind.CORRUPT, 40, "past the end of the file"),
    "huge refcount table": (changed(56, 0x7FFFFFFF), ErrorKind.OUT_OF_BOUNDS, 56, "the limit is 8388608"),
    "snapshots": (changed(60, 1 << 20), ErrorKind.OUT_OF_BOUNDS, 60, "the limit is 65536"),
    "refcount order": (changed(96, 7), ErrorKind.INVALID_FORMAT, 96, "refcount_order is 7"),
    "short header": (changed(100, 96), ErrorKind.INVALID_FORMAT, 100, "header_length is 96"),
    "long header": (changed(100, CLUSTER + 8), ErrorKind.INVALID_FORMAT, 100, "header_length is"),
    "long name": (changed(16, 1024, backing=b"x"), ErrorKind.INVALID_FORMAT, 16, "the limit is 1023"),
    "name outside": (changed(8, CLUSTER - 2, 8, backing=b"base"), ErrorKind.INVALID_FORMAT, 8, "in the first cluster"),
    "type without bit": (changed(104, 1, 1), ErrorKind.INVALID_FORMAT, 104, "disagree"),
    "bit without type": (changed(72, 8, 8), ErrorKind.INVALID_FORMAT, 104, "disagree"),
    "unknown type": (changed(104, 2, 1, incompatible=8), ErrorKind.UNSUPPORTED, 104, "compression type 2 is unknown"),
    "small subclusters": (changed(72, 16, 8), ErrorKind.INVALID_FORMAT, 20, "extended L2 entries"),
    "extension": (changed(116, 99999, extensions=[(77, b"x")]), ErrorKind.CORRUPT, 112, "does not fit"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_header_that_cannot_be_is_refused_at_its_field(kind: str) -> None:
    data, expected, offset, says = REFUSED[kind]
    found = error(data)
    assert (found.kind, found.offset, found.op) == (expected, offset, "open")
    assert says in found.message


def test_an_unknown_feature_is_refused_by_its_name() -> None:
    names = struct.pack(">BB46s", 1, 5, b"other sort") + struct.pack(">BB46s", 0, 5, b"time travel")
    data = plain(incompatible=1 << 5 | 1 << 9, extensions=[(0x6803F857, names)]).build()
    found = error(data)
    assert found.kind is ErrorKind.UNSUPPORTED
    assert found.message == "needs features that tapfs does not know: time travel, bit 9"


@pytest.mark.parametrize(("bit", "says"), [(1, "was not closed after writing"), (2, "is marked as corrupt")])
def test_an_image_that_is_dirty_or_corrupt_is_read_with_a_note(bit: int, says: str) -> None:
    data = plain(incompatible=bit).build()
    assert by_hand(data) == read_extents(FORMAT.open(MemoryFile(data), OpenRequest()), MemoryFile(data), 0, SIZE)
    details = FORMAT.open(MemoryFile(data), OpenRequest()).details()
    assert details["dirty" if bit == 1 else "corrupt"] is True
    with pytest.raises(ImageError, match=says) as raised:
        FORMAT.open(MemoryFile(data), OpenRequest(writable=True))
    assert raised.value.remedy == "run tapfs repair"


def test_the_end_mark_of_extensions_is_optional() -> None:
    """Writers of old had the name right behind the header of version 2."""
    data = plain(version=2, backing=b"base.raw", end_mark=False).build()
    assert data[72:80] == b"base.raw"
    assert FORMAT.open(MemoryFile(data), OpenRequest()).geometry.backing == BackingReference("base.raw")
    named = plain(backing=b"base.raw", extensions=[(0xE2792ACA, b"qcow"), (0xE2792ACA, b"raw")], end_mark=False)
    backing = FORMAT.open(MemoryFile(named.build()), OpenRequest()).geometry.backing
    assert backing is not None
    assert backing.format == "raw", "of two extensions of one type the last counts"


@pytest.mark.parametrize("length", [104, 108, 112, 200])
def test_headers_of_other_lengths(length: int) -> None:
    data = plain(header_length=length, extensions=[(0x1234, b"kept")]).build()
    driver = FORMAT.open(MemoryFile(data), OpenRequest())
    assert driver.details()["header_length"] == length
    assert [(each.type, each.data) for each in driver.extensions] == [(0x1234, b"kept")]
    assert read_extents(driver, MemoryFile(data), 0, SIZE) == by_hand(data)


NAMES: dict[str, tuple[str, str | None]] = {
    "base.img": ("base.img", None),
    "file:base.img": ("file:base.img", None),
    'json:{"driver":"qcow2","file":{"driver":"file","filename":"a,b.img"}}': ("./a,b.img", "qcow2"),
    'json:{"driver":"raw","file.filename":"/x/y:z"}': ("/x/y:z", "raw"),
    'json:{"driver":"file","filename":"../up"}': ("../up", None),
    'json:{"filename":"nbd:x"}': ("./nbd:x", None),
    'json:{"driver":"nbd","host":"x"}': ('json:{"driver":"nbd","host":"x"}', None),
    'json:{"driver":"raw","file":{"driver":"nbd","filename":"x"}}': (
        'json:{"driver":"raw","file":{"driver":"nbd","filename":"x"}}',
        None,
    ),
    **{
        name: (name, None)  # another disk than that of the file: a part of it, or over another parent
        for name in (
            'json:{"driver":"raw","offset":65536,"size":65536,"file":{"driver":"file","filename":"x"}}',
            'json:{"driver":"raw","offset":"65536","file.filename":"x"}',
            'json:{"driver":"qcow2","backing":null,"file":{"driver":"file","filename":"x"}}',
            'json:{"driver":"qcow2","backing":"node","file.filename":"x"}',
            'json:{"driver":"qcow2","backing":{"driver":"raw","file.filename":"y"},"file.filename":"x"}',
            'json:{"driver":"qcow2","data-file.filename":"y","file.filename":"x"}',
            'json:{"driver":"vpc","force_size_calc":"chs","file.filename":"x"}',
        )
    },
    'json:{"driver":"qcow2","node-name":"a","read-only":true,"cache":{"direct":true},"l2-cache-size":1,'
    '"overlap-check":"all","file":{"driver":"file","filename":"x","aio":"io_uring","locking":"off"}}': ("./x", "qcow2"),
    "json:{": ("json:{", None),
    'json:"x"': ('json:"x"', None),
    "json:" + "[" * 100000: ("json:" + "[" * 100000, None),
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:60])
def test_names_of_parents(name: str) -> None:
    reference = backing_reference(name, None)
    assert (reference.name, reference.format) == NAMES[name]


@pytest.mark.parametrize("name", ["base", "file:base", 'json:{"driver":"raw","file.filename":"base"}'])
def test_a_relative_name_starts_at_the_folder_of_the_overlay(tapfs: Run, tmp_path: Path, name: str) -> None:
    """QEMU takes its own folder for the second and third."""
    (tmp_path / "base").write_bytes(b"B" * SIZE)
    image = plain(backing=name.encode(), extensions=[(0xE2792ACA, b"raw")])
    (tmp_path / "over").write_bytes(image.build())
    assert tapfs("convert", "-O", "raw", tmp_path / "over", tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == NOISE + b"B" * (SIZE - CLUSTER)


# -- data files ------------------------------------------------------------------------------------


def with_data_file(folder: Path, name: str = "outside") -> Path:
    entries = {0: COPIED, 2: 2 * CLUSTER | COPIED, 3: ZERO}
    image = plain(entries=entries, incompatible=4, extensions=[(0x44415441, name.encode())], content={})
    (folder / "image").write_bytes(image.build())
    (folder / "outside").write_bytes(random.Random(2).randbytes(SIZE))
    return folder / "image"


def test_guest_data_in_a_file_of_its_own(tapfs: Run, tmp_path: Path) -> None:
    image = with_data_file(tmp_path)
    expected = by_hand(image.read_bytes(), outside=(tmp_path / "outside").read_bytes())
    assert expected[:CLUSTER] == (tmp_path / "outside").read_bytes()[:CLUSTER], "offset 0 is a place there"
    assert tapfs("convert", "-O", "raw", image, tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == expected
    assert json.loads(tapfs("info", "--json", image).out)["files"] == [str(image), str(tmp_path / "outside")]


def test_a_data_file_obeys_the_gate(tapfs: Run, tmp_path: Path) -> None:
    """CVE-2024-32498: an image from a stranger names any file of the host."""
    for folder in ("inside", "secret"):
        (tmp_path / folder).mkdir()
    image = with_data_file(tmp_path / "inside", "../secret/outside")
    os.rename(tmp_path / "inside" / "outside", tmp_path / "secret" / "outside")
    code, out, _ = tapfs("info", image)
    assert code == 0, "the image's own facts are told"
    assert "note: the start of the disk cannot be read" in " ".join(out.split())
    assert "lies outside the folder of the image" in out
    code, _, err = tapfs("map", image)
    assert code == 19
    assert "lies outside the folder of the image" in err
    assert tapfs("info", "--no-backing", image).code == 0
    assert tapfs("convert", "-O", "raw", image, tmp_path / "out").code == 19
    assert tapfs("convert", "--backing-root", tmp_path, "-O", "raw", image, tmp_path / "out").code == 0


def test_info_tells_of_an_image_without_its_data_file(tapfs: Run, tmp_path: Path) -> None:
    image = with_data_file(tmp_path)
    (tmp_path / "outside").unlink()
    code, out, _ = tapfs("info", "--json", image)
    assert code == 0
    assert json.loads(out)["details"]["data_file"] == "outside"
    code, _, err = tapfs("map", image)
    assert code == 17
    assert "its file outside is missing" in err


@pytest.mark.parametrize(("options", "exit_code"), [([], 17), (["--no-backing"], 19)])
def test_a_check_without_the_data_file_says_so(tapfs: Run, tmp_path: Path, options: list[str], exit_code: int) -> None:
    image = with_data_file(tmp_path)
    assert tapfs("check", image).code == 0
    if not options:
        (tmp_path / "outside").unlink()
    code, out, err = tapfs("check", *options, image)
    assert (code, out) == (exit_code, "")
    assert "its file outside is" in err


def test_an_image_is_not_its_own_data_file(tapfs: Run, tmp_path: Path) -> None:
    image = with_data_file(tmp_path, "image")
    code, _, err = tapfs("map", image)
    assert code == 2
    assert "names itself as its data file" in err

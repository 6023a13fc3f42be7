"""Descriptors as people and tools write them, and the hostile ones (docs/specs/vmdk.md, "Descriptor"; B15)."""

from __future__ import annotations

from pathlib import Path

import pytest

import tapfs
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vmdk.descriptor import Access, parse_descriptor
from tapfs.formats.vmdk.signature import is_descriptor

PLAIN = b"""# Disk DescriptorFile
version=1
encoding="UTF-8"
CID=fffffffe
parentCID=ffffffff
createType="monolithicFlat"

# Extent description
RW 2048 FLAT "disk-flat.vmdk" 0

# The Disk Data Base
#DDB

ddb.adapterType = "lsilogic"
"""

VARIANTS = {
    "as VMware writes it": PLAIN,
    "CRLF": PLAIN.replace(b"\n", b"\r\n"),
    "a byte order mark": b"\xef\xbb\xbf" + PLAIN,
    "blank lines first": b"\r\n\n" + PLAIN,
    "lower case": PLAIN.replace(b"# Disk DescriptorFile", b"# disk descriptorfile")
    .replace(b"RW ", b"rw ")
    .replace(b"FLAT", b"flat"),
    "Disk Descriptor File": PLAIN.replace(b"DescriptorFile", b"Descriptor File"),
    "tabs": PLAIN.replace(b"RW 2048 FLAT ", b"\tRW\t2048\t\tFLAT\t"),
    "double blanks": PLAIN.replace(b"RW 2048 FLAT ", b"  RW  2048   FLAT  "),
    "blanks around the equals sign": PLAIN.replace(b"=", b" \t= "),
    "no quotes": PLAIN.replace(b'"', b""),
    "no comments": b"\n".join(line for i, line in enumerate(PLAIN.splitlines()) if not i or not line.startswith(b"#")),
    "upper-case keys": PLAIN.replace(b"createType", b"CREATETYPE").replace(b"CID=", b"cid="),
    "no offset": PLAIN.replace(b'" 0\n', b'"\n'),
    "NULs behind it": PLAIN + bytes(5000) + b"RW 1 FLAT x",
    "no first line": PLAIN.partition(b"\n")[2],
    "comments before the first line": b"# copied from vm01\n#\n \n" + PLAIN,
    "comments before the first key": b"# by hand\r\n\r\n" + PLAIN.partition(b"\n")[2],
    "a UUID behind the offset": PLAIN.replace(b'" 0\n', b'" 0 00000000-0000-0000-0000-000000000000\n'),
}


@pytest.mark.parametrize("text", VARIANTS.values(), ids=VARIANTS)
def test_every_spelling_says_the_same(text: bytes) -> None:
    assert is_descriptor(text[:512])
    found = parse_descriptor(text, "disk.vmdk")
    assert (found.cid, found.parent_cid, found.create_type) == (0xFFFFFFFE, None, "monolithicFlat")
    assert found.value("ddb.adaptertype") == "lsilogic"
    (line,) = found.extents
    assert (line.access, line.sectors, line.kind, line.name) == (Access.READ_WRITE, 2048, "FLAT", "disk-flat.vmdk")
    assert line.offset_sectors == 0
    assert text[line.at :].lower().startswith(b"rw")


@pytest.mark.parametrize(
    "text",
    [
        b"version=1\nname=x\n",
        b"# notes\n\nCID=1\n",
        b"#\n" * 2000,
        b"\r\n" * 2000,
        b"\xff\xfe\0\xd8",
        b"#!/bin/sh\n# Disk descriptor file maker\n",
    ],
)
def test_other_texts_are_no_descriptors(text: bytes) -> None:
    assert not is_descriptor(text)


@pytest.mark.parametrize(
    ("line", "name", "offset"),
    [
        (b"RW 2048 VMFS System Volume.img", "System Volume.img", 0),
        (b"RW 2048 FLAT Disk 2 copy.img 63", "Disk 2 copy.img", 63),
        (b"RW 2048 FLAT disk.img \t 7", "disk.img", 7),
    ],
)
def test_a_name_without_quotes_may_have_blanks(line: bytes, name: str, offset: int) -> None:
    text = PLAIN.replace(b'RW 2048 FLAT "disk-flat.vmdk" 0', line)
    (found,) = parse_descriptor(text, "disk.vmdk").extents
    assert (found.name, found.offset_sectors) == (name, offset)


def test_an_embedded_text_may_begin_with_any_line() -> None:
    text = b'encoding="UTF-8"\n' + PLAIN
    assert parse_descriptor(text, "disk.vmdk", 512).extents[0].name == "disk-flat.vmdk"
    for hidden in (text, b"\x07" * 512):
        with pytest.raises(ImageError) as raised:
            parse_descriptor(hidden, "disk.vmdk", 0 if hidden is text else 512)
        assert raised.value.kind is ErrorKind.INVALID_FORMAT


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf16_is_refused_with_the_remedy(codec: str) -> None:
    text = "\ufeff".encode(codec) + PLAIN.decode().encode(codec)
    assert is_descriptor(text[:512])
    with pytest.raises(ImageError, match="UTF-16") as raised:
        parse_descriptor(text, "disk.vmdk")
    assert (raised.value.kind, raised.value.remedy) == (ErrorKind.UNSUPPORTED, "save it as UTF-8")


def test_places_of_values() -> None:
    found = parse_descriptor(PLAIN, "disk.vmdk", 512)
    for key in ("cid", "createtype", "ddb.adaptertype"):
        at, content = found.values[key]
        assert PLAIN[at : at + len(content)] == content
    assert found.base == 512


def test_the_first_of_two_keys_counts() -> None:
    found = parse_descriptor(PLAIN + b"CID=00000001\n", "disk.vmdk")
    assert found.cid == 0xFFFFFFFE
    assert found.repeated_keys == ("cid",)


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("UTF-8", "дискß.vmdk"),
        ("windows-1252", "Gerät.vmdk"),
        ("GBK", "磁盘.vmdk"),
        ("Big5", "磁碟.vmdk"),
        ("Shift_JIS", "ディスク.vmdk"),
    ],
)
def test_encodings(encoding: str, name: str) -> None:
    text = PLAIN.replace(b"UTF-8", encoding.encode()).replace(b"disk-flat.vmdk", name.encode(encoding))
    assert parse_descriptor(text, "disk.vmdk").extents[0].name == name


@pytest.mark.parametrize("encoding", [b"rot13", b"undefined", b"unicode_escape", b"idna", b""])
def test_what_is_no_encoding_is_looked_up_in_the_bytes(encoding: bytes) -> None:
    text = PLAIN.replace(b"UTF-8", encoding)
    assert parse_descriptor(text.replace(b"disk-flat", "ü".encode()), "x").extents[0].name == "ü.vmdk"
    assert parse_descriptor(text.replace(b"disk-flat", b"\xfc"), "x").extents[0].name == "ü.vmdk"


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        (b"# Disk DescriptorFile\nversion=1", b"# Disk\nrelease=1", ErrorKind.INVALID_FORMAT),
        (b"RW 2048 FLAT", b"RW x2048 FLAT", ErrorKind.CORRUPT),
        (b"RW 2048 FLAT", b"RW -1 FLAT", ErrorKind.CORRUPT),
        (b"RW 2048 FLAT", b"RW", ErrorKind.CORRUPT),
        (b'disk-flat.vmdk"', b"disk-flat.vmdk", ErrorKind.CORRUPT),
        (b"RW 2048", b"RW 99999999999999999999", ErrorKind.OUT_OF_BOUNDS),
        (b"RW 2048", b"RW 18014398509481984", ErrorKind.OUT_OF_BOUNDS),
        (b"CID=fffffffe", b"CID=xyz", ErrorKind.CORRUPT),
        (b"CID=fffffffe", b"CID=123456789", ErrorKind.CORRUPT),
        (b"CID=fffffffe", b"CID=", ErrorKind.CORRUPT),
        (b"#DDB\n", b"RW 0 ZERO\n" * 4097, ErrorKind.OUT_OF_BOUNDS),
        (b"#DDB\n", b"#" * (1 << 20), ErrorKind.OUT_OF_BOUNDS),
    ],
)
def test_hostile_text(old: bytes, new: bytes, kind: ErrorKind) -> None:
    with pytest.raises(ImageError) as raised:
        parse_descriptor(PLAIN.replace(old, new), "disk.vmdk")
    assert raised.value.kind is kind
    assert raised.value.path == "disk.vmdk"


@pytest.mark.parametrize(
    "line",
    [
        'RV 2048 FLAT "g" 0',
        'RW2048 FLAT "g" 0',
        'R 2048 SPARSE "g"',
        'RW 2048 FLAT "g" -1024',
        'RW 2048 FLAT "g" abc',
        'RW 2048 FLAT "g" 512x',
    ],
)
def test_a_damaged_extent_line_is_an_error_and_not_left_out(line: str) -> None:
    text = b'# Disk DescriptorFile\nCID=1\ncreateType="monolithicFlat"\n' + line.encode() + b'\nRW 8 FLAT "h" 0\n'
    with pytest.raises(ImageError, match="an extent of the descriptor cannot be understood") as caught:
        parse_descriptor(text, "d.vmdk")
    assert caught.value.kind is ErrorKind.CORRUPT


def test_a_descriptor_without_extents_is_no_empty_disk() -> None:
    with pytest.raises(ImageError, match="names no extents"):
        parse_descriptor(b"# Disk DescriptorFile\nCID=1\n", "d.vmdk")


@pytest.mark.parametrize("digits", range(1, 9))
def test_what_a_shorter_content_id_of_qemu_leaves_is_no_second_text(tmp_path: Path, digits: int) -> None:
    text = b'# Disk DescriptorFile\nCID=%s\nparentCID=ffffffff\nRW 8 FLAT "g" 0\n\n#DDB\n\nddb.toolsVersion = "2147"\n'
    old, new = text % b"12345678", (text % b"12345678"[:digits]) + b"\0"
    path = tmp_path / "d.vmdk"
    (tmp_path / "g").write_bytes(b"x" * 8 * 512)
    path.write_bytes((new + old[len(new) :]).ljust(512, b"\0"))
    with tapfs.open(path, writable=True) as image:
        assert image.read(0, 4) == b"xxxx"
        image.write(0, b"y")
    with tapfs.open(path) as image:
        assert image.read(0, 4) == b"yxxx"


def test_a_zero_byte_hides_no_extents(tmp_path: Path) -> None:
    path = tmp_path / "d.vmdk"
    (tmp_path / "g").write_bytes(bytes(8 * 512))
    path.write_bytes(b'# Disk DescriptorFile\nRW 8 FLAT "g" 0\n\0RW 8 FLAT "g" 0\n')
    with pytest.raises(ImageError, match="a zero byte in it"):
        tapfs.open(path)
    path.write_bytes(b'# Disk DescriptorFile\nRW 8 FLAT "g" 0\n' + bytes(500))
    tapfs.open(path).close()

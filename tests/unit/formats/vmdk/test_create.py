"""New VMDKs: every subformat, the options of qemu-img, and what is refused."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as tapfs_package
from tapfs.driver import BackingReference, CreateRequest
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.vmdk import FORMAT
from tapfs.formats.vmdk.descriptor import parse_descriptor
from tests.conftest import Ran

Run = Callable[..., Ran]
DONE = (0, "", "")
GIB = 1 << 30


def refused(**keys: object) -> ImageError:
    request = CreateRequest(**({"virtual_size": 1 << 20, "name": "disk.vmdk"} | keys))  # type: ignore[arg-type]
    with pytest.raises(ImageError) as raised:
        FORMAT.create(request)
    return raised.value


FILES = {
    "monolithicSparse": [],
    "monolithicFlat": ["disk-flat.vmdk"],
    "twoGbMaxExtentSparse": ["disk-s001.vmdk", "disk-s002.vmdk", "disk-s003.vmdk"],
    "twoGbMaxExtentFlat": ["disk-f001.vmdk", "disk-f002.vmdk", "disk-f003.vmdk"],
    "vmfs": ["disk-flat.vmdk"],
    "vmfsSparse": ["disk-delta.vmdk"],
}


@pytest.mark.parametrize("subformat", FILES)
def test_every_subformat(tmp_path: Path, tapfs: Run, subformat: str) -> None:
    path = tmp_path / "disk.vmdk"
    assert tapfs("create", "-f", "vmdk", "-o", f"subformat={subformat}", path, str(4 * GIB + 512)) == DONE
    assert sorted(os.listdir(tmp_path)) == sorted(["disk.vmdk", *FILES[subformat]])
    with tapfs_package.open(path, writable=True) as image:
        assert image.size == 4 * GIB + 512
        image.write(2 * GIB - 512, b"over the border" * 100)
        image.write(4 * GIB + 500, b"the last one")
    with tapfs_package.open(path) as image:
        assert image.read(2 * GIB - 512, 1500) == b"over the border" * 100
        assert image.read(4 * GIB + 500, 12) == b"the last one"
    assert tapfs("check", path).code in {0, 63}
    allocated = tapfs_package.check(path).allocated_bytes
    assert allocated == 4 * GIB + 512 if subformat.endswith("Flat") or subformat == "vmfs" else 0 < allocated < GIB


def test_the_layout_of_a_new_image(tmp_path: Path, tapfs: Run) -> None:
    path = tmp_path / "disk.vmdk"
    assert tapfs("create", "-f", "vmdk", "-o", "zeroed_grain=on,adapter_type=lsilogic,compat6=on", path, "1G") == DONE
    content = path.read_bytes()
    magic, version, flags, capacity, grain, at, room, entries, redundant, directory, overhead = struct.unpack_from(
        "<4sIIQQQQIQQQ", content
    )
    assert (magic, version, flags, capacity, grain, at, room, entries) == (b"KDMV", 2, 7, 2 << 20, 128, 1, 20, 512)
    assert content[72:79] == b"\0\n \r\n\0\0"
    assert len(content) == overhead * 512
    for place in (redundant, directory):
        assert struct.unpack_from("<32I", content, place * 512) == tuple(range(place + 1, place + 129, 4))
    said = parse_descriptor(content[512 : 512 * 21], "x")
    assert said.value("ddb.virtualHWVersion") == "6"
    assert (said.value("ddb.adapterType"), said.value("ddb.geometry.heads")) == ("lsilogic", "255")
    assert said.create_type == "monolithicSparse"
    assert b"# Extent description\nRW 2097152 SPARSE" in said.text
    assert said.cid not in {0, 0xFFFFFFFF, 0xFFFFFFFE, None}


def test_two_new_images_differ_in_their_content_id(tmp_path: Path, tapfs: Run) -> None:
    for name in ("a.vmdk", "b.vmdk"):
        assert tapfs("create", "-f", "vmdk", tmp_path / name, "1M") == DONE
    cids = {parse_descriptor((tmp_path / name).read_bytes()[512:], name).cid for name in ("a.vmdk", "b.vmdk")}
    assert len(cids) == 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"subformat": "seSparse"}, "subformat=seSparse is not made"),
        ({"adapter_type": "scsi"}, "adapter_type=scsi: must be one of ide, lsilogic"),
        ({"compat6": "yes"}, "compat6=yes: must be on or off"),
        ({"compat6": "on", "hwversion": "9"}, "compat6=on says a version"),
        ({"hwversion": "x"}, "hwversion=x: must be a number"),
        ({"toolsversion": "12345678901"}, "must be a number of at most 10 digits"),
        ({"zeroed_grain": "on", "subformat": "monolithicFlat"}, "does not go with subformat=monolithicFlat"),
        ({"cluster_size": "1"}, "unknown option 'cluster_size' for vmdk"),
    ],
)
def test_refused_options(options: dict[str, str], says: str) -> None:
    error = refused(options=options)
    assert says in str(error)
    assert error.kind is ErrorKind.UNSUPPORTED


def test_refused_sizes_names_and_parents() -> None:
    assert refused(virtual_size=0).kind is ErrorKind.OUT_OF_BOUNDS
    error = refused(virtual_size=3 << 40)
    assert error.kind is ErrorKind.OUT_OF_BOUNDS
    assert "twoGbMaxExtentSparse" in (error.remedy or "")
    assert "cannot stand in a VMDK" in str(refused(name='a"b.vmdk'))
    assert "is never encrypted" in str(refused(encrypted=True))
    flat = refused(backing=BackingReference("p", "vmdk"), options={"subformat": "monolithicFlat"})
    assert "a disk with a parent is sparse" in str(flat)
    assert "is over another VMDK only" in str(refused(backing=BackingReference("p", "raw")))


def test_a_delta_knows_its_parent(tmp_path: Path, tapfs: Run) -> None:
    base, child = tmp_path / "base.vmdk", tmp_path / "child.vmdk"
    assert tapfs("create", "-f", "vmdk", base, "3M") == DONE
    with tapfs_package.open(base, writable=True) as image:
        image.write(0, b"base")
    assert tapfs("create", "-f", "vmdk", "-b", base, "-F", "vmdk", child) == DONE
    with tapfs_package.open(child, writable=True) as image:
        image.write(1 << 20, b"child")
    with tapfs_package.open(child) as image:
        assert (image.read(0, 4), image.read(1 << 20, 5)) == (b"base", b"child")
    # Whoever writes the parent makes its children stale, and they are told.
    with tapfs_package.open(base, writable=True, write_base=True) as image:
        image.write(2 << 20, b"changed")
    ran = tapfs("map", child)
    assert ran.code == 2
    assert "cid:" in ran.err
    assert tapfs("map", "--any-parent", child).code == 0


@pytest.mark.parametrize(
    ("subformat", "reason"),
    [
        ("seSparse", "VMware has not published"),
        ("fullDevice", "a device of the host"),
        ("partitionedDevice", "a device"),
    ],
)
def test_subformats_that_are_only_read_are_refused_with_the_reason(subformat: str, reason: str) -> None:
    with pytest.raises(ImageError, match=reason) as caught:
        FORMAT.create(CreateRequest(1 << 20, options={"subformat": subformat}))
    assert caught.value.remedy

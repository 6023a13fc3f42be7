"""The disk strings of VM configurations."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapfs.errors import ErrorKind, ImageError
from tapfs.xen.specification import DiskSpecification, parse_mode, parse_specification


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("tap:aio:/x.img", DiskSpecification("/x.img", "raw", direct=True)),
        ("tap:sync:/x.img", DiskSpecification("/x.img", "raw")),
        ("tap:raw:/x.img", DiskSpecification("/x.img", "raw")),
        ("tap:qcow:/x.qcow", DiskSpecification("/x.qcow", "qcow")),
        ("tap:vmdk:/x.vmdk", DiskSpecification("/x.vmdk", "vmdk")),
        ("tap:ram:scratch", DiskSpecification("ram:scratch")),
        ("tap:tapdisk:aio:/x.img", DiskSpecification("/x.img", "raw", direct=True)),
        ("tap:ioemu:qcow:/x.qcow", DiskSpecification("/x.qcow", "qcow")),
        ("tap2:tapdisk:ioemu:qcow:/x", DiskSpecification("/x", "qcow")),
        ("tap:tapdisk:/x.img", DiskSpecification("/x.img")),
        ("tap2:aio:/x.img", DiskSpecification("/x.img", "raw", direct=True)),
        ("tap:/x.img", DiskSpecification("/x.img")),
        ("tap:/a:b", DiskSpecification("/a:b")),
        ("tap:qcow:/a:b", DiskSpecification("/a:b", "qcow")),
        ("aio:/x", DiskSpecification("/x", "raw", direct=True)),
        # Of libxl with `backendtype=tap`.
        ("aio:tap:qcow:/x", DiskSpecification("/x", "qcow")),
        ("vhd:tap:aio:/x", DiskSpecification("/x", "raw", direct=True)),
        ("aio:tape:/x", DiskSpecification("tape:/x", "raw", direct=True)),
        ("qcow:/x", DiskSpecification("/x", "qcow")),
        ("ram:scratch", DiskSpecification("ram:scratch")),
        ("/x.img", DiskSpecification("/x.img")),
        ("disks/x.img", DiskSpecification("disks/x.img")),
        # Without "tap:" a word that is no type is a part of the name; so is "tapdisk:".
        ("backup:monday", DiskSpecification("backup:monday")),
        ("tapdisk:aio:/x", DiskSpecification("tapdisk:aio:/x")),
        # A file that is called like a RAM disk.
        ("tap:aio:ram:x", DiskSpecification("./ram:x", "raw", direct=True)),
        ("./ram:x", DiskSpecification("./ram:x")),
        # With a device and a mode.
        ("tap:aio:/x.img,sda1,w", DiskSpecification("/x.img", "raw", direct=True, vdev=2049, mode="w")),
        ("tap:qcow:/x,/dev/xvda,r", DiskSpecification("/x", "qcow", vdev=51712, mode="r")),
        ("tap:ram:scratch,xvdb,w!", DiskSpecification("ram:scratch", vdev=51728, mode="w!")),
        ("/x.img,51712,ro", DiskSpecification("/x.img", vdev=51712, mode="r")),
        ("/x.img,xvda,rw", DiskSpecification("/x.img", vdev=51712, mode="w")),
        # Of Xen's other backends.
        ("file:/x,xvda,w", DiskSpecification("/x", "raw", vdev=51712, mode="w")),
        ("file:x", DiskSpecification("x", "raw")),
        ("./file:x", DiskSpecification("./file:x")),
        ("phy:/dev/vg/lv,xvda,w", DiskSpecification("/dev/vg/lv", "raw", vdev=51712, mode="w")),
        ("phy:vg/lv", DiskSpecification("/dev/vg/lv", "raw")),
        ("qcow2:/x", DiskSpecification("/x", "qcow2")),
        # CD-ROMs.
        ("aio:/x,xvda:cdrom,r", DiskSpecification("/x", "raw", direct=True, vdev=51712, mode="r")),
        ("/x.iso,hdc:cdrom,w", DiskSpecification("/x.iso", vdev=5632, mode="r")),
        ("/x,xvda:disk,w", DiskSpecification("/x", vdev=51712, mode="w")),
        ("/x,xvda:tape,w", DiskSpecification("/x,xvda:tape,w")),
        # xl's places: target, format, device, access.
        ("/x,raw,xvda,w", DiskSpecification("/x", "raw", vdev=51712, mode="w")),
        ("/x.qcow2,qcow2,hda,rw", DiskSpecification("/x.qcow2", "qcow2", vdev=768, mode="w")),
        ("/dev/vg/guest,,hda,r", DiskSpecification("/dev/vg/guest", vdev=768, mode="r")),
        ("/x,raw", DiskSpecification("/x,raw")),
        # Commas of the file.
        ("tap:qcow:/a,b.qcow,xvda,w", DiskSpecification("/a,b.qcow", "qcow", vdev=51712, mode="w")),
        ("tap:qcow:/a,b.qcow", DiskSpecification("/a,b.qcow", "qcow")),
        ("/a,xvda", DiskSpecification("/a,xvda")),
        ("/a,nodisk,w", DiskSpecification("/a,nodisk,w")),
        ("/a,xvda,x", DiskSpecification("/a,xvda,x")),
        ("/a,xvda,w,xvdb,r", DiskSpecification("/a,xvda,w", vdev=51728, mode="r")),
    ],
)
def test_strings_mean_what_they_always_meant(text: str, meant: DiskSpecification) -> None:
    assert parse_specification(text) == meant


@pytest.mark.parametrize(
    "text",
    ["", "tap:", "tap:aio:", "tap:tapdisk:", "tap:qcow:,xvda,w", ",xvda,w", "ram:", "/x\0y", "file:", "phy:,xvda,r"],
)
def test_a_string_without_a_file_is_refused(text: str) -> None:
    with pytest.raises(ImageError, match="names no file; write tap:FORMAT:FILE or just FILE") as raised:
        parse_specification(text)
    assert raised.value.kind is ErrorKind.INVALID_ARGUMENT


def test_a_relative_file_is_found_from_anywhere() -> None:
    assert parse_specification("tap:qcow:x,xvda,w").absolute() == DiskSpecification(
        f"{os.getcwd()}/x", "qcow", vdev=51712, mode="w"
    )
    assert parse_specification("ram:x").absolute().path == "ram:x"
    assert parse_specification("tap:sync:ram:x").absolute().path == f"{os.getcwd()}/ram:x"


def test_modes() -> None:
    assert [parse_mode(text) for text in ("r", "ro", "w", "rw", "w!")] == ["r", "r", "w", "w", "w!"]
    for text in ("", "W", "rw!", "x", "r "):
        with pytest.raises(ImageError, match="is no mode of a disk; use r, w or w!"):
            parse_mode(text)


_PATHS = st.text(st.sampled_from("ab:/,w!rx\n é") | st.just("\udcff"), min_size=1, max_size=12).map(
    lambda text: f"/{text}"
)


@given(
    _PATHS | _PATHS.map(lambda path: f"{path},xvda,w"),
    st.sampled_from([None, "raw", "qcow", "vmdk"]),
    st.booleans(),
)
def test_params_mean_the_same_again(path: str, image_format: str | None, direct: bool) -> None:  # noqa: FBT001
    meant = DiskSpecification(path, image_format, direct=direct and image_format == "raw")
    read = parse_specification(meant.params)
    assert (read.path, read.format, read.direct) == (meant.path, meant.format, meant.direct)


@given(st.text(st.sampled_from("tapram:io,vdw!/x1qcow\0"), max_size=30))
def test_any_string_is_understood_or_refused(text: str) -> None:
    try:
        meant = parse_specification(text)
    except ImageError:
        return
    assert meant.path
    assert meant.path in text or meant.path.removeprefix("./") in text
    read = parse_specification(meant.params)
    assert (read.path, read.format, read.direct) == (meant.path, meant.format, meant.direct)


def test_options_of_a_disk_stand_behind_its_format() -> None:
    text = "tap:qcow,key-file=/k,nice=-5:/srv/a,b.qcow"
    found = parse_specification(text)
    assert found == DiskSpecification("/srv/a,b.qcow", "qcow", options=(("key-file", "/k"), ("nice", "-5")))
    assert found.params == text
    assert parse_specification("tap:aio,cache=1:/a,xvda,w!") == DiskSpecification(
        "/a", "raw", direct=True, vdev=51712, mode="w!", options=(("cache", "1"),)
    )
    # Without tap: it is the name of a file.
    assert parse_specification("qcow,nice=5:/a").options == ()
    with pytest.raises(ImageError, match="no option 'nicer'"):
        parse_specification("tap:qcow,nicer=5:/a")

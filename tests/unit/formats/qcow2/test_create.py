"""Creating qcow2 images: every option, and what is refused before a file exists."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.driver import BackingReference, CreateRequest, OpenRequest
from tapfs.formats.qcow2 import FORMAT
from tapfs.host.file import LocalFile
from tests.conftest import Ran
from tests.qcow2_images import Fields, audit, by_hand, created

Run = Callable[..., Ran]
MIB = 1 << 20

OPTIONS: list[dict[str, str]] = [
    {},
    {"compat": "0.10"},
    {"cluster_size": "512"},
    {"cluster_size": "2097152", "refcount_bits": "64"},
    {"refcount_bits": "1", "lazy_refcounts": "on"},
    {"compression_type": "zstd"},
    {"extended_l2": "on"},
    {"preallocation": "metadata", "cluster_size": "4096"},
    {"preallocation": "full", "refcount_bits": "2", "cluster_size": "512"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [0, 512, MIB - 512, 9 * MIB + 300])
def test_a_new_image_is_clean_and_reads_as_zeros(options: dict[str, str], size: int) -> None:
    file = created(size, options)
    data = bytes(file.data)
    found = audit(data)
    assert (found.corruptions, found.leaks) == ([], [])
    driver = FORMAT.open(file, OpenRequest())
    assert driver.geometry.virtual_size == -(-size // 512) * 512
    report = driver.check()
    assert (report.corruptions, report.leaks) == (0, 0), report.findings
    assert not driver.repair()
    assert not any(by_hand(data))
    details = driver.details()
    assert details["compat"] == options.get("compat", "1.1")
    assert details["cluster_size"] == int(options.get("cluster_size", "65536"))
    assert details["refcount_bits"] == int(options.get("refcount_bits", "16"))


def test_the_parent_and_its_format_are_named() -> None:
    file = created(MIB, backing="base.img")
    assert FORMAT.open(file, OpenRequest()).geometry.backing == BackingReference("base.img", "raw")
    names = [kind for kind, _ in Fields(bytes(file.data)).extensions()]
    assert names == [0xE2792ACA, 0x6803F857]


REFUSED: dict[str, tuple[dict[str, str], ErrorKind, str]] = {
    "unknown": ({"speed": "on"}, ErrorKind.UNSUPPORTED, "unknown option 'speed'"),
    "compat": ({"compat": "2.0"}, ErrorKind.UNSUPPORTED, "must be one of 0.10"),
    "cluster": ({"cluster_size": "1000"}, ErrorKind.UNSUPPORTED, "power of two from 512 to 2097152"),
    "width": ({"refcount_bits": "3"}, ErrorKind.UNSUPPORTED, "power of two from 1 to 64"),
    "width 2": ({"refcount_bits": "8", "compat": "0.10"}, ErrorKind.UNSUPPORTED, "needs compat=1.1"),
    "lazy 2": ({"lazy_refcounts": "on", "compat": "0.10"}, ErrorKind.UNSUPPORTED, "needs compat=1.1"),
    "zstd 2": ({"compression_type": "zstd", "compat": "0.10"}, ErrorKind.UNSUPPORTED, "needs compat=1.1"),
    "subclusters": (
        {"extended_l2": "on", "cluster_size": "8192"},
        ErrorKind.UNSUPPORTED,
        "clusters of at least 16384 bytes",
    ),
    "raw": ({"data_file_raw": "on"}, ErrorKind.UNSUPPORTED, "needs data_file"),
    "data file": ({"data_file": "/etc/passwd"}, ErrorKind.UNSUPPORTED, "beside the image"),
    "large": ({"cluster_size": "512"}, ErrorKind.OUT_OF_BOUNDS, "the limit is 137438953472"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_is_refused(kind: str) -> None:
    options, expected, says = REFUSED[kind]
    with pytest.raises(ImageError, match=says) as raised:
        FORMAT.create(CreateRequest(1 << 38, options=options))
    assert raised.value.kind is expected


def test_over_a_parent_nothing_is_preallocated() -> None:
    for options in ({"preallocation": "full"}, {"data_file": "x", "data_file_raw": "on"}):
        with pytest.raises(ImageError, match="backing file"):
            FORMAT.create(CreateRequest(MIB, BackingReference("base", "raw"), options=options))


def test_a_data_file_of_the_images_own_name_is_refused(tapfs: Run, tmp_path: Path) -> None:
    ran = tapfs("create", "-f", "qcow2", "-o", "data_file=a.qcow2", tmp_path / "a.qcow2", "3M")
    assert ran.code != 0
    assert "two files of the new image would have the name a.qcow2" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_data_file_is_made_beside_the_image(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "image"
    assert tapfs("create", "-f", "qcow2", "-o", "data_file=data,data_file_raw=on", image, "3M").code == 0
    assert (tmp_path / "data").stat().st_size == 3 * MIB
    with tapfs_open(image) as disk:
        disk.write(MIB + 5, b"hello")
        disk.write_zeroes(MIB, 10)
    assert (tmp_path / "data").read_bytes()[MIB : MIB + 12] == bytes(12)
    with tapfs_open(image) as disk:
        disk.write(2 * MIB, b"there")
    assert (tmp_path / "data").read_bytes()[2 * MIB : 2 * MIB + 5] == b"there", "the data file alone is the disk"
    assert tapfs("check", image).code == 0


KEPT = [("data_file_raw=on",), ("preallocation=metadata",), ("preallocation=metadata", "extended_l2=on")]


@pytest.mark.parametrize("how", KEPT, ids=", ".join)
def test_a_data_file_that_is_kept_is_the_disk(tapfs: Run, tmp_path: Path, how: tuple[str, ...]) -> None:
    data, image = tmp_path / "data", tmp_path / "image"
    content = random.Random(7).randbytes(MIB)
    data.write_bytes(content)
    before = data.stat().st_ino
    options = ",".join(("data_file=data,keep_data_file=on", *how))
    assert tapfs("create", "-f", "qcow2", "-o", options, image, "2M").code == 0
    assert data.stat().st_ino == before
    with tapfs_open(image) as disk:
        assert disk.read(0, 2 * MIB) == content + bytes(MIB)
        disk.write(MIB, b"more")
    assert data.read_bytes() == content + b"more" + bytes(MIB - 4)
    assert tapfs("check", image).code == 0
    # Made again over the image that is there: the data file stays.
    assert tapfs("create", "--force", "-f", "qcow2", "-o", options, image, "512K").code == 0
    with tapfs_open(image) as disk:
        assert disk.read(0, 512 << 10) == content[: 512 << 10]
    assert data.read_bytes() == content + b"more" + bytes(MIB - 4)


def test_a_data_file_is_kept_only_where_it_shows_and_stays(tapfs: Run, tmp_path: Path) -> None:
    data, image = tmp_path / "data", tmp_path / "image"

    def refused(options: str, message: str) -> None:
        ran = tapfs("create", "-f", "qcow2", "-o", f"keep_data_file=on{options}", image, "1M")
        assert ran.code != 0
        assert message in ran.err
        assert not image.exists()

    refused("", "needs data_file")
    refused(",data_file=data,data_file_raw=on", "data: is to be kept, and does not exist")
    data.write_bytes(b"kept")
    refused(",data_file=data", "would make an empty disk over the file that is kept")
    refused(",data_file=data,preallocation=full", "would write to the file")
    source = tmp_path / "source"
    source.write_bytes(bytes(MIB))
    options = "data_file=data,data_file_raw=on,keep_data_file=on"
    ran = tapfs("convert", "-f", "raw", "-O", "qcow2", "-o", options, source, image)
    assert ran.code != 0
    assert "data is to be kept, and would be overwritten" in ran.err
    assert data.read_bytes() == b"kept"
    with contextlib.closing(LocalFile.open(str(data), writable=True)):
        ran = tapfs("create", "-f", "qcow2", "-o", options, image, "1M")
    assert ran.code != 0
    assert "data: is being used by process" in ran.err
    assert not image.exists()
    assert data.read_bytes() == b"kept"


def tapfs_open(path: Path) -> tapfs.Image:
    return tapfs.open(path, format="qcow2", writable=True)


def test_a_huge_disk_is_made_in_an_instant(tapfs: Run, tmp_path: Path) -> None:
    assert tapfs("create", "-f", "qcow2", tmp_path / "a", "1P").code == 0
    assert (tmp_path / "a").stat().st_size < 32 * MIB
    assert tapfs("check", tmp_path / "a").code == 0

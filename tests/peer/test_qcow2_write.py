"""qcow2 images that tapfs writes: qemu-img check is clean, and QEMU reads the same disk; both take turns."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from dissect.hypervisor.disk.qcow2 import QCow2

import tapfs as tapfs_package
from tests.conftest import Ran
from tests.peer.test_convert import MIB, qemu
from tests.peer.test_qcow2_read import by_qemu
from tests.qcow2_images import audit

Run = Callable[..., Ran]

SIZE = 6 * MIB + 512


def change(image: Path, expected: bytearray, choice: random.Random, requests: int = 40) -> None:
    """Random requests by tapfs."""
    with tapfs_package.open(image, format="qcow2", writable=True) as disk:
        assert disk.read(0, disk.size) == expected
        for _ in range(requests):
            offset = choice.randrange(len(expected))
            length = min(choice.choice([1, 700, 5000, 90_000, 400_000]), len(expected) - offset)
            what = choice.random()
            if what < 0.6:
                data = choice.randbytes(length)
                disk.write(offset, data)
                expected[offset : offset + length] = data
            elif what < 0.8:
                disk.write_zeroes(offset, length)
                expected[offset : offset + length] = bytes(length)
            elif what < 0.95:
                disk.discard(offset, length)
                expected[offset : offset + length] = disk.read(offset, length)
            else:
                disk.flush()
        assert disk.read(0, disk.size) == expected


def is_clean(image: Path) -> None:
    """Nothing is wrong, by qemu-img, by tapfs and by the second checker."""
    beside(image, "qemu-img", "check", "-f", "qcow2", image)
    report = tapfs_package.check(image)
    assert (report.corruptions, report.leaks) == (0, 0), report.findings
    found = audit(image.read_bytes())
    assert (found.corruptions, found.leaks) == ([], [])


def beside(image: Path, *words: object) -> str:
    """Run QEMU in the folder of the image, where it looks for the data file of a relative name."""
    ran = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, cwd=image.parent)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def by_qemu_beside(image: Path) -> bytes:
    raw = image.with_suffix(".raw")
    beside(image, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    return raw.read_bytes()


def test_writes_leave_snapshots_as_they_are(tapfs: Run, tmp_path: Path) -> None:
    """Tables and clusters that a snapshot shares are copied; what only it has is kept."""
    image = tmp_path / "image"
    choice = random.Random(4)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", image, SIZE)
    expected = bytearray(SIZE)
    states: dict[str, bytes] = {}
    for name in ("one", "two", "three"):
        change(image, expected, choice)
        is_clean(image)
        qemu("qemu-img", "snapshot", "-c", name, image)
        states[name] = bytes(expected)
    change(image, expected, choice)
    is_clean(image)
    for name, state in states.items():
        assert tapfs("convert", "--snapshot", name, "-O", "raw", image, tmp_path / "out").code == 0
        assert (tmp_path / "out").read_bytes() == state
        assert by_qemu(image, "-f", "qcow2", "-l", name) == state
    qemu("qemu-img", "snapshot", "-d", "two", image)
    change(image, expected, choice)
    is_clean(image)
    qemu("qemu-img", "snapshot", "-a", "one", image)
    expected[:] = states["one"]
    change(image, expected, choice)
    is_clean(image)
    assert by_qemu(image) == expected


@pytest.mark.parametrize(
    "words", [(), ("-o", "compression_type=zstd"), ("-o", "cluster_size=512"), ("-o", "refcount_bits=1")]
)
def test_compressed_images_are_clean_and_no_larger(
    tapfs: Run, sample: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert tapfs("convert", "-c", "-f", "raw", "-O", "qcow2", *words, sample, ours).code == 0
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *words, sample, theirs)
    is_clean(ours)
    assert by_qemu(ours) == sample.read_bytes()
    assert ours.stat().st_size <= theirs.stat().st_size + 65536
    expected = bytearray(sample.read_bytes())
    change(ours, expected, random.Random(1))
    is_clean(ours)
    assert by_qemu(ours) == expected


def test_bitmaps_that_follow_the_disk_are_in_use_while_it_is_written(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, 3 * MIB)
    qemu("qemu-img", "bitmap", "-f", "qcow2", "--add", image, "followed")
    qemu("qemu-img", "bitmap", "-f", "qcow2", "--add", "--disable", image, "still")

    def flags() -> dict[str, list[str]]:
        info = json.loads(qemu("qemu-img", "info", "-U", "--output=json", image))
        return {each["name"]: each["flags"] for each in info["format-specific"]["data"]["bitmaps"]}

    with tapfs_package.open(image, writable=True) as disk:
        assert flags() == {"followed": ["auto"], "still": []}
        disk.write(0, b"x")
        assert flags() == {"followed": ["in-use", "auto"], "still": []}
        listed = json.loads(tapfs("info", "-U", "--json", image).out)["details"]["bitmaps"]
        assert [each["consistent"] for each in listed] == [False, True]
    is_clean(image)
    assert flags() == {"followed": ["auto"], "still": []}


def test_bits_of_unknown_autoclear_features_are_cleared(tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, MIB)
    data = bytearray(image.read_bytes())
    data[88] |= 0x40
    image.write_bytes(data)
    with tapfs_package.open(image) as disk:
        disk.read(0, 10)
    assert image.read_bytes()[88] == 0x40, "a reader changes nothing"
    with tapfs_package.open(image, writable=True) as disk:
        disk.write(0, b"x")
    assert image.read_bytes()[88] == 0


def test_an_image_that_qemu_left_dirty(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", image, MIB)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 300k", "-c", "flush", "-c", "sigraise 9", image],
        capture_output=True,
        check=False,
    )
    with pytest.raises(tapfs_package.ImageError, match="was not closed after writing"):
        tapfs_package.open(image, writable=True)
    with tapfs_package.open(image) as disk:
        assert disk.read(0, 307200) == b"\7" * 307200
    assert tapfs("check", image).code == 2, "the refcounts are behind"
    ran = tapfs("repair", image)
    assert ran.code == 0, ran.err
    is_clean(image)
    with tapfs_package.open(image, writable=True) as disk:
        assert disk.read(0, 307200) == b"\7" * 307200
        disk.write(0, b"again")


@pytest.mark.usefixtures("each_qemu")
@pytest.mark.parametrize("cluster_size", [8192, 65536, 2 * MIB])
def test_readers_with_a_small_window_read_each_compressed_cluster(
    tapfs: Run, tmp_path: Path, cluster_size: int
) -> None:
    """7-Zip, dissect, whose zlib is given 4 KiB of window, and both QEMUs read what `convert -c` packed."""
    choice = random.Random(cluster_size)
    strings = [choice.randbytes(choice.randint(2, 30)) for _ in range(300)]
    data = b"".join(choice.choices(strings, k=4 * MIB // 20))[: 3 * MIB].ljust(4 * MIB, b"\0")
    raw, image = tmp_path / "a.raw", tmp_path / "a.qcow2"
    raw.write_bytes(data)
    words = ["-c", "-f", "raw", "-O", "qcow2", "-o", f"cluster_size={cluster_size}"]
    assert tapfs("convert", *words, raw, image).code == 0
    assert by_qemu(image) == data
    with image.open("rb") as file:
        assert QCow2(file).open().read(len(data)) == data
    unpacked = subprocess.run(["7zz", "e", "-so", "-tqcow", image], capture_output=True, check=True)
    assert unpacked.stdout == data

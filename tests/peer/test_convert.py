"""Both ways with qemu-img and qemu-io: what they write tapfs reads, what tapfs writes they read."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import sha256_of

Run = Callable[..., Any]
DONE = (0, "", "")
MIB = 1 << 20


def qemu(*words: object, code: int = 0) -> str:
    """Run one of QEMU's tools; it must end with `code`."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout


def converted_by_qemu(raw: Path, image: Path, *options: str) -> None:
    """A raw disk as qcow by qemu-img.

    With -c it ends with 1, silently, although the image is complete (7.2 at least: the driver
    refuses the empty write that qemu-img ends a compressed image with). So the image is looked at.
    """
    words = ["qemu-img", "convert", *options, "-f", "raw", "-O", "qcow", raw, image]
    done = subprocess.run(words, capture_output=True, check=False)
    assert done.returncode in ((0, 1) if "-c" in options else (0,)), done.stderr
    same_to_qemu(raw, image)


def overlay_for_qemu(image: Path, parent: Path, parent_format: str) -> str:
    """For --image-opts: a qcow header cannot say what format its parent has."""
    return f"driver=qcow,file.filename={image},backing.driver={parent_format},backing.file.filename={parent}"


def same_to_qemu(raw: Path, image: Path) -> None:
    """qemu-img must read from `image` what `raw` holds."""
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow", raw, image)


@pytest.fixture
def read_by_tapfs(tapfs: Run, tmp_path: Path) -> Callable[..., bytes]:
    """The whole disk as tapfs converts it."""

    def read(image: Path, *options: object) -> bytes:
        target = tmp_path / "read-by-tapfs.raw"
        assert tapfs("convert", "-f", "qcow", *options, "-O", "raw", image, target) == DONE
        content = target.read_bytes()
        target.unlink()
        return content

    return read


def _raw_by_qemu(image: Path, *options: object) -> bytes:
    target = image.with_name("read-by-qemu.raw")
    qemu("qemu-img", "convert", "-f", "qcow", "-O", "raw", *options, image, target)
    content = target.read_bytes()
    target.unlink()
    return content


@pytest.mark.parametrize("options", [(), ("-c",)])
def test_tapfs_reads_what_qemu_converts(
    read_by_tapfs: Callable[..., bytes], sample: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    image = tmp_path / "a.qcow"
    converted_by_qemu(sample, image, *options)
    assert read_by_tapfs(image) == sample.read_bytes()


@pytest.mark.parametrize("options", [(), ("-c",), ("-o", "blktap=on")])
def test_qemu_reads_what_tapfs_converts(tapfs: Run, sample: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    image = tmp_path / "a.qcow"
    assert tapfs("convert", *options, "-f", "raw", "-O", "qcow", sample, image) == DONE
    same_to_qemu(sample, image)


def test_without_options_the_layout_is_qemus(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert tapfs("create", "-f", "qcow", ours, "64M") == DONE
    qemu("qemu-img", "create", "-f", "qcow", theirs, "64M")
    assert ours.read_bytes() == theirs.read_bytes()


def scattered_writes(size: int, *, backwards: bool) -> list[tuple[int, int, int]]:
    """Writes as (pattern, offset, length), whole sectors, some overlapping."""
    chance = random.Random(7)
    writes: list[tuple[int, int, int]] = []
    for pattern in range(1, 120):
        length = 512 * chance.choice((1, 2, 7, 8, 9, 64, 200))
        writes.append((pattern, 512 * chance.randrange((size - length) // 512), length))
    if backwards:
        writes.sort(key=lambda write: -write[1])
    return writes


def disk_after(size: int, writes: list[tuple[int, int, int]], below: bytes = b"") -> bytes:
    disk = bytearray(below[:size].ljust(size, b"\0"))
    for pattern, offset, length in writes:
        disk[offset : offset + length] = bytes([pattern]) * length
    return bytes(disk)


def written_by_qemu_io(image: Path | str, writes: list[tuple[int, int, int]], *options: str) -> None:
    commands = [word for pattern, offset, length in writes for word in ("-c", f"write -P {pattern} {offset} {length}")]
    qemu("qemu-io", *options, *commands, image)


@pytest.mark.parametrize("backwards", [False, True])
def test_tapfs_reads_scattered_writes_of_qemu_io(
    read_by_tapfs: Callable[..., bytes], tmp_path: Path, *, backwards: bool
) -> None:
    image = tmp_path / "a.qcow"
    qemu("qemu-img", "create", "-f", "qcow", image, 8 * MIB)
    writes = scattered_writes(8 * MIB, backwards=backwards)
    written_by_qemu_io(image, writes, "-f", "qcow")
    assert read_by_tapfs(image) == disk_after(8 * MIB, writes)


def test_qemu_goes_on_writing_what_tapfs_made(
    tapfs: Run, read_by_tapfs: Callable[..., bytes], sample: Path, tmp_path: Path
) -> None:
    for flags in ((), ("-c",), ("-o", "blktap=on")):
        image = tmp_path / "a.qcow"
        assert tapfs("convert", *flags, "-f", "raw", "-O", "qcow", sample, image) == DONE
        size = sample.stat().st_size
        writes = scattered_writes(size, backwards=False)
        written_by_qemu_io(image, writes, "-f", "qcow")
        expected = disk_after(size, writes, sample.read_bytes())
        assert _raw_by_qemu(image) == expected
        assert read_by_tapfs(image) == expected


@pytest.mark.parametrize("parent_format", ["raw", "qcow"])
@pytest.mark.parametrize("size", [2 * MIB, 5 * MIB])
def test_overlays_of_qemu(
    read_by_tapfs: Callable[..., bytes], sample: Path, tmp_path: Path, parent_format: str, size: int
) -> None:
    """The parent is named relatively, and is shorter or longer than the overlay."""
    qemu("qemu-img", "convert", "-f", "raw", "-O", parent_format, sample, tmp_path / "parent")
    image = tmp_path / "overlay.qcow"
    qemu("qemu-img", "create", "-f", "qcow", "-b", "parent", "-F", parent_format, image, size)
    writes = scattered_writes(size, backwards=False)
    written_by_qemu_io(overlay_for_qemu(image, tmp_path / "parent", parent_format), writes, "--image-opts")
    expected = disk_after(size, writes, sample.read_bytes())
    assert read_by_tapfs(image, "--backing-format", parent_format) == expected


@pytest.mark.parametrize("parent_format", ["raw", "qcow"])
def test_qemu_reads_overlays_of_tapfs(tapfs: Run, sample: Path, tmp_path: Path, parent_format: str) -> None:
    assert tapfs("convert", "-f", "raw", "-O", parent_format, sample, tmp_path / "parent") == DONE
    changed = tmp_path / "changed.raw"
    changed.write_bytes(
        disk_after(sample.stat().st_size, scattered_writes(sample.stat().st_size, backwards=True), sample.read_bytes())
    )
    image = tmp_path / "overlay.qcow"
    words = ("convert", "-f", "raw", "-O", "qcow", "-b", "parent", "-F", parent_format, changed, image)
    assert tapfs(*words) == DONE
    opened = overlay_for_qemu(image, tmp_path / "parent", parent_format)
    qemu("qemu-img", "compare", "--image-opts", f"driver=raw,file.filename={changed}", opened)


def _secret(key: Path) -> tuple[str, ...]:
    return ("--object", f"secret,id=s,file={key}")


@pytest.mark.parametrize("password", ["pw", "exactly sixteen!", "longer than sixteen bytes"])
def test_tapfs_reads_what_qemu_encrypts(read_by_tapfs: Callable[..., bytes], tmp_path: Path, password: str) -> None:
    key, image = tmp_path / "key", tmp_path / "a.qcow"
    key.write_text(password)
    options = "encrypt.format=aes,encrypt.key-secret=s"
    qemu("qemu-img", "create", "-q", *_secret(key), "-f", "qcow", "-o", options, image, 8 * MIB)
    writes = scattered_writes(8 * MIB, backwards=False)
    opened = f"driver=qcow,file.filename={image},encrypt.format=aes,encrypt.key-secret=s"
    written_by_qemu_io(opened, writes, *_secret(key), "--image-opts")
    assert read_by_tapfs(image, "--key-file", key) == disk_after(8 * MIB, writes)


def test_qemu_reads_what_tapfs_encrypts(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    key, image = tmp_path / "key", tmp_path / "a.qcow"
    key.write_text("a secret")
    words = ("convert", "-f", "raw", "-O", "qcow", "--encrypt", "--target-key-file", key, sample, image)
    assert tapfs(*words) == DONE
    opened = f"driver=qcow,file.filename={image},encrypt.format=aes,encrypt.key-secret=s"
    raw = f"driver=raw,file.filename={sample}"
    qemu("qemu-img", "compare", *_secret(key), "--image-opts", raw, opened)


def test_every_blktap_image_converts_to_its_guest_disk(
    tapfs: Run, blktap_images: dict[str, Any], tmp_path: Path
) -> None:
    assert len(blktap_images) == 8
    for name, fixture in blktap_images.items():
        below = [] if fixture.backing is None else ["--backing", fixture.backing, "--backing-format", "raw"]
        raw = tmp_path / f"{name}.raw"
        assert tapfs("convert", *below, "-O", "raw", fixture.path, raw) == DONE
        assert sha256_of(raw) == fixture.guest_sha256, name
        again = tmp_path / f"{name}.qcow"
        assert tapfs("convert", *below, "-O", "qcow", fixture.path, again) == DONE
        same_to_qemu(raw, again)


def test_qemu_reads_a_repaired_blktap_image(tapfs: Run, blktap_images: dict[str, Any], tmp_path: Path) -> None:
    """QEMU misreads these as they are; `repair` normalises what it trips over."""
    for name in ("standalone-2007-le-l1", "sparse-2007-le-l1"):
        fixture = blktap_images[name]
        raw, image = tmp_path / "a.raw", tmp_path / "a.qcow"
        image.write_bytes(fixture.path.read_bytes())
        assert tapfs("convert", "-O", "raw", image, raw) == DONE
        qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow", raw, image, code=1)
        assert tapfs("repair", "-q", image) == DONE
        assert sha256_of(raw) == fixture.guest_sha256
        same_to_qemu(raw, image)

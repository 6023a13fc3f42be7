"""Scratch writes: an overlay takes them, the image stays as it is."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import Fixture, Ran, sha256_of
from tests.fuse.conftest import Mounts, refused, wait_for
from tests.fuse.test_partitions import mounted, output, with_file_systems
from tests.unit.partitions.test_tables import LOGICAL, MIB, partitioned


def compare(first: str, first_format: str, second: Path) -> int:
    """qemu-img's answer: 0 same, 1 different."""
    words = ["qemu-img", "compare", "-f", first_format, "-F", "raw", first, second]
    return subprocess.run(words, check=False, capture_output=True).returncode


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A raw disk with partitions and two file systems, which nobody may write."""
    disk = partitioned(tmp_path / "base.raw", LOGICAL)
    with_file_systems(disk, (1, 7), b"content" * 1000)
    disk.chmod(0o444)
    return disk


@pytest.mark.usefixtures("root")
def test_edited_kept_and_taken_up_again(mounts: Mounts, tmp_path: Path, base: Path) -> None:
    before = sha256_of(base)
    overlay = tmp_path / "scratch.qcow"
    directory = mounts.mount(base, "--overlay", overlay)  # not named raw: it is not written
    with mounted(directory / "part1", tmp_path / "inside") as inside:
        (inside / "new").write_bytes(b"new" * 5000)
        (inside / "file1").unlink()
    output("e2fsck", "-fn", directory / "part1")
    mounts.umount(directory)
    assert sha256_of(base) == before
    assert mounts.run("check", overlay).code == 0

    directory = mounts.mount(base, "--rw", "--overlay", overlay)
    with mounted(directory / "part1", tmp_path / "inside") as inside:
        assert (inside / "new").read_bytes() == b"new" * 5000
        assert not (inside / "file1").exists()
    subprocess.run(["mkfs.ext4", "-qF", directory / "part7"], check=True)
    subprocess.run(["tune2fs", "-L", "again", directory / "part1"], check=True, capture_output=True)
    written = tmp_path / "written.raw"
    written.write_bytes((directory / "disk").read_bytes())
    mounts.umount(directory)
    assert sha256_of(base) == before
    assert compare(str(overlay), "qcow", written) == 0
    shown = json.loads(mounts.run("info", "--json", "--backing-format", "raw", overlay).out)
    assert shown["backing"]["path"] == str(base)
    table = {entry["number"]: entry["file_system"] for entry in shown["partitions"]["table"]}
    assert table[1]["label"] == "again"
    assert table[7]["label"] is None


@pytest.mark.parametrize(
    "name", ["standalone-2007-le-l1", "overlay-2007-le-l1", "overlay-2006-12byte-ext", "empty-2010-oversized-l1"]
)
def test_over_old_images(mounts: Mounts, tmp_path: Path, blktap_images: dict[str, Fixture], name: str) -> None:
    """Parents, and what the user says of them, are those of the image without an overlay."""
    image = blktap_images[name]
    before = sha256_of(image.path)
    backing = [] if image.backing is None else ["--backing", image.backing, "--backing-format", "raw"]
    for options in (["--temp"], ["--overlay", tmp_path / "scratch"], ["--overlay", tmp_path / "scratch"]):
        directory = mounts.mount(image.path, *backing, *options)
        with (directory / "disk").open("r+b", buffering=0) as file:
            old = file.read(5007)
            file.seek(5000)
            file.write(b"scratch")
            file.seek(0)
            assert file.read(5007) == old[:5000] + b"scratch"
            file.seek(5000)
            file.write(old[5000:])
        assert sha256_of(directory / "disk") == image.guest_sha256
        mounts.umount(directory)
    assert sha256_of(image.path) == before


def test_a_probed_image_with_a_parent(mounts: Mounts, tmp_path: Path, sample: Path) -> None:
    """As without an overlay: the image that the user names is probed, its parent by its header's word or the user's."""
    middle = tmp_path / "middle.qcow"
    assert mounts.run("create", "-f", "qcow", "-b", sample, "-F", "raw", middle).code == 0
    plain = mounts.mount(middle)
    expected = sha256_of(plain / "disk")
    mounts.umount(plain)
    overlay = tmp_path / "scratch"
    for _ in range(2):
        directory = mounts.mount(middle, "--overlay", overlay)
        assert sha256_of(directory / "disk") == expected
        mounts.umount(directory)


def test_a_forged_base_is_not_followed(mounts: Mounts, tmp_path: Path, sample: Path) -> None:
    """A guest wrote a qcow header into its raw disk: with -f raw the overlay's parent stays raw."""
    forged = tmp_path / "forged.raw"
    assert mounts.run("create", "-f", "qcow", "-b", sample, "-F", "raw", forged).code == 0
    content = forged.read_bytes()
    for _ in range(2):
        directory = mounts.mount(forged, "-f", "raw", "--overlay", tmp_path / "scratch")
        assert (directory / "disk").read_bytes().startswith(content)
        mounts.umount(directory)


def test_a_length_that_is_no_multiple_of_a_sector(mounts: Mounts, tmp_path: Path) -> None:
    """The overlay's disk is whole sectors; what is past the end of the image reads as zeros."""
    image = tmp_path / "image"
    image.write_bytes(b"a" * (MIB + 100))
    directory = mounts.mount(image, "--temp")
    assert (directory / "disk").read_bytes() == image.read_bytes() + bytes(412)
    mounts.umount(directory)


def test_temporary_is_gone(mounts: Mounts, tmp_path: Path, sample: Path) -> None:
    before = sha256_of(sample)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    mounts.environment["TMPDIR"] = str(scratch)
    directory = mounts.mount(sample, "--temp")
    with (directory / "disk").open("r+b") as file:
        file.write(b"changed" * 100_000)
    listed = json.loads(mounts.run("list", "--json").out)["mounts"]
    assert [(entry["mode"], entry["image"]) for entry in listed] == [("rw", f"{sample} (temporary overlay)")]
    assert list(scratch.iterdir()) == []
    mounts.umount(directory)
    directory = mounts.mount(sample, "--temp")
    assert (directory / "disk").read_bytes() == sample.read_bytes()
    mounts.umount(directory)
    assert sha256_of(sample) == before


def test_temporary_is_gone_after_a_kill(mounts: Mounts, tmp_path: Path, sample: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    mounts.environment["TMPDIR"] = str(scratch)
    directory = mounts.mount(sample, "--temp")
    (directory / "disk").open("r+b").close()
    [server] = mounts.processes()
    held = [os.readlink(entry) for entry in Path(f"/proc/{server}/fd").iterdir() if entry.is_symlink()]
    assert any(name.startswith(str(scratch)) for name in held)
    mounts.kill(server)
    wait_for(lambda: not mounts.processes())
    assert mounts.run("umount", directory).code == 0
    assert list(scratch.iterdir()) == []


@pytest.fixture
def little_room(mounts: Mounts, tmp_path: Path, root: None) -> Iterator[None]:
    """Temporary overlays have 1 MiB."""
    folder = tmp_path / "little room"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "little-room", folder], check=True)
    mounts.environment["TMPDIR"] = str(folder)
    yield
    subprocess.run(["umount", folder], check=True)


def write_until_full(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    with refused(errno.ENOSPC, errno.EIO):
        for number in range(64):
            os.pwrite(descriptor, b"x" * 65536, number * 65536)
            os.fsync(descriptor)
    with suppress(OSError):
        os.close(descriptor)


@pytest.mark.usefixtures("little_room")
def test_a_full_temporary_is_unmounted(mounts: Mounts, flat: Path) -> None:
    """Nothing is to be kept, so there is nothing to flush."""
    before = sha256_of(flat)
    directory = mounts.mount(flat, "--temp")
    write_until_full(directory / "disk")
    mounts.umount(directory)
    files = mounts.mount(flat, "--temp", "--files")
    write_until_full(files / "new")
    mounts.umount(files)
    assert sha256_of(flat) == before


@pytest.mark.usefixtures("little_room")
def test_a_full_temporary_ends_on_a_signal(mounts: Mounts, flat: Path) -> None:
    directory = mounts.directory()
    process = mounts.foreground(flat, directory, "--temp")
    write_until_full(directory / "disk")
    wait_for(lambda: mounts.served_by(process.pid))  # it looks at its mount by a process that ends
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    assert "cannot flush" not in said.partition("ending on SIGTERM")[2]


def test_kept_after_a_kill(mounts: Mounts, tmp_path: Path, sample: Path) -> None:
    """What fsync acknowledged is in the overlay."""
    overlay = tmp_path / "scratch"
    directory = mounts.mount(sample, "--overlay", overlay)
    descriptor = os.open(directory / "disk", os.O_RDWR)
    os.pwrite(descriptor, b"acknowledged", 777_777)
    os.fsync(descriptor)
    [server] = mounts.processes()
    mounts.kill(server)
    with refused():
        os.close(descriptor)
    wait_for(lambda: not mounts.processes())
    assert mounts.run("umount", directory).code == 0
    directory = mounts.mount(sample, "--overlay", overlay)
    expected = bytearray(sample.read_bytes())
    expected[777_777 : 777_777 + 12] = b"acknowledged"
    assert (directory / "disk").read_bytes() == expected
    mounts.umount(directory)


def test_encrypted(mounts: Mounts, tmp_path: Path, flat: Path) -> None:
    """The overlay over an encrypted image holds nothing in the clear either."""
    image, key, overlay = tmp_path / "image", tmp_path / "key", tmp_path / "scratch"
    key.write_text("secret\n")
    words = ["--encrypt", "--target-key-file", key, flat, image]
    assert mounts.run("convert", "-f", "raw", "-O", "qcow", *words).code == 0
    refusal = mounts.run("mount", "--overlay", overlay, image, mounts.directory())
    assert (refusal.code, overlay.exists()) == (19, False)
    secret = b"nobody may read this " * 1000
    for _ in range(2):
        directory = mounts.mount(image, "--key-file", key, "--overlay", overlay)
        with (directory / "disk").open("r+b", buffering=0) as file:
            assert file.read(2048) == flat.read_bytes()[:2048]
            file.seek(MIB)
            file.write(secret)
        mounts.umount(directory)
    assert secret[:40] not in overlay.read_bytes()
    assert mounts.run("info", "--json", overlay).code == 0


@pytest.mark.parametrize(
    "which", ["other base", "no overlay", "the image", "a parent", "garbage", "a folder", "no folder"]
)
def test_refused(mounts: Mounts, tmp_path: Path, sample: Path, which: str) -> None:
    image, other = tmp_path / "image", tmp_path / "other"
    assert mounts.run("create", "-f", "qcow", "-b", sample, "-F", "raw", image).code == 0
    overlay = tmp_path / "scratch"
    code, word = 18, "overlay"
    if which == "other base":
        other.write_bytes(sample.read_bytes())
        assert mounts.run("create", "-f", "qcow", "-b", other, "-F", "raw", overlay).code == 0
    elif which == "no overlay":
        assert mounts.run("create", "-f", "qcow", overlay, "8M").code == 0
    elif which == "the image":
        overlay = image
    elif which == "a parent":
        overlay = tmp_path / "link"
        overlay.symlink_to(sample)
    elif which == "garbage":
        overlay.write_bytes(b"garbage" * 1000)
        code, word = 11, "qcow"
    elif which == "a folder":
        overlay.mkdir()
        code, word = 11, "directory"
    else:
        overlay = tmp_path / "missing" / "scratch"
        code, word = 17, "its folder does not exist"
    before = {path: sha256_of(path) for path in (image, sample, overlay) if path.is_file()}
    refusal = mounts.run("mount", "--overlay", overlay, image, mounts.directory())
    assert refusal.code == code
    assert word in refusal.err
    assert refusal.err.count("\n") == 1
    assert {path: sha256_of(path) for path in before} == before
    assert mounts.mounted() == []


def test_in_use(mounts: Mounts, tmp_path: Path, sample: Path) -> None:
    """One writer an overlay; the image takes any number of overlays, and no writer."""
    overlay = tmp_path / "scratch"
    image = tmp_path / "image"
    image.write_bytes(sample.read_bytes())
    first = mounts.mount(image, "--overlay", overlay)
    second = mounts.mount(image, "--temp")
    assert mounts.run("mount", "--overlay", overlay, image, mounts.directory()).code == 15
    assert mounts.run("mount", "-f", "raw", "--rw", image, mounts.directory()).code == 15
    mounts.umount(first)
    mounts.umount(second)


def test_one_of_both(mounts: Mounts, tmp_path: Path, sample: Path) -> None:
    refusal = mounts.run("mount", "--temp", "--overlay", tmp_path / "scratch", sample, mounts.directory())
    assert refusal == Ran(64, "", refusal.err)
    assert "not allowed with" in refusal.err


def test_no_room_for_a_temporary(mounts: Mounts, tmp_path: Path, sample: Path) -> None:
    mounts.environment["TMPDIR"] = str(tmp_path / "missing")
    refusal = mounts.run("mount", "--temp", sample, mounts.directory())
    assert refusal.code == 17
    assert str(tmp_path / "missing") in refusal.err

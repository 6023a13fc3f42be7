"""Commit and rebase beside qemu-img: what either does to a chain the other reads as the same disk, and finds clean."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as api
from tests.conftest import Ran
from tests.peer.newest_qemu import newest_qemu
from tests.peer.test_convert import MIB, qemu

Run = Callable[..., Ran]
SIZE = 4 * MIB
QEMUS = ("qemu-img", "newest qemu-img")
#: What QEMU calls the formats of the base.
BASES = {"raw": "raw", "qcow2": "qcow2", "vmdk": "vmdk", "vhd": "vpc", "vhdx": "vhdx"}
OVERLAYS: dict[str, dict[str, str]] = {
    "v3": {},
    "v2": {"compat": "0.10", "cluster_size": "4096"},
    "subclusters": {"extended_l2": "on"},
}


def program(name: str) -> str:
    return "qemu-img" if name == "qemu-img" else newest_qemu("qemu-img")


def scribble(path: Path, name: str, seed: str) -> None:
    choice = random.Random(seed)
    with api.open(path, format=name, writable=True) as disk:
        for _ in range(12):
            offset = choice.randrange(SIZE // 512) * 512
            length = min(choice.choice([512, 5120, 200_192]), SIZE - offset)
            if choice.random() < 0.3:
                disk.write_zeroes(offset, length)
            else:
                disk.write(offset, choice.randbytes(length))


def chain(folder: Path, base_format: str, options: dict[str, str]) -> tuple[Path, Path, Path]:
    """A base, an overlay, and the disk of the overlay as a raw file."""
    base, over, disk = folder / "base.img", folder / "over.qcow2", folder / "disk.raw"
    api.create(base, base_format, SIZE)
    scribble(base, base_format, "base")
    api.create(over, "qcow2", SIZE, backing="base.img", backing_format=base_format, options=options)
    scribble(over, "qcow2", "over")
    api.convert(over, disk, target_format="raw")
    return base, over, disk


def same(qemu_img: str, image: Path, name: str, disk: Path) -> None:
    assert api.compare(image, disk, left_format={"vpc": "vhd"}.get(name, name), right_format="raw") is None
    qemu(qemu_img, "compare", "-q", "-f", name, "-F", "raw", image, disk)


@pytest.mark.parametrize("peer", QEMUS)
@pytest.mark.parametrize("options", OVERLAYS)
@pytest.mark.parametrize("base_format", BASES)
def test_qemu_reads_what_was_committed(tmp_path: Path, tapfs: Run, base_format: str, options: str, peer: str) -> None:
    base, over, disk = chain(tmp_path, base_format, OVERLAYS[options])
    assert tapfs("commit", "-q", over).code == 0
    same(program(peer), base, BASES[base_format], disk)
    same(program(peer), over, "qcow2", disk)
    qemu(program(peer), "check", "-q", over)
    found = json.loads(qemu(program(peer), "map", "--output=json", over))
    assert all(extent["depth"] == 1 or not extent["present"] for extent in found)


@pytest.mark.parametrize("peer", QEMUS)
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
def test_both_commit_the_same(tmp_path: Path, tapfs: Run, base_format: str, peer: str) -> None:
    chain(tmp_path, base_format, {})
    other = tmp_path / "other"
    other.mkdir()
    for path in (tmp_path / "base.img", tmp_path / "over.qcow2"):
        shutil.copy(path, other)
    assert tapfs("commit", "-q", tmp_path / "over.qcow2").code == 0
    qemu(program(peer), "commit", "-q", other / "over.qcow2")
    for name, format_name in (("base.img", base_format), ("over.qcow2", "qcow2")):
        qemu(program(peer), "compare", "-q", "-f", format_name, "-F", format_name, tmp_path / name, other / name)


@pytest.mark.parametrize("more", [{}, {"extended_l2": "on"}])
def test_both_empty_a_data_file(
    tmp_path: Path, tapfs: Run, more: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either leaves an overlay that holds nothing, and holes in the data file; the other reads it."""
    monkeypatch.chdir(tmp_path)  # QEMU looks for the data file there
    qemu_img = program("newest qemu-img")
    base, over, disk = chain(tmp_path, "raw", {"data_file": "outside", **more})
    files = [base, over, tmp_path / "outside"]
    before = [path.read_bytes() for path in files]
    for tool in ("tapfs", "qemu-img"):
        for path, data in zip(files, before, strict=True):
            path.write_bytes(data)
        if tool == "tapfs":
            assert tapfs("commit", "-q", over).code == 0
            assert (tmp_path / "outside").stat().st_blocks == 0
        else:
            qemu(qemu_img, "commit", "-q", over)
        same(qemu_img, base, "raw", disk)
        same(qemu_img, over, "qcow2", disk)
        found = json.loads(qemu(qemu_img, "map", "--output=json", over))
        assert all(extent["depth"] == 1 or not extent["present"] for extent in found)
        assert not any(extent.depth == 0 and extent.present for extent in _extents(over))
        qemu(qemu_img, "check", "-q", over)
        assert tapfs("check", "-q", over).code == 0


def _extents(path: Path) -> list[api.MappedExtent]:
    with api.open(path, backing_formats=["raw"]) as disk:
        return list(disk.extents())


@pytest.mark.parametrize("peer", QEMUS)
@pytest.mark.parametrize("options", OVERLAYS)
@pytest.mark.parametrize("base_format", BASES)
def test_qemu_reads_what_was_rebased(tmp_path: Path, tapfs: Run, base_format: str, options: str, peer: str) -> None:
    _, over, disk = chain(tmp_path, base_format, OVERLAYS[options])
    other = tmp_path / "other.img"
    api.create(other, base_format, SIZE // 2)
    with api.open(other, format=base_format, writable=True) as image:
        image.write(MIB, b"o" * MIB)
    for backing in (("-b", "other.img", "-F", base_format), ("-b", ""), ("-b", str(other), "-B", base_format)):
        assert tapfs("rebase", "-q", *backing, over).code == 0
        same(program(peer), over, "qcow2", disk)
        qemu(program(peer), "check", "-q", over)
        said = json.loads(qemu(program(peer), "info", "--output=json", over))
        assert said.get("backing-filename", "") == backing[1]
        assert said.get("backing-filename-format") == (BASES[base_format] if backing[1] else None)


@pytest.mark.parametrize("peer", QEMUS)
def test_tapfs_reads_what_qemu_has_committed_and_rebased(tmp_path: Path, tapfs: Run, peer: str) -> None:
    base, over, disk = chain(tmp_path, "qcow2", {})
    other = tmp_path / "other.raw"
    other.write_bytes(b"o" * SIZE)
    qemu(program(peer), "rebase", "-q", "-b", "other.raw", "-F", "raw", over)
    same(program(peer), over, "qcow2", disk)
    assert tapfs("check", "-q", over).code == 0
    qemu(program(peer), "rebase", "-q", "-u", "-b", "base.img", "-F", "qcow2", over)
    assert tapfs("rebase", "-q", "-u", "-b", "other.raw", "-F", "raw", over).code == 0
    same(program(peer), over, "qcow2", disk)
    qemu(program(peer), "commit", "-q", over)
    same(program(peer), over, "qcow2", disk)
    same(program(peer), other, "raw", disk)
    assert base.exists()


def test_a_file_that_qemu_has_open_is_left_alone(tmp_path: Path, tapfs: Run) -> None:
    base, over, _ = chain(tmp_path, "qcow2", {})
    contents = base.read_bytes(), over.read_bytes()
    for path in (base, over):
        words = ["qemu-io", "-f", "qcow2", str(path)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
            assert holder.stdin is not None
            assert holder.stdout is not None
            holder.stdin.write("read 0 512\n")
            holder.stdin.flush()
            assert "512/512" in holder.stdout.readline()
            assert "qemu-io" in tapfs("commit", over).err
            holder.communicate("quit\n")
        assert (base.read_bytes(), over.read_bytes()) == contents

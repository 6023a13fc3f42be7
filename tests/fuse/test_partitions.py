"""Partitions as files of their own, taken by the tools that take disks."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fuse.conftest import Mounts, refused, wait_for
from tests.unit.partitions.test_tables import GPT, LOGICAL, MIB, partitioned


def output(*words: object) -> str:
    """What a command prints; it must not fail."""
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout


def with_file_systems(disk: Path, numbers: tuple[int, ...], content: bytes) -> None:
    """Make ext4 file systems with one file in partitions of a raw disk."""
    table = json.loads(output("sfdisk", "--json", disk))["partitiontable"]["partitions"]
    for partition in table:
        number = int(partition["node"].removeprefix(str(disk)))
        if number not in numbers:
            continue
        part, source = disk.with_suffix(".part"), disk.with_suffix(".files")
        source.mkdir(exist_ok=True)
        (source / f"file{number}").write_bytes(content)
        part.write_bytes(bytes(partition["size"] * 512))
        subprocess.run(["mkfs.ext4", "-qF", "-L", f"label{number}", "-d", source, part], check=True)
        with disk.open("r+b") as file:
            file.seek(partition["start"] * 512)
            file.write(part.read_bytes())
        part.unlink()
        (source / f"file{number}").unlink()


def loops_on(path: Path) -> list[str]:
    """Loop devices over files below a folder."""
    listed = json.loads(output("losetup", "--json", "--list") or '{"loopdevices": []}')
    return [each["name"] for each in listed["loopdevices"] if each["back-file"].startswith(f"{path}/")]


@contextmanager
def mounted(source: Path, target: Path, *options: str) -> Generator[Path]:
    """A file system mounted over a loop device."""
    target.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", ",".join(("loop", *options)), source, target], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", target], check=True)
        wait_for(lambda: not loops_on(source.parent))


@pytest.mark.parametrize("format_name", ["raw", "qcow"])
@pytest.mark.parametrize(("script", "shown"), [(GPT, [1, 2, 7, 128]), (LOGICAL, [1, 4, 5, 6, 7])])
def test_each_has_its_place_and_size(
    mounts: Mounts, tmp_path: Path, script: str, shown: list[int], format_name: str
) -> None:
    disk = partitioned(tmp_path / "disk.raw", script)
    with disk.open("r+b") as file:
        for offset in range(MIB, 60 * MIB, 4096):
            file.seek(offset)
            file.write(offset.to_bytes(8, "big"))
    if script is LOGICAL:  # the tables of the chain were among that
        subprocess.run(["sfdisk", "--quiet", "--wipe=never", disk], input=script, text=True, check=True)
    image = disk
    if format_name == "qcow":
        image = tmp_path / "disk.qcow"
        assert mounts.run("convert", "-f", "raw", "-O", "qcow", disk, image).code == 0
    table = json.loads(output("sfdisk", "--json", disk))["partitiontable"]["partitions"]
    directory = mounts.mount(image, "-f", format_name)
    assert os.listdir(directory) == ["disk", *(f"part{number}" for number in shown), "info.json"]
    whole = disk.read_bytes()
    for partition in table:
        number = int(partition["node"].removeprefix(str(disk)))
        if number in shown:
            start, size = partition["start"] * 512, partition["size"] * 512
            part = directory / f"part{number}"
            assert stat.filemode(part.stat().st_mode) == "-r--------"
            assert part.read_bytes() == whole[start : start + size]
            with part.open("rb") as file:
                file.seek(size - 5)
                assert file.read(100) == whole[start + size - 5 : start + size]
    info = (directory / "info.json").read_text()
    assert info == mounts.run("info", "--json", "-f", format_name, image).out
    numbers = [entry["number"] for entry in json.loads(info)["partitions"]["table"] if not entry["container"]]
    assert numbers == shown
    mounts.umount(directory)


@pytest.mark.parametrize("script", [GPT, LOGICAL])
def test_fdisk_lists_the_same(mounts: Mounts, tmp_path: Path, script: str) -> None:
    disk = partitioned(tmp_path / "disk", script)
    directory = mounts.mount(disk)
    direct, through = output("fdisk", "-l", disk), output("fdisk", "-l", directory / "disk")
    assert through.replace(f"{directory}/disk", str(disk)).split() == direct.split()
    mounts.umount(directory)


@pytest.mark.usefixtures("root")
def test_file_systems_inside(mounts: Mounts, tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk", LOGICAL)
    content = random.Random(4).randbytes(MIB)
    with_file_systems(disk, (1, 7), content)
    directory = mounts.mount(disk)
    table = json.loads((directory / "info.json").read_text())["partitions"]["table"]
    found = {entry["number"]: entry["file_system"] for entry in table}
    for number in (1, 7):
        part = directory / f"part{number}"
        output("e2fsck", "-fn", part)
        with mounted(part, tmp_path / "inside", "ro") as inside:
            assert (inside / f"file{number}").read_bytes() == content
        assert found[number]["label"] == f"label{number}"
        assert found[number]["uuid"] in output("blkid", "-p", part)
    assert found[5] is None
    mounts.umount(directory)


@pytest.mark.usefixtures("root")
def test_the_nodes_of_a_loop_device(mounts: Mounts, tmp_path: Path) -> None:
    """The kernel's nodes on DIR/disk are as large as ours."""
    disk = partitioned(tmp_path / "disk", LOGICAL)
    directory = mounts.mount(disk)
    loop = output("losetup", "--find", "--show", "--read-only", directory / "disk").strip()
    try:
        output("partx", "--add", loop)
        sizes = {
            path.name.removeprefix(Path(loop).name + "p"): int((path / "size").read_text()) * 512
            for path in Path("/sys/block", Path(loop).name).glob("loop*p*")
        }
    finally:
        # They would outlive the loop device's file.
        subprocess.run(["partx", "--delete", loop], check=False, capture_output=True)
        output("losetup", "--detach", loop)
    ours = {path.name.removeprefix("part"): path.stat().st_size for path in directory.glob("part*")}
    assert ours.items() <= sizes.items()
    assert set(sizes) - set(ours) == {"2"}, "the extended partition"
    wait_for(lambda: not loops_on(directory))
    mounts.umount(directory)


@pytest.mark.usefixtures("root")
def test_writing_into_a_partition(mounts: Mounts, tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk", LOGICAL)
    before = disk.read_bytes()
    table = json.loads(output("sfdisk", "--json", disk))["partitiontable"]["partitions"]
    place = next(each for each in table if each["node"] == f"{disk}6")
    start, end = place["start"] * 512, (place["start"] + place["size"]) * 512
    directory = mounts.mount(disk, "-f", "raw", "--rw")
    part = directory / "part6"
    assert stat.filemode(part.stat().st_mode) == "-rw-------"
    subprocess.run(["mkfs.ext4", "-qF", "-L", "made", part], check=True)
    with mounted(part, tmp_path / "inside") as inside:
        (inside / "file").write_bytes(b"content" * 1000)
    with part.open("r+b", buffering=0) as file:
        file.seek(end - start - 3)
        assert file.write(b"123456") == 3
        with refused():
            file.write(b"4")
    output("e2fsck", "-fn", part)
    mounts.umount(directory)
    after = disk.read_bytes()
    assert after[:start] == before[:start]
    assert after[end:] == before[end:]
    assert after[end - 3 : end] == b"123"
    shown = json.loads(mounts.run("info", "--json", disk).out)["partitions"]["table"]
    assert next(entry for entry in shown if entry["number"] == 6)["file_system"]["label"] == "made"


def test_a_new_table_shows_in_the_next_mount(mounts: Mounts, tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk", GPT)
    directory = mounts.mount(disk, "-f", "raw", "--rw")
    before = sorted(os.listdir(directory))
    subprocess.run(
        ["sfdisk", "-q", "--wipe=always", directory / "disk"], input="label: dos\nsize=2M\n", text=True, check=True
    )
    assert sorted(os.listdir(directory)) == before
    mounts.umount(directory)
    directory = mounts.mount(disk)
    assert os.listdir(directory) == ["disk", "part1", "info.json"]
    assert (directory / "part1").stat().st_size == 2 * MIB
    mounts.umount(directory)


def test_an_unreadable_table_does_not_keep_from_mounting(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow"
    assert mounts.run("create", "-f", "qcow", image, "8M").code == 0
    directory = mounts.mount(image, "--rw")
    (directory / "disk").write_bytes(b"x" * 4096)
    mounts.umount(directory)
    header = image.read_bytes()[:48]
    l1 = int.from_bytes(header[40:48], "big")
    with image.open("r+b") as file:
        file.seek(l1)
        file.write((1 << 40).to_bytes(8, "big"))
    shown = mounts.run("info", "--json", image)
    if shown.code == 0:  # else the damage is found at opening already
        assert "cannot be read" in json.loads(shown.out)["partitions"]["notes"][0]
        directory = mounts.mount(image)
        assert os.listdir(directory) == ["disk", "info.json"]
        mounts.umount(directory)
    assert shown.code in {0, 2}


def test_encrypted(mounts: Mounts, tmp_path: Path) -> None:
    """Without the password only the metadata is told; the guest's table is none of it."""
    disk = partitioned(tmp_path / "disk.raw", GPT)
    image, key = tmp_path / "disk.qcow", tmp_path / "key"
    key.write_text("secret\n")
    words = ["--encrypt", "--target-key-file", key, disk, image]
    assert mounts.run("convert", "-f", "raw", "-O", "qcow", *words).code == 0
    shown = mounts.run("info", "--json", image)
    assert "partitions" not in json.loads(shown.out)
    with_key = mounts.run("info", "--json", "--key-file", key, image)
    assert len(json.loads(with_key.out)["partitions"]["table"]) == 4
    directory = mounts.mount(image, "--key-file", key)
    assert (directory / "info.json").read_text() == with_key.out
    assert (directory / "part2").stat().st_size == 5 * MIB
    mounts.umount(directory)

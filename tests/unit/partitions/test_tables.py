"""Partition tables as sfdisk and fdisk write and read them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tapfs.partitions.contents import disk_contents
from tapfs.partitions.table import DiskContents, Partition
from tests.conftest import Ran

MIB = 1 << 20
SECTOR = 512


def look_at(path: Path) -> DiskContents:
    """What is on a raw disk; it must not be read past its end, and little of it."""
    size = path.stat().st_size
    amounts: list[int] = []
    with path.open("rb", buffering=0) as file:

        def read(offset: int, length: int) -> bytes:
            data = os.pread(file.fileno(), length, offset)
            assert 0 < len(data) == length
            amounts.append(length)
            return data

        contents = disk_contents(read, size)
    assert sum(amounts) < 4 * MIB
    return contents


def partitioned(path: Path, script: str, size: int = 64 * MIB) -> Path:
    """A raw disk partitioned by sfdisk."""
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run(["sfdisk", "--quiet", path], input=script, text=True, check=True)
    return path


def as_sfdisk(contents: DiskContents) -> list[dict[str, object]]:
    """Our table in the terms of `sfdisk --json`."""
    sector = contents.table.sector_size
    assert sector is not None
    return [
        _as_sfdisk(partition, sector, gpt=contents.table.scheme == "gpt") for partition in contents.table.partitions
    ]


def _as_sfdisk(partition: Partition, sector: int, *, gpt: bool) -> dict[str, object]:
    shown: dict[str, object] = {
        "number": partition.number,
        "start": partition.start // sector,
        "size": partition.size // sector,
        "type": partition.type.upper() if gpt else f"{int(partition.type, 16):x}",
    }
    if gpt:
        shown["uuid"] = (partition.uuid or "").upper()
        if partition.name is not None:
            shown["name"] = partition.name
        if partition.bootable:
            shown["attrs"] = "LegacyBIOSBootable"
    elif partition.bootable:
        shown["bootable"] = True
    return shown


def by_sfdisk(path: Path) -> dict[str, object]:
    """What sfdisk says, with the numbers for the names."""
    done = subprocess.run(["sfdisk", "--json", path], check=True, capture_output=True, text=True)
    table: dict[str, object] = json.loads(done.stdout)["partitiontable"]
    partitions = table.get("partitions", [])
    assert isinstance(partitions, list)
    for partition in partitions:
        partition["number"] = int(partition.pop("node").removeprefix(str(path)))
    return table


GPT = """label: gpt
size=10M, type=U, name="EFI System"
size=5M, type=L, name="größe", attrs=LegacyBIOSBootable
7: size=3M, type=S
128: size=1M, type=21686148-6449-6E6F-744E-656564454649
"""

MBR = """label: dos
label-id: 0x1234abcd
1: size=10M, type=c, bootable
3: size=8M, type=83
"""

LOGICAL = """label: dos
1: size=10M, type=83
2: size=30M, type=f
4: size=5M, type=82
5: size=3M, type=83
6: size=4M, type=8e
7: size=5M, type=b
"""


@pytest.mark.parametrize(("script", "scheme"), [(GPT, "gpt"), (MBR, "mbr"), (LOGICAL, "mbr")])
def test_like_sfdisk(tmp_path: Path, script: str, scheme: str) -> None:
    disk = partitioned(tmp_path / "disk", script)
    contents, theirs = look_at(disk), by_sfdisk(disk)
    assert contents.table.scheme == scheme
    assert contents.table.sector_size == theirs["sectorsize"]
    assert contents.table.uuid == str(theirs["id"]).lower().removeprefix("0x")
    assert as_sfdisk(contents) == theirs["partitions"]
    assert contents.table.notes == []


@pytest.mark.parametrize("script", [GPT, LOGICAL])
def test_like_libblkid(tmp_path: Path, script: str) -> None:
    """What the kernel's nodes are numbered like, and the PARTUUID of blkid."""
    disk = partitioned(tmp_path / "disk", script)
    command = ["partx", "--raw", "--noheadings", "--output", "NR,START,SECTORS,UUID", disk]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ours = [
        [str(p.number), str(p.start // SECTOR), str(p.size // SECTOR), p.uuid] for p in look_at(disk).table.partitions
    ]
    assert ours == [line.split() for line in shown.splitlines()]


def test_sectors_of_4096_bytes(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(b"")
    os.truncate(disk, 64 * MIB)
    words = "g\nn\n1\n\n+10M\nn\n5\n\n+5M\nx\nn\n1\nhello\nr\nw\n"
    subprocess.run(["fdisk", "-b", "4096", disk], input=words, text=True, check=True, capture_output=True)
    shown = subprocess.run(
        ["fdisk", "-b", "4096", "--bytes", "-o", "Device,Start,Size,Name", "-l", disk],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    theirs = [line.split() for line in shown.splitlines() if line.startswith(f"{disk}")]
    contents = look_at(disk)
    assert contents.table.sector_size == 4096
    assert [
        [f"{disk}{p.number}", str(p.start // 4096), str(p.size), *([p.name] if p.name else [])]
        for p in contents.table.partitions
    ] == theirs
    assert len(theirs) == 2


def _overwrite(disk: Path, offset: int, data: bytes) -> None:
    with disk.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("damage", [SECTOR + 16, SECTOR + 100, 2 * SECTOR + 60])
def test_the_backup_of_a_damaged_gpt(tmp_path: Path, damage: int) -> None:
    disk = partitioned(tmp_path / "disk", GPT)
    whole = look_at(disk)
    _overwrite(disk, damage, b"damage")
    damaged = look_at(disk)
    if damage == SECTOR + 100:  # after the header: nothing is damaged
        assert damaged == whole
        return
    assert damaged.table.partitions == whole.table.partitions
    assert as_sfdisk(damaged) == by_sfdisk(disk)["partitions"]
    assert len(damaged.table.notes) == 1
    assert "backup" in damaged.table.notes[0]


def test_a_gpt_with_no_header_left(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk", GPT)
    _overwrite(disk, SECTOR, bytes(8))
    _overwrite(disk, disk.stat().st_size - SECTOR, bytes(8))
    table = look_at(disk).table
    assert (table.scheme, table.partitions) == (None, [])
    assert "neither" in table.notes[0]


def test_a_damaged_backup_is_told(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk", GPT)
    _overwrite(disk, disk.stat().st_size - SECTOR, bytes(8))
    table = look_at(disk).table
    assert len(table.partitions) == 4
    assert table.notes == ["the backup GPT is missing or damaged"]


def test_a_grown_disk(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk", GPT)
    os.truncate(disk, 80 * MIB)
    table = look_at(disk).table
    assert len(table.partitions) == 4
    assert "grown" in table.notes[0]


@pytest.mark.parametrize("script", [GPT, LOGICAL])
def test_a_cut_disk(tmp_path: Path, script: str) -> None:
    disk = partitioned(tmp_path / "disk", script)
    whole = look_at(disk).table.partitions
    size = 14 * MIB
    os.truncate(disk, size)
    cut = look_at(disk)
    assert [(p.number, p.start, p.size) for p in cut.table.partitions] == [
        (p.number, p.start, min(p.size, size - p.start)) for p in whole if p.start < size
    ]
    assert any("cut there" in note for note in cut.table.notes)
    assert any("left out" in note or "broken" in note for note in cut.table.notes)


def test_overlapping_partitions_are_told(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk", MBR)
    _overwrite(disk, 446 + 2 * 16 + 8, (4096).to_bytes(4, "little"))
    table = look_at(disk).table
    assert [p.number for p in table.partitions] == [1, 3]
    assert table.notes == ["partitions 1 and 3 overlap"]


def _table_sector(*entries: tuple[int, int, int]) -> bytes:
    """An MBR or a table of its chain from (type, start, count)."""
    packed = b"".join(
        bytes(4) + bytes([kind, 0, 0, 0]) + start.to_bytes(4, "little") + count.to_bytes(4, "little")
        for kind, start, count in entries
    )
    return bytes(446) + packed.ljust(64, b"\0") + b"\x55\xaa"


def test_a_chain_that_comes_back(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(2 * MIB))
    _overwrite(disk, 0, _table_sector((0x05, 100, 3000)))
    _overwrite(disk, 100 * SECTOR, _table_sector((0x83, 1, 10), (0x05, 50, 100)))
    _overwrite(disk, 150 * SECTOR, _table_sector((0x83, 1, 20), (0x05, 50, 100)))
    table = look_at(disk).table
    assert [(p.number, p.start // SECTOR, p.size // SECTOR) for p in table.partitions] == [
        (1, 100, 3000),
        (5, 101, 10),
        (6, 151, 20),
    ]
    assert "comes back" in table.notes[0]


def test_a_chain_without_end(tmp_path: Path) -> None:
    """A thousand links without a partition are given up, a thousand with one are cut at 256."""
    disk = tmp_path / "disk"
    for kind, most in ((0x00, 1), (0x83, 256)):
        with disk.open("wb") as file:
            file.truncate(2 * MIB)
        _overwrite(disk, 0, _table_sector((0x05, 100, 3000)))
        for link in range(1000):
            _overwrite(
                disk, (100 + 2 * link) * SECTOR, _table_sector((kind, 1, 1 if kind else 0), (5, 2 * link + 2, 2))
            )
        numbers = [p.number for p in look_at(disk).table.partitions]
        assert len(numbers) <= most
        assert max(numbers) <= 256


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024, 4095, 70_001])
def test_disks_of_any_length(tmp_path: Path, size: int) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(_table_sector((0x83, 1, 5), (0xEE, 1, 7))[:size].ljust(size, b"E"))
    look_at(disk)


@pytest.mark.parametrize("command", [["mkfs.vfat"], ["mkfs.vfat", "-F", "32"], ["mkfs.ntfs", "-FqQ"], ["mkfs.exfat"]])
def test_a_file_system_on_the_whole_disk_is_no_table(tmp_path: Path, command: list[str]) -> None:
    """Their boot sectors end in 55 aa like an MBR; boot code may look like entries."""
    disk = tmp_path / "disk"
    disk.write_bytes(b"")
    os.truncate(disk, 64 * MIB)
    subprocess.run([*command, disk], check=True, capture_output=True)
    for entry in (bytes(16), _table_sector((0x83, 2048, 4096))[446:462]):
        _overwrite(disk, 446, entry)
        contents = look_at(disk)
        assert contents.table.scheme is None
        assert contents.table.partitions == []
        assert contents.file_system is not None


def test_boot_code_is_no_table(tmp_path: Path) -> None:
    """55 aa, but what would be boot indicators are none."""
    disk = tmp_path / "disk"
    disk.write_bytes((b"No operating system found. " * 20)[:510] + b"\x55\xaa" + bytes(MIB))
    assert look_at(disk).table.scheme is None


def test_description_is_json(tmp_path: Path) -> None:
    disk = partitioned(tmp_path / "disk", GPT)
    shown = json.loads(json.dumps(look_at(disk).description()))
    assert shown["file_system"] is None
    assert shown["partitions"]["scheme"] == "gpt"
    first = shown["partitions"]["table"][0]
    assert (first["number"], first["start"], first["size"]) == (1, MIB, 10 * MIB)
    assert (first["type_name"], first["name"], first["bootable"]) == ("EFI System", "EFI System", False)


def test_info(tmp_path: Path, tapfs: Callable[..., Ran]) -> None:
    disk = partitioned(tmp_path / "disk", GPT.replace("größe", "\\x1b[31mred"))
    shown = json.loads(tapfs("info", "--json", disk).out)
    assert shown["partitions"] == look_at(disk).description()["partitions"]
    assert "\x1b[31mred" in [entry["name"] for entry in shown["partitions"]["table"]]
    lines = [line.split(":", 1)[-1].strip() for line in tapfs("info", disk).out.splitlines()]
    assert "gpt, sectors of 512 bytes" in lines
    assert "10 MiB at 1 MiB, EFI System, EFI System" in lines
    assert all(line.isprintable() for line in lines)


def test_info_of_a_whole_file_system(tmp_path: Path, tapfs: Callable[..., Ran]) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 16 * MIB)
    subprocess.run(["mkfs.ext4", "-qF", "-L", "label", disk], check=True)
    shown = json.loads(tapfs("info", "--json", disk).out)
    assert (shown["file_system"]["type"], shown["file_system"]["label"]) == ("ext4", "label")
    assert shown["partitions"] == {"scheme": None, "sector_size": None, "uuid": None, "table": [], "notes": []}
    assert f"file system: ext4 'label' ({shown['file_system']['uuid']})" in " ".join(tapfs("info", disk).out.split())

"""A check vouches for what it looked at and for nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tapfs as tapfs_package
from tapfs.disk import probe
from tapfs.disk.plugins import Plugin
from tapfs.driver import Driver, Geometry, HostFile, OpenRequest
from tapfs.errors import EXIT_NOT_CHECKED
from tapfs.extent import Extent, Kind
from tapfs.findings import CheckReport, Severity
from tests.conftest import Ran

Run = Callable[..., Ran]
MIB = 1 << 20
COMMANDS = (["check"], ["check", "-r", "all"], ["check", "-r", "leaks"], ["repair"], ["repair", "-n"])


class PlainDriver:
    """A driver with a map and without a check."""

    format_name = "plain"

    def __init__(self, file: HostFile) -> None:
        self.geometry = Geometry(virtual_size=file.size() - 512, granule=512, map_unit=MIB)

    def map(self, offset: int, length: int) -> list[Extent]:
        return [Extent(offset, length, Kind.DATA, host_offset=offset + 512)]

    def details(self) -> dict[str, object]:
        return {}


class PlainFormat:
    """The format of `PlainDriver`."""

    name = "plain"

    def probe(self, head: bytes, size: int) -> int:
        del size
        return 100 if head.startswith(b"plain") else 0

    def open(self, file: HostFile, request: OpenRequest) -> Driver:
        del request
        return PlainDriver(file)


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An image of another package's format."""
    monkeypatch.setattr(probe, "_others", lambda: {"plain": Plugin(PlainFormat(), "the driver of a test")})
    probe.format_named.cache_clear()
    path = tmp_path / "a.plain"
    path.write_bytes(b"plain".ljust(4096, b"\0"))
    yield path
    probe.format_named.cache_clear()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(4096))
    return path


@pytest.mark.parametrize("kind", ["raw", "plain"])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_cannot_be_checked_is_not_called_sound(
    tapfs: Run, raw: Path, plain: Path, kind: str, command: list[str]
) -> None:
    image = raw if kind == "raw" else plain
    before = image.read_bytes()
    why = "a raw image has no metadata" if kind == "raw" else "the driver of the format plain has no check"
    assert tapfs(*command, image) == (63, f"{image}: nothing was checked: {why}\n", "")
    code, out, err = tapfs(*command, "--json", image)
    said = json.loads(out)
    assert (code, err) == (EXIT_NOT_CHECKED, "")
    assert (said["checked"], said["unchecked"]) == (False, why)
    if command != ["repair", "-n"]:
        assert tapfs(*command, "-q", image) == (63, "", "")
    assert image.read_bytes() == before


def test_a_ram_disk(tapfs: Run, ram_name: str) -> None:
    assert tapfs("create", ram_name, "64K").code == 0
    for command in COMMANDS:
        code, out, _ = tapfs(*command, ram_name)
        assert (code, out) == (63, f"{ram_name}: nothing was checked: a ram image has no metadata\n")


def test_in_python(raw: Path) -> None:
    for report in (tapfs_package.check(raw), tapfs_package.repair(raw)):
        assert not report.checked
        assert report.unchecked == "a raw image has no metadata"
    assert CheckReport().checked


def test_what_was_checked_says_so(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    assert tapfs("create", "-f", "qcow", image, "1M").code == 0
    code, out, _ = tapfs("check", "--json", image)
    said = json.loads(out)
    assert code == 0
    assert (said["checked"], said["unchecked"], said["unchecked_parent"]) == (True, None, None)


def test_the_parent_is_not_part_of_it(tapfs: Run, raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "over.qcow"
    assert tapfs("create", "-f", "qcow", "-b", "a.raw", "-F", "raw", image).code == 0
    note = "note: the backing file a.raw was not looked at: check it by itself\n"
    for command in (["check"], ["repair"]):
        code, out, err = tapfs(*command, image)
        assert (code, err) == (0, "")
        assert note in out
        assert json.loads(tapfs(*command, "--json", image).out)["unchecked_parent"] == "a.raw"
    report = tapfs_package.check(image)
    assert report.unchecked_parent == "a.raw"
    assert [finding.severity for finding in report.findings if "a.raw" in finding.message] == [Severity.NOTE]
    raw.unlink()
    assert "note: the backing file a.raw is missing\n" in tapfs("check", image).out


def test_it_is_neither_opened_nor_told_of_behind_the_backing_root(tapfs: Run, tmp_path: Path) -> None:
    """A fifo would be waited for, or let a writer go."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    parent = outside / "parent"
    parent.write_bytes(bytes(4096))
    image = inside / "over.qcow"
    assert tapfs("create", "-f", "qcow", "-b", "../outside/parent", "-F", "raw", image).code == 0
    parent.unlink()
    words = ("check", "--backing-root", inside, image)
    said = tapfs(*words)
    assert said.code == 0
    assert "note: the backing file ../outside/parent was not looked at: check it by itself\n" in said.out
    os.mkfifo(parent)
    assert tapfs(*words) == said
    assert tapfs("check", image) == said

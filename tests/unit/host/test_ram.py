"""RAM disks: shared by processes, alive after any of them, filled from and saved to images."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.cli.main import main
from tapfs.host import ram

SIZE = 1 << 20


@pytest.fixture
def name() -> Iterator[str]:
    name = f"ram:test-{secrets.token_hex(8)}"
    yield name
    if any(disk.name == name.removeprefix("ram:") for disk in ram.ram_disks()):
        ram.remove(name)


def test_two_processes_write_one_disk_and_it_outlives_them(name: str) -> None:
    tapfs.create(name, "ram", SIZE)
    other = f"""
import sys, time, tapfs
disk = tapfs.open({name!r}, writable=True)
disk.write(0, b"other")
print("written", flush=True)
sys.stdin.readline()
print(disk.read(4096, 4).decode(), flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        with tapfs.open(name, writable=True) as disk:
            assert disk.read(0, 5) == b"other"
            disk.write(4096, b"mine")
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "mine\n"
        process.send_signal(signal.SIGKILL)
    with tapfs.open(name) as disk:
        assert disk.read(0, 5) + disk.read(4096, 4) == b"othermine"
        assert disk.format_name == "ram"


def test_filled_from_an_image_and_saved_to_one(name: str, tmp_path: Path) -> None:
    source, saved = tmp_path / "source.raw", tmp_path / "saved.qcow"
    source.write_bytes(secrets.token_bytes(SIZE // 2) + bytes(SIZE // 2))
    assert main(["convert", "-f", "raw", "-O", "ram", str(source), name]) == 0
    assert main(["convert", "-O", "qcow", name, str(saved)]) == 0
    assert main(["compare", "-f", "raw", "-F", "qcow", str(source), str(saved)]) == 0


def test_a_name_is_taken_once_and_removed_once(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    tapfs.create(name, "ram", SIZE)
    with pytest.raises(ImageError) as raised:
        tapfs.create(name, "ram", SIZE)
    assert raised.value.kind is ErrorKind.EXISTS
    assert main(["remove", name]) == 0
    assert main(["remove", name]) == 17
    assert name in capsys.readouterr().err


@pytest.mark.parametrize("bad", ["ram:", "ram:../x", "ram:a/b", "ram:.hidden", "ram:" + "x" * 201, "ram:a\nb"])
def test_names_that_are_no_names_are_refused(bad: str) -> None:
    with pytest.raises(ImageError) as raised:
        tapfs.open(bad)
    assert raised.value.kind is ErrorKind.INVALID_ARGUMENT
    assert "\n" not in str(raised.value)


def test_the_format_and_the_name_go_together(tmp_path: Path, name: str) -> None:
    for path, format_name in ((str(tmp_path / "x"), "ram"), (name, "qcow")):
        with pytest.raises(ImageError) as raised:
            tapfs.create(path, format_name, SIZE)
        assert raised.value.kind is ErrorKind.UNSUPPORTED

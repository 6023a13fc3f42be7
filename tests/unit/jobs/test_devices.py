"""New images on block devices and in streams: only what was asked for is written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as api
from tapfs.disk import probe
from tapfs.disk.plugins import Plugin
from tapfs.driver import Trait
from tapfs.errors import CODES, ErrorKind
from tapfs.formats.raw import IdentityFormat
from tapfs.jobs import create
from tapfs.jobs.create import NewImage
from tests.unit.host.test_file import loop_device

Run = Callable[..., Any]
MIB = 1 << 20
SIZE = 6 * MIB
NOISE = bytes(range(1, 251)) * (SIZE // 250 + 1)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """What lies behind the device: noise everywhere."""
    path = tmp_path / "disk"
    path.write_bytes(NOISE[:SIZE])
    return path


@pytest.mark.parametrize("place", [0, 510, MIB - 1, SIZE - MIB, SIZE - 1])
def test_a_device_with_data_needs_force(tapfs: Run, disk: Path, place: int) -> None:
    content = bytearray(SIZE)
    content[place] = 1
    disk.write_bytes(content)
    with loop_device(disk) as device:
        ran = tapfs("create", "-f", "raw", device, "1M")
        assert ran.code == CODES[ErrorKind.EXISTS].exit_code
        assert "--force" in ran.err
        assert f"{place:#x}" in ran.err
    assert disk.read_bytes() == content


def test_a_blank_device_needs_none_and_keeps_what_lies_behind(tapfs: Run, disk: Path) -> None:
    content = bytes(MIB) + NOISE[: SIZE - 2 * MIB] + bytes(MIB)
    disk.write_bytes(content)
    with loop_device(disk) as device:
        assert tapfs("create", "-f", "raw", device, 2 * MIB + 5).code == 0
    assert disk.read_bytes() == bytes(2 * MIB + 5) + content[2 * MIB + 5 :]


def test_no_more_is_zeroed_than_was_asked_for(tapfs: Run, disk: Path) -> None:
    with loop_device(disk) as device:
        assert tapfs("create", "-f", "raw", "--force", device, "1M").code == 0
    assert disk.read_bytes() == bytes(MIB) + NOISE[MIB:SIZE]
    with loop_device(disk) as device, create.new_image(device, NewImage("raw", 2 * MIB), overwrite=True) as image:
        assert image.read(MIB, MIB) == bytes(MIB)
    assert disk.read_bytes() == bytes(2 * MIB) + NOISE[2 * MIB : SIZE]


def test_a_device_is_not_enlarged(tapfs: Run, disk: Path) -> None:
    with loop_device(disk) as device:
        ran = tapfs("create", "-f", "raw", "--force", device, "1T")
        assert ran.code == CODES[ErrorKind.OUT_OF_BOUNDS].exit_code
        assert f"{SIZE} bytes" in ran.err
        assert tapfs("create", "-f", "qcow", "--force", device, "1M").code == CODES[ErrorKind.UNSUPPORTED].exit_code
    assert disk.read_bytes() == NOISE[:SIZE]


@pytest.mark.parametrize("mode", [(), ("-n",)])
def test_convert_leaves_what_lies_behind_the_image(tapfs: Run, sample: Path, disk: Path, mode: tuple[str, ...]) -> None:
    size = sample.stat().st_size
    with loop_device(disk) as device:
        assert tapfs("convert", *mode, "-f", "raw", "-O", "raw", sample, device).code == 0
    assert disk.read_bytes() == sample.read_bytes() + NOISE[size:SIZE]


def test_a_device_that_is_too_small(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.write_bytes(NOISE[:MIB])
    with loop_device(small) as device:
        ran = tapfs("convert", "-f", "raw", "-O", "raw", sample, device)
        assert ran.code == CODES[ErrorKind.OUT_OF_BOUNDS].exit_code
    assert small.read_bytes() == NOISE[:MIB]


def test_streams_are_refused_in_words(tapfs_command: list[str], sample: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for target in ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "fifo", "/dev/null"):
        for words in (
            ["convert", "-f", "raw", "-O", "raw", str(sample), target],
            ["create", "-f", "raw", "--force", target, "1M"],
        ):
            done = subprocess.run([*tapfs_command, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
            assert done.returncode in {
                CODES[ErrorKind.UNSUPPORTED].exit_code,
                CODES[ErrorKind.INVALID_FORMAT].exit_code,
            }
            assert "stream" in done.stderr
            assert "name a file" in done.stderr
            assert done.stdout == ""
    assert os.listdir(tmp_path) == ["fifo"]
    done = subprocess.run([*tapfs_command, "info", "-"], capture_output=True, text=True, check=False)
    assert "no stream" in done.stderr


def test_a_file_behind_standard_output_is_not_replaced(tapfs_command: list[str], sample: Path, tmp_path: Path) -> None:
    with (tmp_path / "out").open("wb") as out:
        words = [*tapfs_command, "convert", "-f", "raw", "-O", "raw", str(sample), "/dev/stdout"]
        done = subprocess.run(words, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == CODES[ErrorKind.UNSUPPORTED].exit_code
    assert os.listdir(tmp_path) == ["out"]


def test_the_api_is_as_careful(disk: Path) -> None:
    with loop_device(disk) as device, pytest.raises(FileExistsError):
        api.create(device, "raw", MIB)
    assert disk.read_bytes() == NOISE[:SIZE]


class Whole(IdentityFormat):
    """A format of another package whose images are as long as their disk from the start."""

    def probe(self, head: bytes, size: int) -> int:
        del size
        return 100 * head.startswith(b"WHOLE")


def test_a_format_of_others_has_the_same_traits(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Whole("whole", frozenset({Trait.ON_DEVICE, Trait.NAMED_TO_WRITE}), {})
    plain = Whole("plain", frozenset(), {})
    plugins = {each.name: Plugin(each, "a test") for each in (whole, plain)}
    monkeypatch.setattr(probe, "_others", lambda: plugins)
    probe.format_named.cache_clear()
    try:
        with loop_device(disk) as device:
            api.create(device, "whole", MIB, overwrite=True)
            with pytest.raises(api.ImageError, match="growing plain image"):
                api.create(device, "plain", MIB, overwrite=True)
        (tmp_path / "image").write_bytes(b"WHOLE" + bytes(MIB))
        for format_name in ("whole", "plain"):
            api.open(tmp_path / "image", format=format_name, writable=True).close()
        for special in (whole, plain):
            plugins.clear()
            plugins[special.name] = Plugin(special, "a test")
            if special is plain:
                api.open(tmp_path / "image", writable=True).close()
            else:
                with pytest.raises(api.ImageError, match=r"a guess is not enough.*format='whole'"):
                    api.open(tmp_path / "image", writable=True)
    finally:
        probe.format_named.cache_clear()

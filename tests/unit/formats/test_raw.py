"""Creating raw images: options are obeyed or refused."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tapfs.driver import CreateRequest
from tapfs.errors import CODES, ErrorKind
from tapfs.formats.raw import FORMAT
from tapfs.plan import Write
from tapfs.testing.model import MemoryFile

Run = Callable[..., Any]
MIB = 1 << 20


@pytest.mark.parametrize(("format_name", "name"), [("raw", "a"), ("ram", None)])
def test_unknown_options_are_refused(tapfs: Run, tmp_path: Path, ram_name: str, format_name: str, name: str) -> None:
    target = ram_name if name is None else str(tmp_path / name)
    for option in ("bogus=1", "preallocation=some", "preallocation") + (
        ("preallocation=full",) if name is None else ()
    ):
        ran = tapfs("create", "-f", format_name, "-o", option, target, "1M")
        assert ran.code == CODES[ErrorKind.UNSUPPORTED].exit_code
        assert option.partition("=")[0] in ran.err
    assert os.listdir(tmp_path) == []
    assert tapfs("info", ram_name).code == CODES[ErrorKind.NOT_FOUND].exit_code


@pytest.mark.parametrize("value", ["off", "falloc", "full"])
def test_preallocation_takes_the_space_that_qemu_img_takes(tapfs: Run, tmp_path: Path, value: str) -> None:
    size = 5 * MIB + 512
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert tapfs("create", "-f", "raw", "-o", f"preallocation={value}", ours, size).code == 0
    words = ["qemu-img", "create", "-q", "-f", "raw", "-o", f"preallocation={value}", str(theirs), str(size)]
    subprocess.run(words, check=True)
    assert ours.stat().st_size == size
    assert abs(ours.stat().st_blocks - theirs.stat().st_blocks) <= 8  # a first block is always qemu-img's
    assert (ours.stat().st_blocks * 512 >= size) == (value != "off")
    assert not any(ours.read_bytes())


def test_a_converted_image_keeps_its_space(tapfs: Run, tmp_path: Path, sample: Path) -> None:
    out = tmp_path / "out"
    assert tapfs("convert", "-f", "raw", "-O", "raw", "-o", "preallocation=falloc", sample, out).code == 0
    assert out.read_bytes() == sample.read_bytes()
    assert out.stat().st_blocks * 512 >= out.stat().st_size


def test_no_space_leaves_nothing(tapfs: Run, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", str(tmp_path)], check=True)
    try:
        for value in ("falloc", "full"):
            ran = tapfs("create", "-f", "raw", "-o", f"preallocation={value}", tmp_path / "a", "8M")
            assert ran.code == CODES[ErrorKind.NO_SPACE].exit_code
        assert os.listdir(tmp_path) == []
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_long_plan_can_be_ended_between_its_stages() -> None:
    """Zeros for a large disk are planned in stages, and take no memory of that size."""
    size = (600 << 20) + 77
    made = FORMAT.create(CreateRequest(size, options={"preallocation": "full"}))
    assert len(made.stages) == 4
    written = [step for stage in made.stages for step in stage if isinstance(step, Write)]
    assert sum(len(step.data) for step in written) == size
    assert len({id(step.data) for step in written}) <= 2
    small = MemoryFile()
    small.apply(FORMAT.create(CreateRequest(1000, options={"preallocation": "full"})))
    assert small.data == bytes(1000)


def test_the_options_are_listed(tapfs: Run) -> None:
    assert "preallocation" in tapfs("create", "-f", "raw", "-o", "help").out
    assert tapfs("create", "-f", "ram", "-o", "help").out == "ram has no options.\n"

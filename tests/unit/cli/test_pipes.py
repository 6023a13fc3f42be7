"""Standard input and output as images: streams that are closed, and pipes that others have made non-blocking."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

import tapfs

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.mark.parametrize(("words", "closing"), [("-f raw disk.raw -O raw -", ">&-"), ("- -O raw out", "<&-")])
def test_a_closed_stream_is_an_error(tapfs_command: list[str], disk: Path, words: str, closing: str) -> None:
    script = f'"$@" convert {words} {closing}'
    ran = subprocess.run(
        ["sh", "-c", script, "sh", *tapfs_command], cwd=disk.parent, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 64
    assert "which is closed" in ran.stderr
    assert [each.name for each in disk.parent.iterdir()] == ["disk.raw"]


def test_a_non_blocking_pipe_is_waited_for(tapfs_command: list[str], disk: Path, tmp_path: Path) -> None:
    """Both ends are, the first program's output and the second one's input."""
    reader, writer = os.pipe()
    for descriptor in (reader, writer):
        os.set_blocking(descriptor, False)
    out = tmp_path / "out.qcow2"
    with subprocess.Popen([*tapfs_command, "convert", "-q", "-", "-O", "qcow2", out], stdin=reader) as second:
        os.close(reader)
        with subprocess.Popen([*tapfs_command, "convert", "-f", "raw", disk, "-O", "raw", "-"], stdout=writer) as first:
            os.close(writer)
    assert (first.returncode, second.returncode) == (0, 0)
    with tapfs.open(out) as image:
        assert image.read(0, image.size) == disk.read_bytes()

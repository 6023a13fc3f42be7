"""Power fails while an image is compacted: what is in use reads as before, what is free as before or as zeros.

The order of writes is what strace saw of `tapfs compact`.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

import tapfs
from tests import filled_file_systems as filled
from tests.crash.recorded import crashes, record

SIZE = 6 << 20
#: Kind: format, options of create, whether it is over a parent.
KINDS: dict[str, tuple[str, dict[str, str], bool]] = {
    "qcow": ("qcow", {}, False),
    "qcow2": ("qcow2", {"cluster_size": "4096"}, False),
    "qcow2 over a parent": ("qcow2", {"cluster_size": "16384"}, True),
    "vhd": ("vhd", {"block_size": "65536"}, False),
    "vdi": ("vdi", {}, False),
    "vhdx": ("vhdx", {"block_size": "1048576"}, False),
    "vmdk": ("vmdk", {}, False),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[tuple[int, int]]]:
    """An ext4 with noise in its free blocks, and where these are."""
    path = filled.make_ext(tmp_path_factory.mktemp("disk") / "ext", SIZE, "-b", "1024", "-m", "0")
    content = bytearray(path.read_bytes())
    free = [(offset, length) for offset, length in filled.free_by_dumpe2fs(path)]
    choice = random.Random(6)
    for offset, length in free:
        content[offset : offset + length] = choice.randbytes(length)
    return bytes(content), free


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_takes_nothing_that_is_in_use(
    tmp_path: Path, disk: tuple[bytes, list[tuple[int, int]]], kind: str
) -> None:
    format_name, options, over_parent = KINDS[kind]
    content, free = disk
    image, marks = tmp_path / "image", tmp_path / "marks"
    backing = None
    if over_parent:
        backing = str(tmp_path / "parent.raw")
        Path(backing).write_bytes(b"\xa5" * SIZE)
    tapfs.create(image, format_name, SIZE, backing=backing, backing_format=backing and "raw", options=options)
    with tapfs.open(image, format=format_name, writable=True) as opened:
        opened.write(0, content)
    before = image.read_bytes()
    words = [sys.executable, "-m", "tapfs.cli", "compact", "-q", "-f", format_name, str(image)]
    events = record(words, image, marks, tmp_path / "strace.log")
    crashed = tmp_path / "crashed"
    count = changed = 0
    for happened, left in crashes(before, events, random.Random(7), tries=4):
        crashed.write_bytes(left)
        assert not tapfs.check(crashed, format=format_name).corruptions, happened
        with tapfs.open(crashed, format=format_name) as opened:
            seen = bytearray(opened.read(0, SIZE))
        changed += bytes(seen) != content
        for offset, length in free:
            for at in range(offset, offset + length, 512):
                sector = bytes(seen[at : at + 512])
                assert sector in (content[at : at + 512], bytes(512)), (happened, at)
            seen[offset : offset + length] = content[offset : offset + length]
        assert bytes(seen) == content, happened
        count += 1
    assert count > 3
    assert changed

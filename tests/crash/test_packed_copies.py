"""Power fails while `convert -c` fills a new image: it has no name before all of it is durable, and is sound before.

An image that is made where nothing can be replaced (a block device, a file in a folder that is not to be written) is
filled under its name, by the same calls. So after each crash it has to be sound, and to read as the source or as what
nobody has written yet.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

import tapfs
from tests.crash.recorded import Barrier, crashes, record

CLUSTER = 4096
CLUSTERS = 48
KINDS: dict[str, tuple[dict[str, str], bool]] = {
    "zlib": ({"refcount_bits": "8"}, False),
    "zlib over a parent": ({"refcount_bits": "8"}, True),
    "zstd with subclusters": ({"compression_type": "zstd", "extended_l2": "on", "cluster_size": "16384"}, False),
    "subclusters over a parent": ({"extended_l2": "on", "cluster_size": "16384"}, True),
}


def disk_of(choice: random.Random) -> bytes:
    """Clusters that shrink, that do not, and zeros."""
    kinds = choice.choices(["text", "noise", "zeros"], (4, 2, 1), k=CLUSTERS)
    made = {
        "text": lambda: choice.randbytes(8) * (CLUSTER // 8),
        "noise": lambda: choice.randbytes(CLUSTER),
        "zeros": lambda: bytes(CLUSTER),
    }
    return b"".join(made[kind]() for kind in kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_leaves_what_is_sound_and_a_name_only_to_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    options, over_parent = KINDS[kind]
    choice = random.Random(kind)
    source, base, folder = tmp_path / "source", tmp_path / "base", tmp_path / "folder"
    folder.mkdir()
    old, new = disk_of(choice) if over_parent else bytes(CLUSTERS * CLUSTER), disk_of(choice)
    base.write_bytes(old)
    source.write_bytes(new)
    # Tables are written many times in between, as those of a large disk are.
    (tmp_path / "sitecustomize.py").write_text(
        "from tapfs.disk import stream_target\n"
        "from tapfs.jobs import packing\n"
        "stream_target._UNFLUSHED_LIMIT = 0\n"
        "packing.WINDOW_BYTES = 16384\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    words = [sys.executable, "-m", "tapfs.cli", "convert", "--no-sandbox", "-q", "-c", "-f", "raw", "-O", "qcow2"]
    said = {"cluster_size": str(CLUSTER), **options}
    words += ["-o", ",".join(f"{key}={value}" for key, value in said.items()), "-m", "1"]
    words += ["-b", str(base), "-F", "raw"] if over_parent else []
    # So strace shows a file of the folder that has no name yet.
    events = record([*words, str(source), str(folder / "made")], folder / "#", tmp_path / "marks", tmp_path / "log")
    assert isinstance(events[-1], Barrier), "it had its name before it was durable"
    assert sum(isinstance(event, Barrier) for event in events) > 20

    crashed, count, left = tmp_path / "crashed", 0, b""
    for happened, left in crashes(b"", events, random.Random(kind), tries=1):
        if not left.startswith(b"QFI"):  # no image yet
            assert not count, happened
            continue
        count += 1
        crashed.write_bytes(left)
        report = tapfs.check(crashed, format="qcow2")
        assert not report.corruptions, (happened, report.findings)
        with tapfs.open(crashed, format="qcow2", backing_formats=["raw"]) as disk:
            seen = disk.read(0, disk.size)
        for at in range(0, len(new), CLUSTER):
            assert seen[at : at + CLUSTER] in (new[at : at + CLUSTER], old[at : at + CLUSTER]), (happened, at)
    assert count > 40
    assert left == (folder / "made").read_bytes()
    with tapfs.open(folder / "made") as disk:
        assert disk.read(0, disk.size) == new
        assert any(extent.compressed for extent in disk.extents())

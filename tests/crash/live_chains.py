"""Overlays that are committed while a guest writes them, under power failures, with any seed.

The order of writes to the files is what strace saw. Each sector holds what it held at the last flush, or what was
written to it since.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import tapfs
from tests.crash import live_commit
from tests.crash.live_commit import COMPLETE, SIZE, writes
from tests.crash.recorded import crashes_of_files, record_files

SECTOR = 512
#: Formats of overlay and base, and the options of both.
CHAINS: dict[str, tuple[str, str, dict[str, str]]] = {
    "qcow2 over raw": ("qcow2", "raw", {}),
    "qcow2 over qcow2": ("qcow2", "qcow2", {"cluster_size": "16384"}),
    "vhdx over vhdx": ("vhdx", "vhdx", {"block_size": "1M"}),
}


def scribble(path: Path, format_name: str, choice: random.Random, model: bytearray) -> None:
    with tapfs.open(path, format=format_name, writable=True, write_base=True) as disk:
        for _ in range(15):
            offset = choice.randrange(SIZE // SECTOR) * SECTOR
            data = choice.randbytes(8) * (min(choice.choice([512, 4096, 70144]), SIZE - offset) // 8)
            disk.write(offset, data)
            model[offset : offset + len(data)] = data


def sectors(content: bytes | bytearray) -> list[bytes]:
    data = bytes(content)
    return [data[at : at + SECTOR] for at in range(0, SIZE, SECTOR)]


def live_commit_crashes(folder: Path, kind: str, seed: str) -> int:
    """Power failures in a live commit lose nothing that was flushed; how many there were."""
    over_format, base_format, options = CHAINS[kind]
    base, over, marks = folder / "base.img", folder / "over.img", folder / "marks"
    choice, model = random.Random(seed), bytearray(SIZE)
    tapfs.create(base, base_format, SIZE, options=options)
    scribble(base, base_format, choice, model)
    over_options = options if over_format == base_format else {}
    tapfs.create(over, over_format, SIZE, backing="base.img", backing_format=base_format, options=over_options)
    scribble(over, over_format, choice, model)
    marks.write_bytes(bytes(SECTOR))
    # What each sector may hold after so many flushes.
    flushed = [sectors(model)]
    written: list[dict[int, set[bytes]]] = []
    for some in writes(seed):
        later: dict[int, set[bytes]] = {}
        for offset, data in some:
            model[offset : offset + len(data)] = data
            for at in range(offset, offset + len(data), SECTOR):
                later.setdefault(at // SECTOR, set()).add(data[:SECTOR])
        written.append(later)
        flushed.append(sectors(model))

    images = [base, over, marks]
    starts = [path.read_bytes() for path in images]
    words = [sys.executable, live_commit.__file__, str(over), over_format, base_format, str(marks), seed]
    events = record_files(words, images, folder / "strace.log")
    seen: list[int] = []
    for number, left in crashes_of_files(starts, events, random.Random(seed), tries=1):
        for path, data in zip(images, left, strict=True):
            path.write_bytes(data)
        acknowledged = left[2][0]
        seen.append(acknowledged)
        with tapfs.open(over, format=over_format, backing_formats=[base_format]) as disk:
            found = sectors(disk.read(0, SIZE))
        if acknowledged == COMPLETE:
            assert found == flushed[-1]
            with tapfs.open(base, format=base_format) as disk:
                assert sectors(disk.read(0, SIZE)) == flushed[-1], number
            continue
        for index, sector in enumerate(found):
            if sector != flushed[acknowledged][index]:
                since = {piece for later in written[acknowledged:] for piece in later.get(index, ())}
                assert sector in since, (number, acknowledged, index)
    assert {*seen} == {0, 1, 2, COMPLETE}
    return len(seen)

"""Power fails under images on ext4 and XFS that are written through block devices and FUSE mounts.

A log of dm-log-writes is replayed to its flushes and marks: each fsync that returned is a mark. After a crash the file
system is mounted, which replays its journal. The image has to check clean, and every sector to hold what the last mark
before the crash acknowledged, or something that was written later.
"""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

from tests.laboratory import log_replay
from tests.laboratory.commands import run, say
from tests.laboratory.log_replay import Flags
from tests.laboratory.scenario import scenario
from tests.ublk.scenarios.block_devices import BlockDevices
from tests.ublk.scenarios.device_mapper import (
    DEVICE,
    FILE_SYSTEMS,
    MOUNT,
    empty_folder,
    logged,
    loop,
    mark,
    mounted,
    new_file,
)
from tests.ublk.scenarios.noted_writes import Kind, Written

KINDS = (
    Kind("qcow2"),
    Kind("vmdk"),
    Kind("vhd", ("-o", "block_size=65536")),
    Kind("qcow2", mounted=True),
    Kind("vdi", mounted=True),
)
ROUNDS, WRITES = 3, 6
SIZE = 48 << 20
#: The most flushes and marks of a log that are looked at.
MOST = 200


def _write(host: BlockDevices, kind: Kind, choice: random.Random) -> Written:
    """Write an image through its disk; each fsync that returned is marked in the log."""
    image, written = f"{MOUNT}/{kind.name}", Written()

    def note(name: str) -> None:
        mark(f"{kind.name}-{name}")
        written.marks[f"{kind.name}-{name}"] = written.count

    kind.create(image)
    note("made")
    with kind.disk(host, image) as device:
        disk = os.open(device, os.O_RDWR)
        for turn in range(ROUNDS):
            written.write(disk, choice, WRITES)
            note(str(turn))
        os.close(disk)
    return written


def _crash_everywhere(
    base: Path, log: Path, file_system: str, written: dict[Kind, Written], choice: random.Random
) -> int:
    """Replay the log to its flushes and marks, and look at each; how many there were."""
    source, target = os.open(log, os.O_RDONLY), os.open(base, os.O_RDWR)
    found = list(log_replay.entries(source))
    ready = next(at for at, entry in enumerate(found) if entry.mark == "ready")
    points = [
        at for at, entry in enumerate(found) if at > ready and entry.flags & (Flags.FLUSH | Flags.FUA | Flags.MARK)
    ]
    chosen = set(choice.sample(points, min(MOST, len(points)))) | {points[-1]}
    acknowledged: dict[Kind, int | None] = dict.fromkeys(written)
    crashed = base.with_name("crashed")
    for at, entry in enumerate(found):
        log_replay.replay(source, entry, target)
        for kind, each in written.items():
            if entry.mark in each.marks:
                acknowledged[kind] = each.marks[entry.mark]
        if at in chosen:
            subprocess.run(["cp", "--sparse=always", base, crashed], check=True)
            with loop(crashed) as device, mounted(device, file_system):
                for kind, each in written.items():
                    path, sure = Path(MOUNT, kind.name), acknowledged[kind]
                    if sure is not None or path.exists():
                        each.look(path, kind, sure or 0)
    os.close(source)
    os.close(target)
    say(f"{len(found)} entries, {len(points)} flushes and marks, {len(chosen)} looked at")
    return len(chosen)


def _power_fails(host: BlockDevices, file_system: str) -> str:
    choice = random.Random(file_system)
    with empty_folder():
        data, log = new_file("data", SIZE), new_file("log", 256 << 20)
        with loop(data) as lower, loop(log) as record, logged(lower, record, SIZE):
            run(*FILE_SYSTEMS[file_system], DEVICE)
            mark("ready")
            with mounted(DEVICE, file_system):
                written = {kind: _write(host, kind, choice) for kind in KINDS}
        data.unlink()
        count = _crash_everywhere(new_file("base", SIZE), log, file_system, written, choice)
    return f"{count} crash points"


@scenario(400)
def log_writes_ext4(host: BlockDevices) -> str:
    """Images on ext4: at every flush and mark nothing that was acknowledged is lost."""
    return _power_fails(host, "ext4")


@scenario(400)
def log_writes_xfs(host: BlockDevices) -> str:
    """Images on XFS: at every flush and mark nothing that was acknowledged is lost."""
    return _power_fails(host, "xfs")

"""`python -m tests.bench.idle_disks`: the memory that idle disks of Xen guests take together, on the simulated machine.

Every disk has a process, as on a host, and no guest has connected to it. A page that several processes share counts
once (PSS). The supervisor and the process that is forked count, too. Pages of the kernel do not, so what the host has
less of available stands beside it. With `--merge` the kernel then merges equal pages (KSM), as docs/xen.md has it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import trio

import tapfs
from tapfs.xen.device import Device
from tapfs.xen.host import MACHINE_VARIABLE, find_host
from tapfs.xen.xenstore.client import connect
from tests.xen.machine import Machine
from tests.xen.supervising import attach, disk
from tests.xen.supervisor_process import SupervisorProcess
from tests.xen.xenstored import Xenstored

MIB = 1 << 20
_FIRST_GUEST, _DISKS_OF_GUEST = 3, 20
_FORMATS = ("raw", "qcow", "qcow2", "vhd")
_KSM = Path("/sys/kernel/mm/ksm")
_FAST = {"run": "1", "pages_to_scan": "20000", "sleep_millisecs": "20"}


def proportional(pid: int) -> int:
    """The bytes of a process, each page divided by how many processes share it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def available() -> int:
    """The bytes that the host could give to others."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


def family(pid: int) -> list[int]:
    """A process and its children."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def devices(count: int) -> list[Device]:
    """So many disks, of as many guests as they need."""
    places = (divmod(number, _DISKS_OF_GUEST) for number in range(count))
    return [disk(f"xvd{chr(ord('a') + letter)}", domain=_FIRST_GUEST + guest) for guest, letter in places]


def make_image(folder: Path, device: Device, image_format: str) -> Path:
    """An empty image of 1 GiB for a disk."""
    path = folder / f"{device.key}.{image_format}"
    tapfs.create(str(path), image_format, 1024 * MIB)
    return path


@contextmanager
def merging() -> Generator[None]:
    """Have the kernel merge equal pages, faster than it does by itself, until the context ends."""
    before = {name: (_KSM / name).read_text() for name in _FAST}
    try:
        for name, value in _FAST.items():
            (_KSM / name).write_text(value)
        yield
    finally:
        for name, value in before.items():
            (_KSM / name).write_text(value)


async def merge(seconds: float) -> None:
    """Wait until a look at all pages, or two, has merged no more of them; at least so many seconds."""
    merged = -1
    while (now := int((_KSM / "pages_sharing").read_text())) > merged * 1.01:
        merged = now
        await trio.sleep(seconds)


def row(supervisor: SupervisorProcess, count: int, before: int, *, merged: bool) -> dict[str, int]:
    """What the supervisor and its disks take together now, in MiB."""
    each = [proportional(pid) for pid in family(supervisor.pid)]
    gone = before - available()
    made = {"disks": count, "merged": int(merged), "pss_mib": round(sum(each) / MIB), "gone_mib": round(gone / MIB)}
    print(made, file=sys.stderr, flush=True)
    return made


async def measure(
    machine: Machine, counts: list[int], settle_seconds: float, merge_seconds: float
) -> list[dict[str, int]]:
    """A row for each number of disks: what they take together, in MiB."""
    rows: list[dict[str, int]] = []
    async with trio.open_nursery() as nursery:
        xenstored = Xenstored(machine.directory)
        await nursery.start(xenstored.run)
        with SupervisorProcess(machine.directory) as supervisor:
            before = available()
            await trio.to_thread.run_sync(supervisor.start)
            async with connect(find_host()) as store:
                attached = 0
                for count in counts:
                    for device in devices(count)[attached:]:
                        if device.domain not in xenstored.domains:
                            xenstored.introduce(device.domain, f"guest {device.domain}")
                        image_format = _FORMATS[attached % len(_FORMATS)]
                        path = make_image(machine.directory, device, image_format)
                        words = "sync" if image_format == "raw" else image_format
                        await attach(store, device, path, image_format=words)
                        attached += 1
                    await trio.sleep(settle_seconds)
                    rows.append(row(supervisor, count, before, merged=False))
                if merge_seconds:
                    with merging():
                        await merge(merge_seconds)
                        rows.append(row(supervisor, counts[-1], before, merged=True))
        nursery.cancel_scope.cancel()
    return rows


def main() -> int:
    """Run, print, save."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.idle_disks", description=__doc__)
    parser.add_argument("--disks", type=int, nargs="+", default=[20, 100], help="so many, and so many more")
    parser.add_argument(
        "--settle", type=float, default=15, metavar="SECONDS", help="between the last start and the look"
    )
    parser.add_argument("--merge", type=float, default=0, metavar="SECONDS", help="then merge pages, between two looks")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="xen-") as name, Machine(Path(name)) as machine:
        os.environ.update({MACHINE_VARIABLE: name, "TAPFS_RUNTIME_DIR": f"{name}/run"})
        rows = trio.run(measure, machine, arguments.disks, arguments.settle, arguments.merge)
    for each in rows:
        how = "merged" if each["merged"] else "      "
        print(
            f"{each['disks']:>5} disks {how} {each['pss_mib']:>6} MiB, of the host's memory {each['gone_mib']:>6} MiB"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a request costs dom0, beside the kernel's own xen-blkback: under emulation only the ratios mean something."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.xen.scenarios.commands import run
from tests.xen.scenarios.contents import new_raw
from tests.xen.scenarios.dom0 import Dom0
from tests.xen.scenarios.guest import Guest
from tests.xen.scenarios.scenario import scenario

DISK_MEBIBYTES = 64
REQUESTS = {4096: 4000, 131072: 800}
DEPTH = 8


def _thread_nanoseconds(process: int) -> int:
    """What all threads of a process have run."""
    tasks = Path(f"/proc/{process}/task").glob("*/schedstat")
    return sum(int(task.read_text(encoding="ascii").split()[0]) for task in tasks)


def _kernel_nanoseconds(pattern: str) -> int:
    """The same of the kernel's threads of such names."""
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "comm").read_text(encoding="utf-8").strip()
            if re.search(pattern, name) and not (folder / "cmdline").read_bytes():
                found += _thread_nanoseconds(int(folder.name))
        except OSError:
            continue
    return found


def _dom0_seconds() -> float:
    """The processor time of dom0 as Xen counts it, hypercalls and interrupts included."""
    return float(run("xl", "list", "0").splitlines()[-1].split()[-1])


def _microseconds(guest: Guest, device: str, spent: Callable[[], int]) -> dict[int, tuple[float, float]]:
    """For each request size: the processor time of the backend's threads, and of all dom0, for one request."""
    found: dict[int, tuple[float, float]] = {}
    for size, requests in REQUESTS.items():
        guest.run(f"disk-load read {device} {DEPTH} 200 {size}")
        threads, dom0 = spent(), _dom0_seconds()
        assert "LOAD-OK" in guest.run(f"disk-load read {device} {DEPTH} {requests} {size}", limit=120)
        dom0_end, threads_end = _dom0_seconds(), spent()
        found[size] = (threads_end - threads) / 1e3 / requests, (dom0_end - dom0) * 1e6 / requests
    return found


@scenario(300)
def beside_blkback(dom0: Dom0) -> str:
    image = new_raw("time.img", DISK_MEBIBYTES)
    image.write_bytes(bytes(range(256)) * (DISK_MEBIBYTES << 12))
    costs: dict[str, dict[int, tuple[float, float]]] = {}
    run("modprobe", "xen-blkback")
    with dom0.guest("timed", "pv") as guest:
        for vdev, grants in (("xvdb", "copy"), ("xvdc", "map"), ("xvdd", "persistent")):
            dom0.attach_with_grants(f"tap:sync:{image}", vdev, guest.domain, grants)
            guest.wait_for_disk(vdev)
            process = dom0.disk_process(guest.domain, vdev)
            costs[f"tapfs, {grants}"] = _microseconds(
                guest, f"/dev/{vdev}", lambda pid=process: _thread_nanoseconds(pid)
            )
            dom0.detach(vdev, "timed")
        loop = run("losetup", "-f", "--show", str(image))
        try:
            run("xl", "block-attach", "timed", f"phy:{loop},xvde,w")
            guest.wait_for_disk("xvde")
            threads = rf"^{guest.domain}\.xvde|^kworker/.*loop|^loop"
            costs["blkback"] = _microseconds(guest, "/dev/xvde", lambda: _kernel_nanoseconds(threads))
            run("xl", "block-detach", "timed", "xvde")
        finally:
            run("losetup", "-d", loop)
        guest.power_off()
    run("modprobe", "-r", "xen-blkback")
    lines: list[str] = []
    for size in REQUESTS:
        base = costs["blkback"][size]
        for name, cost in costs.items():
            ratio = cost[size][1] / base[1] if base[1] else float("nan")
            lines.append(
                f"read {size >> 10:3} KiB  {name:18} {cost[size][0]:7.1f} us of its threads, "
                f"{cost[size][1]:7.1f} us of dom0 a request: {ratio:.2f} of blkback"
            )
    return "\n" + "\n".join(lines)

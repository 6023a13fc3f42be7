"""Processor time of dom0 for a request, beside the kernel's xen-blkback. Under emulation only ratios have a meaning."""

from __future__ import annotations

import ctypes
import struct

from tests.laboratory.commands import run
from tests.laboratory.scenario import scenario
from tests.xen.scenarios.contents import new_raw
from tests.xen.scenarios.dom0 import Dom0
from tests.xen.scenarios.guest import Guest

DISK_MEBIBYTES = 64
REQUESTS = {4096: 1600, 131072: 320}
DEPTH = 8
# The least of several: what else runs on the host only ever adds to it.
ROUNDS = 3


class _Hypervisor:
    """libxenctrl of Xen 4.17, as far as it tells the processor time of dom0, hypercalls and interrupts included."""

    # Of xc_dominfo_t (xenctrl.h): four 32-bit fields and five longs come before cpu_time.
    _CPU_TIME = 56

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libxenctrl.so.4.17")
        self._library.xc_interface_open.restype = ctypes.c_void_p
        self._handle = ctypes.c_void_p(self._library.xc_interface_open(None, None, 0))

    def dom0_nanoseconds(self) -> int:
        information = ctypes.create_string_buffer(4096)
        assert self._library.xc_domain_getinfo(self._handle, 0, 1, information) == 1
        return int(struct.unpack_from("=Q", information, self._CPU_TIME)[0])


def _microseconds(hypervisor: _Hypervisor, guest: Guest, vdev: str, size: int) -> float:
    """The processor time of dom0 for one request."""
    before = hypervisor.dom0_nanoseconds()
    assert "LOAD-OK" in guest.run(f"disk-load read /dev/{vdev} {DEPTH} {REQUESTS[size]} {size}", limit=120)
    return (hypervisor.dom0_nanoseconds() - before) / 1e3 / REQUESTS[size]


@scenario(300)
def beside_blkback(dom0: Dom0) -> str:
    image = new_raw("time.img", DISK_MEBIBYTES)
    image.write_bytes(bytes(range(256)) * (DISK_MEBIBYTES << 12))
    hypervisor = _Hypervisor()
    loop = run("losetup", "-r", "-f", "--show", str(image))
    backends = {"xvdb": "tapfs, copy", "xvdc": "tapfs, map", "xvdd": "tapfs, persistent", "xvde": "blkback"}
    costs: dict[tuple[int, str], list[float]] = {}
    try:
        with dom0.guest("timed", "pv") as guest:
            for vdev, grants in (("xvdb", "copy"), ("xvdc", "map"), ("xvdd", "persistent")):
                dom0.attach_with_grants(f"tap:sync:{image}", vdev, guest.domain, grants, mode="r")
            run("xl", "block-attach", "timed", f"phy:{loop},xvde,r")
            for vdev in backends:
                guest.wait_for_disk(vdev)
            for _ in range(ROUNDS):
                for size in REQUESTS:
                    for vdev in backends:
                        cost = _microseconds(hypervisor, guest, vdev, size)
                        costs.setdefault((size, vdev), []).append(cost)
            guest.power_off()
    finally:
        run("losetup", "-d", loop)
    lines: list[str] = []
    for size in REQUESTS:
        base = min(costs[size, "xvde"])
        for vdev, name in backends.items():
            cost = min(costs[size, vdev])
            lines.append(
                f"read {size >> 10:3} KiB  {name:18} {cost:7.1f} us of dom0 a request: {cost / base:.2f} of blkback"
            )
    return "\n" + "\n".join(lines)

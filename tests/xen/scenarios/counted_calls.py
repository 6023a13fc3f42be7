"""System calls and hypercalls of dom0 for a request, of each backend: what the ratios of `processor_time` are made of.

The guest is PVH, so that all hypercalls of PV domains that xentrace sees are those of dom0.
"""

from __future__ import annotations

import signal
import struct
import subprocess
import time
from collections import Counter
from pathlib import Path

from tests.laboratory.commands import run
from tests.laboratory.scenario import scenario
from tests.xen.scenarios.contents import new_raw
from tests.xen.scenarios.dom0 import Dom0
from tests.xen.scenarios.guest import Guest

DISK_MEBIBYTES = 64
REQUESTS = {4096: 1600, 131072: 320}
DEPTH = 8
GRANTS = (("xvdb", "copy"), ("xvdd", "persistent"))

_TRACING = Path("/sys/kernel/tracing")
_SYSTEM_CALLS = _TRACING / "events/raw_syscalls/sys_enter/trigger"
_HISTOGRAM = "hist:keys=common_pid.execname,id.syscall:size=4096"

#: xentrace's class of events of PV domains, and in it that of hypercalls, as Xen numbers them.
_TRACE_PV, _TRACE_HYPERCALL = 0x0020F000, 0x0020100D
#: By the numbers that Xen gives them.
_HYPERCALLS = {
    1: "mmu_update",
    3: "stack_switch",
    5: "fpu_taskswitch",
    13: "multicall",
    14: "update_va_mapping",
    15: "set_timer_op",
    20: "grant_table_op",
    23: "iret",
    24: "vcpu_op",
    25: "set_segment_base",
    26: "mmuext_op",
    29: "sched_op",
    32: "event_channel_op",
}


def _hypercalls(trace: bytes) -> Counter[str]:
    """The hypercalls in what xentrace has written: headers, with a time stamp or not, and up to seven words."""
    found: Counter[str] = Counter()
    at = 0
    while at + 4 <= len(trace):
        (header,) = struct.unpack_from("<I", trace, at)
        words, timed = header >> 28 & 7, header >> 31
        first = at + 4 + 8 * timed
        if header & 0x0FFFFFFF == _TRACE_HYPERCALL and words:
            (number,) = struct.unpack_from("<I", trace, first)
            found[_HYPERCALLS.get(number & 0xFFFFF, str(number & 0xFFFFF))] += 1
        at = first + 4 * words
    return found


def _system_calls() -> Counter[str]:
    """What the kernel has counted, by program and call."""
    found: Counter[str] = Counter()
    for line in (_SYSTEM_CALLS.parent / "hist").read_text().splitlines():
        if line.startswith("{"):
            keys, _, count = line.partition("} hitcount:")
            program = keys.split("common_pid:")[1].split("[")[0].strip()
            call = keys.split("id:")[-1].split("[")[0].strip()
            found[f"{program} {call}"] += int(count)
    return found


def _count(guest: Guest, vdev: str, size: int) -> tuple[Counter[str], Counter[str]]:
    trace = Path("/tmp/trace")  # noqa: S108 - dom0 has one user
    load = f"disk-load read /dev/{vdev} {DEPTH} {REQUESTS[size]} {size}"
    guest.run(load, limit=120)
    trace.unlink(missing_ok=True)
    tracer = subprocess.Popen(["xentrace", "-e", hex(_TRACE_PV), "-S", "256", "-s", "100", str(trace)])
    time.sleep(2)
    _SYSTEM_CALLS.write_text(_HISTOGRAM)
    try:
        assert "LOAD-OK" in guest.run(load, limit=120)
        calls = _system_calls()
    finally:
        _SYSTEM_CALLS.write_text(f"!{_HISTOGRAM}")
        tracer.send_signal(signal.SIGTERM)
        tracer.wait()
    return calls, _hypercalls(trace.read_bytes())


def _shown(counted: Counter[str], requests: int) -> str:
    often = [(name, count) for name, count in counted.most_common(12) if count * 50 > requests]
    return ", ".join(f"{name} {count / requests:.2f}" for name, count in often)


@scenario(300)
def of_each_backend(dom0: Dom0) -> str:
    run("mount", "-t", "tracefs", "tracefs", str(_TRACING), statuses=(0, 32))
    image = new_raw("counted.img", DISK_MEBIBYTES)
    image.write_bytes(bytes(range(256)) * (DISK_MEBIBYTES << 12))
    loop = run("losetup", "-r", "-f", "--show", str(image))
    lines: list[str] = []
    try:
        with dom0.guest("counted", "pvh") as guest:
            for vdev, grants in GRANTS:
                dom0.attach_with_grants(f"tap:sync:{image}", vdev, guest.domain, grants, mode="r")
            run("xl", "block-attach", "counted", f"phy:{loop},xvde,r")
            for vdev in (*dict(GRANTS), "xvde"):
                guest.wait_for_disk(vdev)
            for size, requests in REQUESTS.items():
                for vdev, name in (*GRANTS, ("xvde", "blkback")):
                    calls, hypercalls = _count(guest, vdev, size)
                    lines.append(f"{size >> 10} KiB {name}: system calls: {_shown(calls, requests)}")
                    lines.append(f"    hypercalls {hypercalls.total() / requests:.2f}: {_shown(hypercalls, requests)}")
            guest.power_off()
    finally:
        run("losetup", "-d", loop)
    return "\n" + "\n".join(lines)

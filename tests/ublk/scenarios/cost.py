"""Processor time of a block device's requests beside the loop device's. Under emulation only ratios have a meaning."""

from __future__ import annotations

from pathlib import Path

from tests.laboratory.commands import run, tapfs
from tests.ublk.scenarios.block_devices import IMAGES, BlockDevices

_MEBIBYTES, _WORKERS = 32, 8
#: Requests of a size. A tick is 10 ms: a round takes hundreds of them.
_REQUESTS = {4096: 8000, 131072: 1200}
# The least of several: what else runs on the host only ever adds to it.
_ROUNDS = 3
_TICKS_A_SECOND = 100


def _busy_microseconds() -> float:
    """What all processors have done since the start, but for waiting."""
    user, nice, system, _idle, _waiting, interrupts, soft, *_ = map(
        int, Path("/proc/stat").read_text(encoding="ascii").split("\n")[0].split()[1:]
    )
    return (user + nice + system + interrupts + soft) * 1e6 / _TICKS_A_SECOND


def _cost(device: str, size: int) -> float:
    """Processor time of the whole machine for a random read, the reader's included."""
    before = _busy_microseconds()
    run("disk-load", "read", device, str(_WORKERS), str(_REQUESTS[size]), str(size))
    return (_busy_microseconds() - before) / _REQUESTS[size]


def cost_beside_loop(host: BlockDevices) -> str:
    """Random reads of a cached image, by a loop device and as raw and qcow2 by block devices of tapfs."""
    raw, mapped = IMAGES / "cost.raw", IMAGES / "cost.qcow2"
    raw.write_bytes(bytes(range(256)) * (_MEBIBYTES << 12))
    mapped.unlink(missing_ok=True)
    tapfs("convert", "-f", "raw", str(raw), "-O", "qcow2", str(mapped))
    loop = run("losetup", "-r", "-f", "--show", str(raw))
    devices = {"loop": loop}
    devices["tapfs, raw"] = host.attach(str(raw), "-f", "raw", "--mode", "r")
    devices["tapfs, qcow2"] = host.attach(str(mapped), "--mode", "r")
    costs: dict[tuple[int, str], list[float]] = {}
    for _ in range(_ROUNDS):
        for size in _REQUESTS:
            for name, device in devices.items():
                costs.setdefault((size, name), []).append(_cost(device, size))
    run("losetup", "-d", loop)
    host.detach(devices["tapfs, raw"])
    host.detach(devices["tapfs, qcow2"])
    lines: list[str] = []
    for (size, name), found in costs.items():
        of_loop = min(found) / min(costs[size, "loop"])
        lines.append(f"read {size >> 10:3} KiB  {name:12} {min(found):7.1f} us a request: {of_loop:.2f} of loop")
    return "\n" + "\n".join(lines)

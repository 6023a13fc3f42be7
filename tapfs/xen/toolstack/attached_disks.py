"""The disks that are attached to the guests of this host, and their counters."""

from __future__ import annotations

import trio

from tapfs.errors import ImageError
from tapfs.records import dataclass
from tapfs.xen.device import DOMAINS, Device, State, our_devices, parse_state
from tapfs.xen.process_handle import adopt
from tapfs.xen.toolstack.control_client import ask
from tapfs.xen.xenstore.client import XenStore

#: For how long the process of a disk may take to answer; one that is stopped must not keep the others from being seen.
_ANSWER_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class AttachedDisk:
    """One disk. `status` is "starting", "ready" or "failed" (None: nobody has taken it yet), `error` why it failed.

    `waiting` is what keeps it from answering the guest, who waits: the host is full, as a rule.
    `spec` is what is served now. `statistics` counts since its process was started; None if that did not answer.
    """

    domain: int
    domain_name: str | None
    vdev: str
    spec: str
    mode: str
    state: str
    status: str | None
    error: str | None
    paused: bool
    waiting: str | None
    pid: int | None
    statistics: dict[str, int] | None
    #: As of a mount ("on", "off", what is missing); None: no process has opened the image.
    sandbox: str | None

    @property
    def place(self) -> tuple[str, str]:
        """The domain and the device there, as a table shows them."""
        return str(self.domain), self.vdev

    @property
    def summary(self) -> str:
        """How it is: "failed", "paused", "waiting: …", "used" by the guest, "ready" for it, "stopped" (no process)."""
        if self.status != "ready":
            return self.status or "unclaimed"
        if self.pid is None:
            return "stopped"
        if self.paused:
            return "paused"
        if self.waiting is not None:
            return f"waiting: {self.waiting}"
        return "used" if self.state == State.CONNECTED.name.lower() else self.status


async def attached_disks(store: XenStore, chosen: Device | None = None) -> list[AttachedDisk]:
    """All attached disks, or the one, by domain and number."""
    devices = sorted(await our_devices(store), key=lambda device: (device.domain, device.number))
    found: dict[Device, AttachedDisk] = {}

    async def look_at(device: Device) -> None:
        disk = await _attached_disk(store, device)
        if disk is not None:
            found[device] = disk

    async with trio.open_nursery() as nursery:
        for device in devices:
            if chosen in (None, device):
                nursery.start_soon(look_at, device)
    return [found[device] for device in devices if device in found]


async def _attached_disk(store: XenStore, device: Device) -> AttachedDisk | None:
    """What xenstore and the disk's process say of it; None if it is just gone."""

    async def read(name: str) -> str | None:
        return await store.read(f"{device.backend}/{name}")

    state = await read("state")
    if state is None:
        return None
    process = adopt(await read("tapfs/process"))
    if process is not None:
        process.close()
    return AttachedDisk(
        domain=device.domain,
        domain_name=await store.read_if_shown(f"{DOMAINS}/{device.domain}/name"),
        vdev=device.name,
        spec=await read("tapfs/spec") or await read("params") or "",
        mode=await read("mode") or "",
        state=parse_state(state).name.lower(),
        status=await read("tapfs/status"),
        error=await read("tapfs/error"),
        paused=await read("tapfs/paused") == "1",
        waiting=await read("tapfs/waiting"),
        pid=None if process is None else process.pid,
        statistics=None if process is None else await _statistics(device),
        sandbox=await read("tapfs/sandbox"),
    )


async def _statistics(device: Device) -> dict[str, int] | None:
    with trio.move_on_after(_ANSWER_SECONDS):
        try:
            answer = await ask(device, "statistics")
        except ImageError:
            return None
        return {name: value for name, value in answer.items() if isinstance(value, int) and not isinstance(value, bool)}
    return None

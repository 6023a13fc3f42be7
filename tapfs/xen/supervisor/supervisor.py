"""The supervisor of all disks of a host: watches xenstore, and has a process serve each device of ours.

The supervisor has no state of its own, because xenstore has all facts about a device. So a supervisor that is killed
takes nothing with it, and the next supervisor finds the processes at work.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import trio

from tapfs.errors import ImageError
from tapfs.serving.log import log
from tapfs.serving.nursery_errors import error_of
from tapfs.serving.processes import EXIT_DONE, EXIT_STOPPED
from tapfs.serving.service_manager import notify
from tapfs.xen.device import LIBXL_KINDS, OUR_KIND, Device, backends_of, device_at, is_ours, our_devices
from tapfs.xen.host import Host
from tapfs.xen.kernel_backend import load_kernel_backend
from tapfs.xen.process_handle import RunningDisk
from tapfs.xen.runtime_files import keys_of_runtime_files, remove_runtime_files, remove_xentop_folder
from tapfs.xen.supervisor.device_model_door import attend_door
from tapfs.xen.supervisor.disk_starter import DiskStarter
from tapfs.xen.supervisor.driver_domains import show_guests_to_driver_domains
from tapfs.xen.supervisor.page_merging import merge_equal_pages
from tapfs.xen.supervisor.supervised_device import SupervisedDevice
from tapfs.xen.xenstore.client import XenStore, connect

#: Fires when a domain has ended.
_RELEASED = "@releaseDomain"

#: Between lines that say whom we still wait for at the end.
_PATIENCE_SECONDS = 10

#: Before a device is attended to again for which xenstored has refused something: a quota of a driver domain, say.
_REFUSED_SECONDS = 2

_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def supervise(host: Host, directory: Path) -> None:
    """Serve until SIGTERM or SIGINT, then have every disk process end in good order; SIGHUP does nothing.

    The caller holds the supervisor's lock. Raises ImageError when xenstored is gone; the disks go on then.
    """
    try:
        trio.run(_Supervisor(host, directory).run)
    except BaseExceptionGroup as group:
        raise error_of(group) from group


class _Supervisor:
    def __init__(self, host: Host, directory: Path) -> None:
        self._host = host
        self._directory = directory
        self._devices: dict[Device, SupervisedDevice] = {}
        self._starter = DiskStarter()
        self._keepers: list[subprocess.Popen[bytes]] = []

    async def run(self) -> None:
        self._starter.prepare()
        with closing(self._starter), trio.open_signal_receiver(*_ENDING_SIGNALS, signal.SIGHUP) as signals:
            async with connect(self._host) as store, trio.open_nursery() as nursery:
                nursery.start_soon(self._follow, store, nursery)
                log.info("ending on %s", (await _ending_signal(signals)).name)
                nursery.cancel_scope.cancel()
            await self._stop_all(signals)

    async def _follow(self, store: XenStore, nursery: trio.Nursery) -> None:
        """Attend to the devices that there are and that come."""
        own = await store.own_domain()
        if self._host.machine is None:
            await load_kernel_backend(store)
            merge_equal_pages()
        if own == 0:
            nursery.start_soon(show_guests_to_driver_domains, store)
        kinds = [f"{backends_of(own)}/{kind}" for kind in (OUR_KIND, *LIBXL_KINDS)]
        async with store.watch(*kinds, _RELEASED) as paths:
            await self._look_at_all(store, nursery)
            self._remove_stale_files()
            log.info("ready")
            notify("READY=1")
            async for path in paths:
                device = device_at(path, own)
                if device is None:
                    await self._look_at_all(store, nursery)
                elif device in self._devices:
                    self._devices[device].news()
                elif await is_ours(store, device):
                    self._attend(device, store, nursery)

    async def _look_at_all(self, store: XenStore, nursery: trio.Nursery) -> None:
        for device in await our_devices(store):
            if device not in self._devices:
                self._attend(device, store, nursery)
        for supervised in self._devices.values():
            supervised.news()

    def _attend(self, device: Device, store: XenStore, nursery: trio.Nursery) -> None:
        machine = self._host.machine
        supervised = SupervisedDevice(device, store, self._directory, machine=machine, starter=self._starter)
        self._devices[device] = supervised
        nursery.start_soon(self._supervise, supervised, store)

    async def _supervise(self, supervised: SupervisedDevice, store: XenStore) -> None:
        device = supervised.device
        async with trio.open_nursery() as beside:
            beside.start_soon(attend_door, device, self._directory, self._keepers)
            await _run_patiently(supervised, store)
            beside.cancel_scope.cancel()
        # A keeper ends when it sees that its device is gone, so this one's is reaped with the next.
        self._keepers = [keeper for keeper in self._keepers if keeper.poll() is None]
        # No checkpoint since it saw that the device is gone: who comes back from here on is new to us.
        del self._devices[supervised.device]

    def _remove_stale_files(self) -> None:
        """Remove what a crash or a restart of the host left of devices that are gone."""
        known = {device.key for device in self._devices}
        for key in keys_of_runtime_files(self._directory) - known:
            remove_runtime_files(self._directory, key)

    async def _stop_all(self, signals: AsyncIterator[int]) -> None:
        """Have all disk processes end: what guests have been told is written is, and they wait for our successor."""
        notify("STOPPING=1")
        waiting = {
            each.device: each.process for each in self._devices.values() if each.process is not None and not each.shared
        }
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_say_whom_we_wait_for, waiting)
            nursery.start_soon(_leave_when_asked_again, signals, waiting, nursery.cancel_scope)
            async with trio.open_nursery() as ends:
                for device in list(waiting):
                    ends.start_soon(_see_off, device, waiting, self._host.machine)
            nursery.cancel_scope.cancel()
        log.info("ended")


async def _run_patiently(supervised: SupervisedDevice, store: XenStore) -> None:
    """Attend to a device until it is gone. What xenstored refuses for one device leaves the others as they are."""
    said = ""
    while True:
        try:
            await supervised.run()
        except (ImageError, BaseExceptionGroup) as raised:
            error = error_of(raised) if isinstance(raised, BaseExceptionGroup) else raised
            if store.lost or not isinstance(error, ImageError):
                raise
            if str(error) != said:
                said = str(error)
                log.error(
                    "%s: xenstored refuses what its disk needs, which is tried again: %s", supervised.device, error
                )
        else:
            return
        await trio.sleep(_REFUSED_SECONDS)


async def _see_off(device: Device, waiting: dict[Device, RunningDisk], machine: str | None) -> None:
    """Ask one process to end, and take it out of `waiting` when it has."""
    process = waiting[device]
    process.send(signal.SIGTERM)
    code = await process.ended()
    process.close()
    remove_xentop_folder(device, process.pid, machine)
    del waiting[device]
    # By SIGTERM itself: it had not even begun to listen for it.
    if code in (None, EXIT_DONE, EXIT_STOPPED, -signal.SIGTERM):
        log.info("%s: stopped; its guest waits for the next supervisor", device)
    else:
        log.error("%s: its process ended with code %d while it was to stop; the next one makes up for it", device, code)


async def _say_whom_we_wait_for(waiting: dict[Device, RunningDisk]) -> None:
    while True:
        await trio.sleep(_PATIENCE_SECONDS)
        whom = ", ".join(f"{device} (process {process.pid})" for device, process in waiting.items())
        log.warning("still waiting for %s; a second signal ends the waiting", whom)


async def _leave_when_asked_again(
    signals: AsyncIterator[int], waiting: dict[Device, RunningDisk], scope: trio.CancelScope
) -> None:
    await _ending_signal(signals)
    for device, process in waiting.items():
        log.warning("%s: process %d is left to end by itself", device, process.pid)
    scope.cancel()


async def _ending_signal(signals: AsyncIterator[int]) -> signal.Signals:
    """The next signal that asks us to end."""
    async for number in signals:
        if number in _ENDING_SIGNALS:
            return signal.Signals(number)
        log.debug("%s ignored", signal.Signals(number).name)
    raise AssertionError  # the receiver never ends

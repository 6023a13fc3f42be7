"""dom0 as scenarios see it: the daemon, attaching and detaching by both tools, and what they must not leave."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from tapfs.xen.device import OUR_KIND, Device
from tapfs.xen.host import find_host
from tapfs.xen.supervisor.install import CAPABILITIES
from tapfs.xen.supervisor.page_merging import VARIABLE
from tapfs.xen.toolstack.attach import attach_and_wait
from tapfs.xen.xenstore.client import connect
from tests.laboratory.commands import PATIENCE, attempt, attempt_tapfs, run, say, tapfs, wait_until
from tests.xen.scenarios.guest import Guest

IMAGES = Path("/images")
LOG = Path("/share/blktapctrl.log")


class Dom0:
    """The control domain."""

    def __init__(self) -> None:
        self._daemon: subprocess.Popen[bytes] | None = None
        self._guests: list[Guest] = []
        #: Guests that the scenarios of a group share, by their names.
        self._shared: dict[str, Guest] = {}
        IMAGES.mkdir(exist_ok=True)
        run("modprobe", "xen-blkfront")
        run("tapfs", "blktapctrl", "--install")

    # The daemon

    def start_daemon(self) -> None:
        """Start it with the rights that its unit leaves to it."""
        kept = ",".join(["-all", *(f"+{name.lower()}" for name in CAPABILITIES)])
        command = ["setpriv", "--no-new-privs", "--bounding-set", kept, "tapfs", "blktapctrl"]
        # The kernel's thread that looks for equal pages would take its part of an emulated processor.
        environment = os.environ | {VARIABLE: "0"}
        with LOG.open("ab") as log:
            self._daemon = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def stop_daemon(self, how: signal.Signals = signal.SIGTERM, limit: float = 60) -> int:
        """Send the daemon a signal and wait for its end; its status."""
        assert self._daemon is not None
        self._daemon.send_signal(how)
        status = self._daemon.wait(limit * PATIENCE)
        say(f"blktapctrl ended with status {status}")
        self._daemon = None
        return status

    def disk_process(self, domain: int, vdev: str) -> int:
        """The process that serves a disk."""
        entry = read_store(f"{self.backend(domain, vdev)}/tapfs/process")
        assert entry, f"domain {domain} {vdev} has no process"
        return int(entry.split(":")[0])

    # Disks

    def attach(self, specification: str, vdev: str = "xvda", domain: str = "0", mode: str = "w") -> str:
        """`tapfs attach`; the block device that dom0 has then."""
        tapfs("attach", specification, "--domain", domain, "--vdev", vdev, "--mode", mode)
        return self._device(vdev) if domain == "0" else ""

    def attach_with_grants(self, specification: str, vdev: str, domain: int, grants: str, mode: str = "w") -> None:
        """Attach a disk whose data comes by "copy", "map" or "persistent" grants: no command chooses that."""

        async def work() -> None:
            async with connect(find_host()) as store:
                device = Device(OUR_KIND, domain, vdev_number(vdev))
                await attach_and_wait(store, device, params=specification, mode=mode, options={"grants": grants})

        trio.run(work)

    def detach(self, vdev: str = "xvda", domain: str = "0") -> None:
        tapfs("detach", "--domain", domain, "--vdev", vdev)
        if domain == "0":
            wait_until(f"/dev/{vdev} to go", lambda: not os.path.exists(f"/dev/{vdev}"))

    def xl_attach(self, target: str, vdev: str = "xvda", domain: str = "0", access: str = "rw") -> str:
        """`xl block-attach`; the block device that dom0 has then."""
        run("xl", "block-attach", domain, xl_disk(target, vdev, access))
        return self._device(vdev) if domain == "0" else ""

    def xl_detach(self, vdev: str = "xvda", domain: str = "0") -> None:
        run("xl", "block-detach", domain, vdev)
        if domain == "0":
            wait_until(f"/dev/{vdev} to go", lambda: not os.path.exists(f"/dev/{vdev}"))

    def _device(self, vdev: str) -> str:
        path = f"/dev/{vdev}"
        sectors = Path(f"/sys/block/{vdev}/size")
        wait_until(path, lambda: os.path.exists(path) and sectors.exists() and int(sectors.read_text()) > 0)
        return path

    def backend(self, domain: int, vdev: str) -> str:
        """The xenstore directory of a disk's backend."""
        for kind in ("tap", "vbd"):
            for number in list_store(f"/local/domain/0/backend/{kind}/{domain}"):
                path = f"/local/domain/0/backend/{kind}/{domain}/{number}"
                if number == str(vdev_number(vdev)):
                    return path
        raise AssertionError(f"domain {domain} has no disk {vdev}")

    # Guests

    @contextmanager
    def guest(
        self, name: str, kind: str = "pv", disks: tuple[str, ...] = (), arguments: str = "", **more: Any
    ) -> Iterator[Guest]:
        """A running guest with `disks`, each as `xl_disk` writes them; destroyed at the end if it still runs."""
        guest = Guest(name, kind, disks, arguments, **more)
        self._guests.append(guest)
        try:
            guest.create()
            yield guest
        finally:
            guest.destroy()
            self._guests.remove(guest)

    @contextmanager
    def shared_guest(
        self, name: str, disks: Mapping[str, str], kind: str = "pv", arguments: str = ""
    ) -> Iterator[Guest]:
        """A running guest that has a disk for each `vdev` of `disks`, whose value is the target.

        Whoever asks first boots it with them; it goes on running without a disk, and to others they are attached.
        """
        guest = self._shared.get(name)
        if guest is None:
            guest = Guest(name, kind, tuple(xl_disk(target, vdev) for vdev, target in disks.items()), arguments)
            self._shared[name] = guest
            guest.create()
        else:
            for vdev, target in disks.items():
                self.xl_attach(target, vdev, name)
        for vdev in disks:
            guest.wait_for_disk(vdev)
        yield guest
        if guest.runs():
            for vdev in disks:
                self.xl_detach(vdev, name)
        else:
            self._forget(name)

    def _forget(self, name: str) -> None:
        self._shared.pop(name).destroy()

    # Between the scenarios

    def leftovers(self) -> list[str]:
        """What a scenario has left behind that it should not."""
        end = time.monotonic() + 10 * PATIENCE
        stay = {"0", *(str(guest.domain) for guest in self._shared.values())}
        while True:
            left = [
                f"{parent}/{kind}/{domain}/{number}"
                for parent, kind in (("/local/domain/0/backend", "tap"), ("/local/domain/0/backend", "vbd"))
                for domain in list_store(f"{parent}/{kind}")
                for number in list_store(f"{parent}/{kind}/{domain}")
            ]
            left += [f"/local/domain/0/device/vbd/{number}" for number in list_store("/local/domain/0/device/vbd")]
            left += [f"domain {domain}" for domain in list_store("/local/domain") if domain not in stay]
            left += [f"process {process}" for process in disk_processes()]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.2)

    def start(self) -> None:
        """Begin with the daemon. On a busy machine it takes longer to load than libxl waits for it."""
        self.start_daemon()
        wait_until("the daemon", lambda: "tapfs: ready\n" in LOG.read_text())

    def stop(self) -> None:
        """End with it."""
        for name in [*self._shared]:
            self._forget(name)
        self.stop_daemon()

    def clean(self) -> None:
        """After a scenario that failed: begin afresh as far as that is possible."""
        for name in [*self._shared]:
            self._forget(name)
        for domain in list_store("/local/domain"):
            if domain != "0":
                attempt("xl", "destroy", domain)
        for kind in ("tap", "vbd"):
            for number in list_store(f"/local/domain/0/backend/{kind}/0"):
                attempt_tapfs("detach", "--domain", "0", "--vdev", number)
        if self._daemon is not None:
            self.stop_daemon(signal.SIGKILL)
        for process in disk_processes():
            os.kill(process, signal.SIGKILL)
        for path in ("/local/domain/0/backend/tap", "/local/domain/0/backend/vbd", "/local/domain/0/device/vbd"):
            attempt("xenstore-rm", path)
        self.start_daemon()


def xl_disk(target: str, vdev: str, access: str = "rw", *, backend: str = "") -> str:
    """A disk as xl's configuration writes it; `target` must be last. `backend` names a driver domain."""
    there = f"backend={backend}," if backend else ""
    return f"vdev={vdev},access={access},{there}script=block-tapfs,target={target}"


def vdev_number(vdev: str) -> int:
    """The number of the whole disks xvda to xvdp."""
    return (202 << 8) + (ord(vdev[3]) - ord("a")) * 16


def list_store(path: str) -> list[str]:
    answer = subprocess.run(["xenstore-list", path], capture_output=True, text=True, timeout=20 * PATIENCE, check=False)
    return answer.stdout.split() if answer.returncode == 0 else []


def read_store(path: str) -> str | None:
    answer = subprocess.run(["xenstore-read", path], capture_output=True, text=True, timeout=20 * PATIENCE, check=False)
    return answer.stdout.rstrip("\n") if answer.returncode == 0 else None


def disk_processes() -> list[int]:
    """The processes of tapfs that serve a disk."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"tapfs.xen.disk.process" in command:
            found.append(int(folder.name))
    return found

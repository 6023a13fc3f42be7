"""A driver domain: a guest that has dom0's programs and its tapfs, and serves disks to other guests."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from tests.laboratory.commands import attempt_tapfs, say, tapfs
from tests.laboratory.scenario import scenario
from tests.xen.scenarios.dom0 import Dom0, xl_disk
from tests.xen.scenarios.guest import Guest
from tests.xen.scenarios.guests import use

#: dom0's file system as it was built, the payload, and where the driver domain has them.
_BUILT, _PAYLOAD = "/dev/vdc", "/dev/vdb"
_ROOT = "/dom0"

#: What dom0's init does, as far as a driver domain needs it. The root file system is only read.
_PREPARE = (
    f"mkdir {_ROOT} && mount -o ro,noload /dev/xvda {_ROOT} && mount -o ro /dev/xvdb {_ROOT}/payload",
    f"for place in dev proc sys; do mount -o bind /$place {_ROOT}/$place; done",
    f"for place in run tmp var/log/xen etc/xen/scripts; do mount -t tmpfs tmpfs {_ROOT}/$place; done",
    f"ln -s /payload/bin/block-tapfs {_ROOT}/etc/xen/scripts/ && mkdir {_ROOT}/run/xen",
)
_PATH = "PATH=/payload/bin:/usr/sbin:/usr/bin:/usr/lib/xen-4.17/bin PYTHONPATH=/payload/site-packages HOME=/tmp"

# Without pgrep. The shell itself has other words in its command line.
_KILL_DISKS_OF_ATTACH = (
    "for each in /proc/[0-9]*; do case $(tr '\\0' ' ' <$each/cmdline) in "
    '*disk.process" "tap*) kill -9 ${each#/proc/};; esac; done'
)


class StorageDomain:
    """A driver domain that serves disks; `guest` is its console."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest

    def run_inside(self, command: str, limit: float = 90) -> str:
        """Run a shell command with dom0's programs; what it printed."""
        return self.guest.run(f"{_PATH} chroot {_ROOT} /bin/sh -c {shlex.quote(command)}", limit)

    def start(self) -> None:
        """Start what a driver domain runs: the supervisor, and xl's daemon, which runs block scripts there."""
        for line in _PREPARE:
            self.guest.run(line)
        self.run_inside("modprobe -a xen-evtchn xen-gntdev xen-privcmd xenfs && mount -t xenfs xenfs /proc/xen")
        # Whoever starts them is the shell on the console, which must not wait for them.
        self.run_inside("(tapfs blktapctrl >/run/blktapctrl.log 2>&1 &); (xl devd -F >/run/devd.log 2>&1 &)")
        self.run_inside("n=0; until grep -q ready /run/blktapctrl.log || [ $n = 300 ]; do sleep 0.2; n=$((n+1)); done")


@contextmanager
def storage_domain(dom0: Dom0) -> Iterator[StorageDomain]:
    """A driver domain that is ready. What its two programs said is told at the end."""
    disks = (xl_disk(f"tap:sync:{_BUILT}", "xvda", "ro"), xl_disk(f"tap:sync:{_PAYLOAD}", "xvdb", "ro"))
    with dom0.guest("storage", "pv", disks, mebibytes=288, settings="driver_domain = 1") as guest:
        for vdev in ("xvda", "xvdb"):
            guest.wait_for_disk(vdev)
        domain = StorageDomain(guest)
        try:
            domain.start()
            yield domain
        finally:
            say(guest.run(f"cat {_ROOT}/run/*.log", statuses=(0, 1)))


@scenario(500)
def serves(dom0: Dom0) -> None:
    """A guest whose disks another guest serves: one by xl and its daemon there, one by `tapfs attach` here.

    Then it migrates under load: the driver domain hears of the suspend, and takes the destination for the same machine.
    """
    with storage_domain(dom0) as storage:
        storage.run_inside("tapfs create -f qcow /run/one.qcow 16M && truncate -s 16M /run/two.img")
        disk = xl_disk("tap:qcow:/run/one.qcow", "xvda", backend=storage.guest.name)
        with dom0.guest("served", "pv", (disk,)) as guest:
            guest.wait_for_disk("xvda")
            use(guest, "/dev/xvda")
            dom0_words = ("--domain", "served", "--vdev", "xvdb", "--backend-domain", storage.guest.name)
            tapfs("attach", "tap:aio:/run/two.img", *dom0_words)
            guest.wait_for_disk("xvdb")
            guest.start_load("xvdb", 2, 6)
            storage.run_inside(_KILL_DISKS_OF_ATTACH)
            guest.finish_load("xvdb")
            refused = attempt_tapfs("pause", "--domain", "served", "--vdev", "xvdb")
            assert "run the command there" in refused.stdout, refused.stdout
            tapfs("detach", "--domain", "served", "--vdev", "xvdb")
            guest.start_load("xvda", 2, 10)
            guest.migrate()
            guest.finish_load("xvda")
            guest.power_off()
        storage.run_inside("grep 'at rest' /run/blktapctrl.log")
        storage.run_inside("tapfs check /run/one.qcow")

"""A guest: the same kernel as dom0's with busybox, driven over its console."""

from __future__ import annotations

import os
import re
import subprocess
import threading
import time
import tty
from collections.abc import Callable
from pathlib import Path

from tests.laboratory.commands import PATIENCE, attempt, run, say, wait_until
from tests.laboratory.initramfs import Archive

PROGRAMS = Path("/payload/programs")
KERNEL = Path("/guest/linux")
#: What a guest's kernel is told.
ARGUMENTS = "console=hvc0 quiet panic=-1 mitigations=off"


def guest_initramfs() -> bytes:
    """The guests' initramfs, with the payload's programs."""
    archive = Archive()
    archive.folder("bin")
    for program in PROGRAMS.iterdir():
        archive.file(f"bin/{program.name}", program.read_bytes())
    return Path("/guest/initramfs").read_bytes() + archive.content()


class Guest:
    """One domain. `kind` is pv or pvh, `settings` are further lines of its configuration.

    `loader` is the line for a boot loader that finds kernel and initramfs on the first disk; without it xl has both.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        disks: tuple[str, ...],
        arguments: str,
        *,
        mebibytes: int = 128,
        processors: int = 1,
        settings: str = "",
        loader: str = "",
    ) -> None:
        self.name = name
        self._kind = kind
        self._disks = disks
        self._arguments = arguments
        self._mebibytes = mebibytes
        self._processors = processors
        self._settings = settings
        self._loader = loader
        self._console = -1
        self._terminal = ""
        self._output = bytearray()
        self._arrived = threading.Condition()
        self._commands = 0
        self._begin = 0
        self.domain = -1

    def create(self) -> None:
        """`xl create`, then wait until its shell listens."""
        configuration = Path(f"/tmp/{self.name}.cfg")  # noqa: S108 - dom0 has one user
        configuration.write_text(
            f'name = "{self.name}"\n'
            f'type = "{self._kind}"\n'
            f"{self._loader or self._kernel()}\n"
            f"memory = {self._mebibytes}\nvcpus = {self._processors}\n{self._settings}\n"
            'on_crash = "destroy"\non_reboot = "restart"\n'
            f"disk = {list(self._disks)!r}\n",
            encoding="utf-8",
        )
        run("xl", "create", "-q", str(configuration))
        self._meet()
        self._await_ready()
        say(f"{self.name} is up")

    def _kernel(self) -> str:
        """The lines by which xl loads kernel and initramfs."""
        initramfs = Path(f"/tmp/{self.name}.cpio")  # noqa: S108
        initramfs.write_bytes(guest_initramfs())
        return f'kernel = "{KERNEL}"\nramdisk = "{initramfs}"\nextra = "{ARGUMENTS} {self._arguments}"'

    def _meet(self) -> None:
        """Learn which domain it is, and listen to that one's console."""
        self.domain = int(run("xl", "domid", self.name))
        wait_until("its console", self._terminal_in_store)
        self._listen(self._terminal_in_store())

    def _terminal_in_store(self) -> str:
        """The terminal of the domain's console; empty: there is none yet."""
        command = ("xenstore-read", f"/local/domain/{self.domain}/console/tty")
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20 * PATIENCE, check=False
        ).stdout.strip()

    def _listen(self, terminal: str) -> None:
        before, self._console = self._console, os.open(terminal, os.O_RDWR | os.O_NOCTTY)
        self._terminal = terminal
        if before >= 0:
            os.close(before)
        tty.setraw(self._console)
        threading.Thread(target=self._read, args=(self._console,), daemon=True).start()

    def _await_ready(self) -> None:
        """Wait until its shell listens. While a boot loader runs in domain 0 the console is that one's."""

        def listen_anew() -> None:
            terminal = self._terminal_in_store()
            if terminal not in {"", self._terminal}:
                self._listen(terminal)

        self._wait_for(rb"GUEST-READY ([\d.]+)", 90, listen_anew)

    def _read(self, console: int) -> None:
        while True:
            try:
                data = os.read(console, 65536)
            except OSError:
                data = b""
            with self._arrived:
                self._output += data
                self._arrived.notify_all()
            if not data:
                return

    def _wait_for(self, pattern: bytes, limit: float, meanwhile: Callable[[], None] = lambda: None) -> re.Match[bytes]:
        """The next match in what the console says behind the last one. `meanwhile` is done now and then."""
        end = time.monotonic() + limit * PATIENCE
        with self._arrived:
            while not (found := re.compile(pattern).search(self._output, self._begin)):
                left = end - time.monotonic()
                if left <= 0:
                    tail = bytes(self._output[-600:]).decode(errors="replace")
                    raise AssertionError(
                        f"waited {limit * PATIENCE:g} s for {pattern!r} of {self.name}; its console says:\n{tail}"
                    )
                if not self._arrived.wait(min(left, 1)):
                    meanwhile()
            self._begin = found.end()
            return found

    def _start(self, command: str) -> int:
        self._commands += 1
        say(f"{self.name}# {command}")
        line = f"{{ {command}; }} </dev/null 2>&1; echo @@{self._commands} $?\n"
        os.write(self._console, line.encode())
        return self._commands

    def _finish(self, number: int, limit: float, statuses: tuple[int, ...]) -> str:
        begin = self._begin
        found = self._wait_for(rb"@@%d (\d+)\n" % number, limit)
        with self._arrived:
            output = bytes(self._output[begin : found.start()]).decode(errors="replace").replace("\r", "").strip()
        say(f"{self.name}> {output} [{int(found[1])}]")
        if int(found[1]) not in statuses:
            raise AssertionError(f"{self.name}: status {int(found[1])}: {output}")
        return output

    def run(self, command: str, limit: float = 60, statuses: tuple[int, ...] = (0,)) -> str:
        """Run one shell command line in the guest; what it printed."""
        return self._finish(self._start(command), limit, statuses)

    def start_load(self, vdev: str, workers: int, seconds: int) -> None:
        """Begin to write to a disk with `disk-load`, beside what else is run."""
        self.run(f"(disk-load write /dev/{vdev} {workers} {seconds} {workers + seconds} >/tmp/load-{vdev} 2>&1 &)")

    def finish_load(self, vdev: str, limit: float = 120) -> int:
        """Wait for the end of the load, which has verified all that it wrote; the number of its writes."""
        output = self.run(f"until grep -q LOAD /tmp/load-{vdev}; do sleep 0.2; done; cat /tmp/load-{vdev}", limit)
        found = re.search(r"LOAD-OK (\d+) requests", output)
        assert found, output
        assert "FAILED" not in output, output
        return int(found[1])

    def wait_for_disk(self, vdev: str, *, there: bool = True) -> None:
        test = (
            f"-b /dev/{vdev} -a $(cat /sys/class/block/{vdev}/size 2>/dev/null || echo 0) -gt 0"
            if there
            else f"! -e /dev/{vdev}"
        )
        self.run(f"n=0; until [ {test} ] || [ $n = 300 ]; do sleep 0.1; n=$((n+1)); done; [ {test} ]")

    def reboot(self) -> None:
        """Let the guest start again: xl makes another domain of the configuration that it has kept."""
        before = self.domain
        self._start("reboot -f")
        wait_until(f"another {self.name}", lambda: self._number() not in {None, before}, 60)
        self._meet()
        self._await_ready()
        say(f"{self.name} is up again")

    def save_and_restore(self) -> None:
        """Suspend it into a file and have another domain go on with it."""
        file = f"/images/{self.name}.saved"
        run("xl", "save", self.name, file, limit=120)
        run("xl", "restore", file, limit=120)
        os.unlink(file)
        self._meet()

    def migrate(self) -> None:
        """Have another domain of this host go on with it before this one is gone, in the order of `xl migrate`.

        `xl migrate` itself needs a log of dirty pages, which Xen does not keep for PV guests under emulation.
        """
        file, away = f"/images/{self.name}.saved", f"{self.name}--migratedaway"
        run("xl", "save", "-p", self.name, file, limit=120)
        run("xl", "rename", self.name, away)
        run("xl", "restore", file, limit=120)
        run("xl", "destroy", away)
        os.unlink(file)
        self._meet()

    def migrate_by_xl(self) -> None:
        """`xl migrate` to this host: the guest, not PV, writes while its memory goes."""
        run("xl", "migrate", "-s", "", self.name, "xl migrate-receive", limit=180)
        self._meet()

    def power_off(self) -> None:
        """Let the guest shut down, and wait until its domain is gone."""
        self._start("poweroff -f")
        wait_until(f"{self.name} to go", lambda: not self.runs(), 60)

    def runs(self) -> bool:
        """Whether there is a domain of its name."""
        return self._number() is not None

    def _number(self) -> int | None:
        answer = subprocess.run(["xl", "domid", self.name], capture_output=True, timeout=20 * PATIENCE, check=False)
        return int(answer.stdout) if answer.returncode == 0 else None

    def destroy(self) -> None:
        if self.runs():
            attempt("xl", "destroy", self.name)
        if self._console >= 0:
            os.close(self._console)
            self._console = -1

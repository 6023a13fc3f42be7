"""A disk of the laboratory's machine, served outside of the machine by `tapfs serve --vhost-user` of the working tree.

A scenario inside cannot reach the server. So it writes a number into `/share/kill-vhost-user`; the server is killed
(kill -9) and started again then, and the number stands in `/share/killed-vhost-user`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.laboratory.build import TREE
from tests.laboratory.errors import LabError

#: The serial number by which the machine knows the disk, and its length.
NAME, MEBIBYTES = "lab-vhost-user", 32
#: Files in the folder that the machine and its host share.
KILL, KILLED = "kill-vhost-user", "killed-vhost-user"

_LOOK_SECONDS = 0.1
_TAPFS = (sys.executable, "-m", "tapfs.cli")
#: Exit codes of `tapfs check`: sound, and leaked clusters, which a crash may leave.
_SOUND = (0, 3)


class VhostDisk:
    """The image in `work` and its server. `share` is the folder that the machine has at /share."""

    def __init__(self, work: Path, share: Path) -> None:
        self._image = work / "vhost-user.qcow2"
        self._log = work / "vhost-user.log"
        # The path of a socket is short.
        self._runtime = Path(f"/tmp/tapfs-lab-{os.getpid()}-{threading.get_ident()}")  # noqa: S108
        self.socket = self._runtime / "disk"
        self._share = share
        self._server: subprocess.Popen[str] | None = None
        self._ending = threading.Event()
        self._watching = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._runtime.mkdir(mode=0o700)
        self._tapfs("create", "-f", "qcow2", str(self._image), f"{MEBIBYTES}M")
        self._start()
        self._watching.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._watching.join()
        if self._server is not None:
            self._server.terminate()
            self._server.wait()
        subprocess.run(["rm", "-rf", str(self._runtime)], check=False)

    def options(self, mebibytes: int) -> list[str]:
        """What QEMU is told of the disk, and of the machine's memory, which it shares."""
        # fmt: off
        return [
            "-object", f"memory-backend-memfd,id=memory,size={mebibytes}M", "-machine", "memory-backend=memory",
            "-chardev", f"socket,id=vhost,path={self.socket},reconnect=1",
            "-device", "vhost-user-blk-pci,chardev=vhost,num-queues=2",
        ]
        # fmt: on

    def problem(self) -> str | None:
        """What is wrong with the image, once the machine is off and the server has ended."""
        checked = self._run("check", str(self._image))
        return None if checked.returncode in _SOUND else f"the vhost-user disk: {checked.stdout.strip()}"

    def _watch(self) -> None:
        done = ""
        while not self._ending.wait(_LOOK_SECONDS):
            wanted = self._share / KILL
            number = wanted.read_text(encoding="ascii") if wanted.is_file() else ""
            if number in ("", done) or self._server is None:
                continue
            self._server.kill()
            self._server.wait()
            self._start()
            done = number
            (self._share / KILLED).write_text(number, encoding="ascii")

    def _start(self) -> None:
        words = ["serve", str(self._image), "--rw", "--vhost-user", str(self.socket), "--name", NAME]
        with self._log.open("ab") as log:
            self._server = subprocess.Popen(
                # Whoever ends this process ends its machines, and so the server.
                [*_TAPFS, *words, "--exit-when-idle"],
                cwd=TREE,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        output = self._server.stdout
        if output is None or not output.readline():
            raise LabError(f"tapfs serve --vhost-user did not start: {self._log.read_text(encoding='utf-8')}")

    def _tapfs(self, *words: str) -> None:
        done = self._run(*words)
        if done.returncode != 0:
            raise LabError(f"tapfs {words[0]}: {done.stdout}")

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*_TAPFS, *words],
            cwd=TREE,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )

    def _environment(self) -> dict[str, str]:
        return os.environ | {"TAPFS_RUNTIME_DIR": str(self._runtime)}

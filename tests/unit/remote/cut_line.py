"""A qemu-nbd, and a line to a server that is cut."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def nbd_served(disk: Path, *words: str) -> Generator[Path]:
    """The socket of a qemu-nbd that gives the raw file `disk` as the export "disk" to one client at a time."""
    path = disk.with_name(f"{disk.name}.socket")
    command = ["qemu-nbd", *words, "-f", "raw", "-x", "disk", "-t", "-k", path, disk]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not path.exists():
            threading.Event().wait(0.005)
        try:
            yield path
        finally:
            process.terminate()


class CutLine:
    """Passes bytes on to a server, and cuts each connection after so many of the server's."""

    def __init__(self, folder: Path, server: Path, limits: Sequence[int] = ()) -> None:
        self.path = folder / "line"
        self._server, self._limits = server, list(limits)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._now: tuple[socket.socket, ...] = ()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX)
                server.connect(str(self._server))
                self._now = (client, server)
                limit = self._limits.pop(0) if self._limits else 1 << 40
                ways = [(client, server, 1 << 40), (server, client, limit)]
                threads = [threading.Thread(target=_pass, args=way, daemon=True) for way in ways]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                client.close()
                server.close()

    def cut(self) -> None:
        """Cut the connection that is there."""
        for each in self._now:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()


def _pass(source: socket.socket, target: socket.socket, limit: int) -> None:
    with suppress(OSError):
        while limit > 0 and (data := source.recv(min(limit, 1 << 16))):
            limit -= len(data)
            target.sendall(data)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)

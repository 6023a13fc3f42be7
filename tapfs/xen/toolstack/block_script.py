"""`block-tapfs`: the program that xl runs when a disk with `script=block-tapfs` comes and goes.

xl waits for the script, and shows the user its error. The script itself changes nothing. It waits for the supervisor
and the disk process, and answers in the keys that xl reads (`hotplug-status`, `hotplug-error`).
"""

from __future__ import annotations

import os
import socket
import stat
import sys
import time

from tapfs.errors import EXIT_USAGE, ErrorKind, ImageError, from_os_error, printable
from tapfs.xen.host import find_host
from tapfs.xen.process_name import is_alive, parse_process_name
from tapfs.xen.xenstore.wire import Assembler, Message, Operation, errno_of, join_strings, to_bytes, to_text

#: xl itself gives a script 40 seconds.
_READY_SECONDS = 35.0
#: For how long nobody at all may take care of a disk.
_CLAIM_SECONDS = 10.0
_GONE_SECONDS = 30.0
_PAUSE_SECONDS = 0.05

_CLOSED = "6"
#: The states of a frontend that has nothing to lose: there is none, it has not begun, it has closed.
_UNUSED = (None, "1", _CLOSED)


def main() -> int:
    """Run the script: `add` or `remove`, with the backend's directory in XENBUS_PATH. Returns the exit code."""
    words, path = sys.argv[1:], os.environ.get("XENBUS_PATH", "")
    if words not in (["add"], ["remove"]) or not path:
        _complain("is for xl: it takes 'add' or 'remove', and the backend's directory in XENBUS_PATH")
        return EXIT_USAGE
    try:
        store = _BlockingStore(find_host().xenstore)
        return _add(store, path) if words == ["add"] else _remove(store, path)
    except ImageError as error:
        _complain(str(error))
        return 1


def _add(store: _BlockingStore, path: str) -> int:
    """Wait until the disk can be served, and say so to xl, or what keeps it from being served."""
    try:
        _wait_until_ready(store, path)
    except ImageError as error:
        store.write(f"{path}/hotplug-error", str(error))
        store.write(f"{path}/hotplug-status", "error")
        raise
    store.write(f"{path}/hotplug-status", "connected")
    return 0


def _wait_until_ready(store: _BlockingStore, path: str) -> None:
    started = time.monotonic()
    while True:
        status = store.read(f"{path}/tapfs/status")
        if status == "ready":
            return
        if status == "failed":
            reason = store.read(f"{path}/tapfs/error")
            raise ImageError(ErrorKind.IO, reason or "the disk cannot be served; the log of blktapctrl says why")
        waited = time.monotonic() - started
        if status is None and waited > _CLAIM_SECONDS:
            raise ImageError(
                ErrorKind.UNSUPPORTED,
                "nobody serves the disk",
                remedy="is 'tapfs blktapctrl' running? (systemctl status tapfs-blktapctrl)",
            )
        if waited > _READY_SECONDS:
            raise ImageError(
                ErrorKind.IO,
                f"the image is still not open after {_READY_SECONDS:.0f} seconds",
                remedy="see the log of blktapctrl",
            )
        time.sleep(_PAUSE_SECONDS)


def _remove(store: _BlockingStore, path: str) -> int:
    """Wait until the disk's process has let go of the image, or is seen to be gone with nobody to start another."""
    started = time.monotonic()
    while store.read(f"{path}/state") not in (None, _CLOSED) and not _is_left_alone(store, path):
        if time.monotonic() - started > _GONE_SECONDS:
            raise ImageError(
                ErrorKind.LOCKED,
                f"the disk is still in use after {_GONE_SECONDS:.0f} seconds",
                remedy="see the log of blktapctrl",
            )
        time.sleep(_PAUSE_SECONDS)
    return 0


def _is_left_alone(store: _BlockingStore, path: str) -> bool:
    """Whether nobody will ever say that the disk is closed: it is to go, and neither process nor guest has it."""
    if store.read(f"{path}/online") != "0" or is_alive(parse_process_name(store.read(f"{path}/tapfs/process"))):
        return False
    frontend = store.read(f"{path}/frontend")
    return frontend is None or store.read_if_shown(f"{frontend}/state") in _UNUSED


def _complain(text: str) -> None:
    sys.stderr.write(f"block-tapfs: {printable(text)}\n")


class _BlockingStore:
    """As much of xenstore as a script needs, without trio, which would take longer to load than all of this to run."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._assembler = Assembler()
        try:
            if stat.S_ISCHR(os.stat(path).st_mode):
                self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            else:
                with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                    connection.connect(path)
                    self._descriptor = connection.detach()
        except OSError as error:
            raise from_os_error(error, path=path, op="connect to xenstored") from error

    def read(self, path: str) -> str | None:
        """The value of a key; None if it is not there."""
        try:
            return to_text(self._call(Operation.READ, join_strings(path)))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise from_os_error(error, path=path, op="read the key") from error

    def read_if_shown(self, path: str) -> str | None:
        """The same, and None, too, where the key is not for a driver domain to see: its guest is gone."""
        try:
            return self.read(path)
        except ImageError as error:
            if error.kind is not ErrorKind.DENIED:
                raise
            return None

    def write(self, path: str, value: str) -> None:
        """Set a key."""
        try:
            self._call(Operation.WRITE, join_strings(path) + to_bytes(value))
        except OSError as error:
            raise from_os_error(error, path=path, op="write the key") from error

    def _call(self, operation: Operation, payload: bytes) -> bytes:
        rest = Message(operation, 0, 0, payload).encode()
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        while True:
            piece = os.read(self._descriptor, 4096)
            if not piece:
                raise ConnectionResetError("xenstored is gone")
            for reply in self._assembler.feed(piece):
                if reply.operation == Operation.ERROR:
                    number = errno_of(reply.payload)
                    raise OSError(number, os.strerror(number))
                return reply.payload


if __name__ == "__main__":
    sys.exit(main())

"""The process outside of a mount's sandbox: it mounts and unmounts for the process that serves.

The kernel takes mounting from whoever has given up its rights, and fusermount3 its own. So this process is forked
before the image is looked at. It knows the mount point and the options from the words of the user, takes no others from
the process that serves, and ends with it. Each request is done by a child of its own, so that none waits for another.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.fuse.connection import MountOptions, connect
from tapfs.fuse.mount_table import unmount
from tapfs.fuse.settings import MountSettings
from tapfs.serving.failures import reported
from tapfs.serving.messages import MESSAGE_LIMIT, encode, failed, result_of, succeeded
from tapfs.serving.process_title import title_over

#: A small program that looks at the paths it is given; no PATH is needed to find it.
_LOOK = (sys.executable, "-I", "-S", "-c", "import os, sys\nfor node in sys.argv[1:]: os.stat(node)")

#: The kernel reads so many KiB ahead, its largest request, where we may set this.
_READ_AHEAD_KIB = 1024

#: Descriptors that asking takes.
_TO_ASK = 2

_DEVICE = re.compile(r"\d+:\d+")


class Outside:
    """A mount as the process that serves it may have it: of what is not allowed here, all that it needs.

    Without a sandbox (`start` was not called) all of it is done here.
    """

    def __init__(self, mountpoint: str, options: MountOptions) -> None:
        self._mountpoint = mountpoint
        self._options = options
        self._channel: socket.socket | None = None
        self._child = 0
        #: Descriptors that are free again when it is to be unmounted, whatever else has taken the last one.
        self._reserve: list[int] = []

    def start(self) -> None:
        """Fork the process; no thread may have been started before. Raises ImageError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            child = os.fork()
        except OSError as error:
            ours.close()
            theirs.close()
            raise from_os_error(error, path=self._mountpoint, op="start the process that mounts") from error
        if child == 0:
            self._serve(theirs)
        theirs.close()
        self._channel, self._child = ours, child
        try:
            self._reserve += (os.dup(ours.fileno()) for _ in range(_TO_ASK))
        except OSError as error:
            self.end()
            raise from_os_error(error, path=self._mountpoint, op="start the process that mounts") from error

    def end(self) -> None:
        """Have the process end that this one has started, and wait for that: nothing was mounted."""
        if self._channel is not None:
            self._free_reserve()
            self._channel.close()
            self._channel = None
            os.waitpid(self._child, 0)

    def _free_reserve(self) -> None:
        for descriptor in self._reserve:
            os.close(descriptor)
        self._reserve.clear()

    def connect(self) -> int:
        """Mount; the descriptor of the connection (`tapfs.fuse.connection`)."""
        if self._channel is None:
            return connect(self._mountpoint, self._options)
        found = self._ask("connect")
        if found is None:
            # It is mounted, and the descriptor found no place here.
            with suppress(ImageError):
                self.unmount(lazy=True)
            raise from_os_error(OSError(errno.EMFILE, ""), path=self._mountpoint, op="mount")
        return found

    def unmount(self, *, lazy: bool = False) -> None:
        """Unmount it (`tapfs.fuse.mount_table`). Blocks while the mount's server finishes."""
        if self._channel is None:
            unmount(self._mountpoint, lazy=lazy)
        else:
            self._free_reserve()
            self._ask("unmount lazily" if lazy else "unmount")

    def look(self) -> None:
        """See that the mount answers, in a process of its own. Blocks. Raises ImageError(io)."""
        if self._channel is None:
            _look(self._mountpoint)
        else:
            self._ask("look")

    def read_ahead(self, device: str) -> None:
        """Have the kernel read ahead in large requests; it keeps its default where we may not say so."""
        if self._channel is None:
            _set_read_ahead(device)
        else:
            self._ask(device)

    def _ask(self, request: str) -> int | None:
        """Have it done; the descriptor that came of it. Raises the ImageError that was met."""
        if self._channel is None:
            raise self._gone()
        answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with answers:
            try:
                with theirs:
                    socket.send_fds(self._channel, [request.encode()], [theirs.fileno()])
                line, descriptors, _, _ = socket.recv_fds(answers, MESSAGE_LIMIT, 1)
            except OSError as error:
                raise self._gone() from error
        if not line or result_of(line) is None:
            raise self._gone()
        return descriptors[0] if descriptors else None

    def _gone(self) -> ImageError:
        return ImageError(
            ErrorKind.IO,
            "the process outside of the sandbox, which mounts and unmounts, is gone",
            path=self._mountpoint,
            op="mount or unmount",
            remedy=f"end the serving process, then clean up with: tapfs umount {self._mountpoint}",
        )

    # In the process outside

    def _serve(self, channel: socket.socket) -> NoReturn:
        """Do what is asked until nobody is left who could ask."""
        code = 1
        try:
            # Whoever ends a group of processes means the one that serves; this one ends with it.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                signal.signal(number, signal.SIG_IGN)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)
            os.setsid()
            os.chdir("/")
            title_over(["-m", __name__, self._mountpoint])
            void = os.open(os.devnull, os.O_RDWR)
            for descriptor in range(3):
                os.dup2(void, descriptor)
            os.dup2(channel.fileno(), 3)
            os.closerange(4, os.sysconf("SC_OPEN_MAX"))
            requests = socket.socket(fileno=3)
            while True:
                request, descriptors, _, _ = socket.recv_fds(requests, MESSAGE_LIMIT, 1)
                if not request:
                    break
                if descriptors:
                    self._do_in_child(request.decode(errors="replace"), descriptors[0])
                    os.close(descriptors[0])
            code = 0
        finally:
            os._exit(code)

    def _do_in_child(self, request: str, answers: int) -> None:
        child = os.fork()
        if child:
            return
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with suppress(OSError), socket.socket(fileno=answers) as channel:
                try:
                    made = self._do(request)
                except Exception as error:  # noqa: BLE001  whoever asked is told
                    channel.send(encode(failed(reported(error, op="mount", path=self._mountpoint))))
                else:
                    socket.send_fds(channel, [encode(succeeded({}))], [] if made is None else [made])
        finally:
            os._exit(0)

    def _do(self, request: str) -> int | None:
        if request == "connect":
            return connect(self._mountpoint, self._options)
        known: dict[str, Callable[[], None]] = {
            "unmount": lambda: unmount(self._mountpoint),
            "unmount lazily": lambda: unmount(self._mountpoint, lazy=True),
            "look": lambda: _look(self._mountpoint),
        }
        if request in known:
            known[request]()
        elif _DEVICE.fullmatch(request):
            _set_read_ahead(request)
        return None


def options_of(source: str, settings: MountSettings, *, writable: bool) -> MountOptions:
    """How the kernel is asked to mount."""
    # People look at the mount table in terminals: what is not printable in the name of an image shows as "?".
    shown = "".join(c if c.isprintable() else "?" for c in source)
    return MountOptions(shown, not writable, settings.fuse_options)


def _look(mountpoint: str) -> None:
    # In a process of its own: a thread of ours that waits for us would outlive a kill of us.
    nodes = [os.path.join(mountpoint, node) for node in ("disk", "info.json")]
    done = subprocess.run([*_LOOK, *nodes], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        raise ImageError(ErrorKind.IO, "the new mount does not answer", path=mountpoint, op="mount")


def _set_read_ahead(device: str) -> None:
    with suppress(OSError):
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(_READ_AHEAD_KIB))

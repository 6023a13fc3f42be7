"""The process outside of a mount's sandbox: it mounts and unmounts for the process that serves.

The kernel takes mounting from whoever has given up its rights, and fusermount3 its own. So this process is forked
before the image is looked at. It knows the mount point and the options from the words of the user, takes no others from
the process that serves, and ends with it. Each request is done by a child of its own, so that none waits for another,
and whoever stops waiting for the answer ends that child. Where the files inside are shown the mount of the disk is
hidden, and the files are mounted from here, too (`tapfs.fuse.files.mount_process`, `program_process`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from tapfs.errors import ErrorKind, ImageError, from_os_error
from tapfs.fuse.files import mount_process, program_process
from tapfs.fuse.files.mount_process import FilesWords
from tapfs.fuse.mount_table import top_mount, unmount
from tapfs.fuse.registry import Registry
from tapfs.fuse.settings import MountSettings
from tapfs.host.fuse_connection import MountOptions, connect
from tapfs.serving.failures import reported
from tapfs.serving.messages import MESSAGE_LIMIT, decode, encode, failed, result_of, succeeded
from tapfs.serving.process_title import title_over

#: A small program that looks at the paths it is given; no PATH is needed to find it.
_LOOK = (sys.executable, "-I", "-S", "-c", "import os, sys\nfor node in sys.argv[1:]: os.stat(node)")

#: The kernel reads so many KiB ahead, its largest request, where we may set this.
_READ_AHEAD_KIB = 1024

#: Descriptors that asking takes.
_TO_ASK = 2

#: fcntl(2): the signal that tells of a socket.
_F_SETSIG = 10


class Answer(NamedTuple):
    """What came of a request, and the descriptor that came with it."""

    fields: Mapping[str, Any]
    descriptor: int | None


class Outside:
    """A mount as the process that serves it may have it: of what is not allowed here, all that it needs.

    Without a sandbox (`start` was not called) all of it is done here.
    """

    def __init__(
        self, mountpoint: str, options: MountOptions, registry: Registry | None = None, files: FilesWords | None = None
    ) -> None:
        """`files`: what the user sees at the mount point; the disk is hidden in the registry then."""
        self._mountpoint = mountpoint
        self._options = options
        self._registry = registry
        self._files = files
        #: Where the disk is mounted; empty before `hide`.
        self._place = mountpoint if files is None else ""
        self._channel: socket.socket | None = None
        #: The process, once it is started.
        self.child = 0
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
        self._channel, self.child = ours, child
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
            os.waitpid(self.child, 0)

    def _free_reserve(self) -> None:
        while self._reserve:
            os.close(self._reserve.pop())

    def hide(self, pid: int) -> None:
        """Have the disk mounted where process `pid` of the registry hides it, in a new directory. Raises ImageError."""
        self.ask({"request": "hide", "pid": pid})

    def connect(self) -> int:
        """Mount; the descriptor of the connection (`tapfs.host.fuse_connection`)."""
        if self._channel is None:
            return connect(self._mountpoint, self._options)
        found = self.ask({"request": "connect"}).descriptor
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
            self.ask({"request": "unmount", "lazy": lazy})

    def look(self) -> None:
        """See that the mount answers, in a process of its own. Blocks. Raises ImageError(io)."""
        if self._channel is None:
            _look(self._mountpoint)
        else:
            self.ask({"request": "look"})

    def read_ahead(self) -> None:
        """Have the kernel read ahead in large requests; it keeps its default where we may not say so."""
        if self._channel is None:
            _set_read_ahead(self._mountpoint)
        else:
            self.ask({"request": "read ahead"})

    def clear_away(self, pid: int) -> None:
        """Take away what the process `pid` of the registry has left of this mount when it was killed."""
        if self._channel is None:
            _clear_away(self._registry, self._mountpoint, pid)
        else:
            self.ask({"request": "clear away", "pid": pid})

    def ask(self, message: Mapping[str, object]) -> Answer:
        """Have it done, and wait for that. Raises the ImageError that was met."""
        with self.begin(message) as answers:
            return answer_of(answers)

    def begin(self, message: Mapping[str, object]) -> socket.socket:
        """Have it begun; `answer_of` the socket is what came of it. Raises ImageError."""
        if self._channel is None:
            raise _gone()
        try:
            answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise from_os_error(error, path=self._mountpoint, op=str(message["request"])) from error
        try:
            with theirs:
                socket.send_fds(self._channel, [encode(dict(message))], [theirs.fileno()])
        except OSError as error:
            answers.close()
            raise _gone() from error
        return answers

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
                line, descriptors, _, _ = socket.recv_fds(requests, MESSAGE_LIMIT, 1)
                if not line:
                    break
                if descriptors:
                    message = decode(line)
                    if message.get("request") == "hide":
                        self._hide(message.get("pid"), descriptors[0])
                    else:
                        self._do_in_child(message, descriptors[0], requests)
                    os.close(descriptors[0])
            code = 0
        finally:
            if self._files is not None and self._place:
                with suppress(OSError):  # it is mounted on, as where the server was killed, or is gone
                    os.rmdir(self._place)
            os._exit(code)

    def _hide(self, pid: object, answers: int) -> None:
        """Make the directory, which nobody else has, and which stays that of this mount."""
        with socket.socket(fileno=os.dup(answers)) as channel, suppress(OSError):
            try:
                if self._registry is not None and not self._place and isinstance(pid, int):
                    place = self._registry.hidden_directory(pid)
                    place.mkdir(0o700)
                    self._place = str(place)
            except OSError as error:
                channel.send(encode(failed(from_os_error(error, path=self._mountpoint, op="mount"))))
            else:
                channel.send(encode(succeeded({})))

    def _do_in_child(self, message: Mapping[str, Any], answers: int, requests: socket.socket) -> None:
        try:
            child = os.fork()
        except OSError as error:
            with socket.socket(fileno=os.dup(answers)) as channel, suppress(OSError):
                channel.send(encode(failed(reported(error, op="mount", path=self._mountpoint))))
            return
        if child:
            return
        try:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            with suppress(OSError), socket.socket(fileno=answers) as channel:
                channel.set_inheritable(False)
                try:
                    if self._files is not None and message["request"] == program_process.START:
                        program_process.serve(message, self._files, self._place, channel)
                        return
                    _end_without(channel)
                    made = self._do(message)
                except Exception as error:  # noqa: BLE001  whoever asked is told
                    channel.send(encode(failed(reported(error, op="mount", path=self._mountpoint))))
                else:
                    given = [] if made.descriptor is None else [made.descriptor]
                    socket.send_fds(channel, [encode(succeeded(made.fields))], given)
        finally:
            os._exit(0)

    def _do(self, message: Mapping[str, Any]) -> Answer:
        match message["request"]:
            case "connect":
                return Answer({}, self._connect())
            case "unmount":
                self._unmount(lazy=message["lazy"] is True)
            case "look":
                with _not_answering(self._place):
                    for node in _nodes(self._place):
                        os.stat(node)
            case "read ahead":
                _set_read_ahead(self._place)
            case "clear away":
                _clear_away(self._registry, self._mountpoint, message["pid"])
            case _:
                if self._files is not None:
                    return self._do_for_files(message, self._files)
        return Answer({}, None)

    def _do_for_files(self, message: Mapping[str, Any], words: FilesWords) -> Answer:
        match message["request"]:
            case program_process.END:
                program_process.end(message["pid"], words, force=message["force"] is True)
            case program_process.SAID:
                return Answer({}, program_process.said_by(message["pid"], words))
            case _:
                request = mount_process.request_of(message)
                if request is not None:
                    title_over(["-m", mount_process.__name__, self._mountpoint])
                    return Answer({"result": mount_process.perform(request, words, self._place)}, None)
        return Answer({}, None)

    def _connect(self) -> int:
        hidden = self._files is not None
        try:
            if hidden:
                with suppress(FileExistsError):  # by `hide`; not by the second engine that is tried
                    os.mkdir(self._place, 0o700)
            # The server may make links in the runtime directory: it could name any directory to be mounted on.
            return connect(self._place, self._options, follow=not hidden)
        except BaseException:
            if hidden:
                with suppress(OSError):
                    os.rmdir(self._place)
            raise

    def _unmount(self, *, lazy: bool) -> None:
        unmount(self._place, lazy=lazy)
        if self._files is not None:
            with suppress(OSError):
                os.rmdir(self._place)


def answer_of(answers: socket.socket) -> Answer:
    """The next thing that came of a request. Waits for it. Raises the ImageError that was met."""
    try:
        line, descriptors, _, _ = socket.recv_fds(answers, MESSAGE_LIMIT, 1)
    except OSError as error:
        raise _gone() from error
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    fields = result_of(line) if line else None
    if fields is None:
        raise _gone()
    return Answer(fields, descriptors[0] if descriptors else None)


def _gone() -> ImageError:
    return ImageError(
        ErrorKind.IO,
        "the process outside of the sandbox, which mounts and unmounts, is gone",
        op="mount or unmount",
        remedy="end the serving process, then clean up with: tapfs umount DIR",
    )


def _end_without(channel: socket.socket) -> None:
    """Have the kernel end this process when nobody waits for its answer any more."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    fcntl.fcntl(channel, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(channel, _F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(channel, fcntl.F_SETFL, fcntl.fcntl(channel, fcntl.F_GETFL) | os.O_ASYNC)
    with suppress(BlockingIOError):
        if not channel.recv(1, socket.MSG_DONTWAIT):  # before that
            os._exit(0)


def options_of(source: str, settings: MountSettings, *, writable: bool) -> MountOptions:
    """How the kernel is asked to mount."""
    # People look at the mount table in terminals: what is not printable in the name of an image shows as "?".
    shown = "".join(c if c.isprintable() else "?" for c in source)
    return MountOptions(shown, not writable, settings.fuse_options)


def _nodes(mountpoint: str) -> list[str]:
    return [os.path.join(mountpoint, node) for node in ("disk", "info.json")]


@contextmanager
def _not_answering(mountpoint: str) -> Generator[None]:
    """Say so where a look at the mount fails."""
    try:
        yield
    except (OSError, subprocess.CalledProcessError) as error:
        raise ImageError(ErrorKind.IO, "the new mount does not answer", path=mountpoint, op="mount") from error


def _look(mountpoint: str) -> None:
    # In a process of its own: a thread of ours that waits for us would outlive a kill of us.
    with _not_answering(mountpoint):
        subprocess.run([*_LOOK, *_nodes(mountpoint)], stdin=subprocess.DEVNULL, capture_output=True, check=True)


def _set_read_ahead(mountpoint: str) -> None:
    mount = top_mount(mountpoint)
    if mount is not None:
        with suppress(OSError):
            Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").write_text(str(_READ_AHEAD_KIB))


def _clear_away(registry: Registry | None, mountpoint: str, pid: int) -> None:
    """What the entry of a process says is not believed: only this mount is taken away."""
    from tapfs.fuse.unmounting import clean_up  # few are killed so early

    if registry is not None:
        for entry in registry.entries():
            if (entry.pid, entry.mountpoint) == (pid, mountpoint):
                clean_up(registry, entry)

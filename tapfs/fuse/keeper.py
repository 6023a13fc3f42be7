"""The keeper of a mount: a process that starts the mount's server, and another server when that one was killed.

The keeper holds the descriptors of the connection to the kernel. So the mount outlives its server, and programs that
use the disk wait instead of getting errors. The next server has the kernel give it every request again that was not
answered (FUSE_NOTIFY_RESEND, Linux 6.9). What was answered is in the host's files. The metadata that points to it is in
the plan log (`tapfs.disk.plan_log`), which the next server executes before it opens the image.

The keeper is forked from the command before the server is, so it is a small process without threads. It has no image
and parses nothing. A server that ends in order, whatever its exit code, has unmounted; then the keeper ends, too. If
the keeper is killed, the server goes on alone.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn, Protocol

from tapfs.errors import ImageError, from_os_error
from tapfs.fuse.handover import KeeperEnd, Kept, ServerEnd, ends
from tapfs.serving.failures import log_failure
from tapfs.serving.log import log
from tapfs.serving.process_title import title_over
from tapfs.serving.signals import ENDING, do_nothing, handle_ending

#: A server that was killed so soon after its start, in seconds, was a bad start; the keeper bears so many in a row.
_SOUND_SECONDS = 10.0
_MOST_BAD_STARTS = 5
#: Seconds before the next start after one that was not good, doubled each time.
_FIRST_PAUSE = 0.2


class Servable(Protocol):
    """A mount as its keeper has it."""

    @property
    def path(self) -> str:
        """The mount point."""
        ...

    def let_go(self) -> None:
        """Let go of the image, which is the server's."""
        ...

    def serve_here(self, ready: Callable[[], None], end: ServerEnd | None = None) -> None:
        """Mount and serve in this process until the end. Raises ImageError."""
        ...

    def note_kept(self, kept: Kept | None) -> None:
        """In the keeper: what it holds has changed."""
        ...

    def go_on(self, kept: Kept, ready: Callable[[], None], end: ServerEnd) -> None:
        """Serve the mount of a server that was killed, until the end. Takes over the descriptors. Raises ImageError."""
        ...


class Keeper:
    """The life of a keeper, in the process that is to be one."""

    def __init__(self, mount: Servable, kept: Kept | None = None) -> None:
        """`kept`: the mount is there already, and its last keeper was killed."""
        self._mount = mount
        self._kept = kept
        self._server = 0
        #: The last signal to end the mount, which a server that was just killed may not have heard.
        self._told: int | None = None

    def run(self, ready: Callable[[], None]) -> None:
        """Fork servers until there is no more to serve.

        Returns in the process of a server, when that has served, and raises there what it met. The keeper's own process
        ends here, as its last server did. Raises ImageError if there can be no process.
        """
        bad_starts = 0
        followed = self._kept is not None
        first = True
        while True:
            begun = time.monotonic()
            try:
                ours, theirs = ends()
                # A signal for the server must not end it before it obeys.
                signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
                self._server = os.fork()
            except OSError as error:
                if self._kept is None:
                    raise from_os_error(error, path=self._mount.path, op="start the serving process") from error
                log.error("%s: cannot start another server: %s", self._mount.path, error)
                self._end(-signal.SIGKILL)
            if self._server == 0:
                ours.close()
                self._serve(ready, theirs)
                return
            theirs.close()
            if first:
                first = False
                if not followed:
                    self._mount.let_go()
                with suppress(OSError):
                    os.chdir("/")  # a working directory would keep its file system busy
                title_over(["-m", __name__, self._mount.path])
            self._obey()
            if self._told is not None:
                self._pass_on(self._told, None)
            code = self._watch(ours)
            if code >= 0 or self._kept is None:
                self._end(code)
            bad_starts = bad_starts + 1 if time.monotonic() - begun < _SOUND_SECONDS else 0
            name = signal.Signals(-code).name
            if bad_starts > _MOST_BAD_STARTS:
                log.error("%s: %d servers were killed one after the other; giving up", self._mount.path, bad_starts)
                self._end(code)
            log.warning("%s: its server was ended by %s; starting another one", self._mount.path, name)
            if bad_starts > 1:
                time.sleep(_FIRST_PAUSE * 2 ** (bad_starts - 2))

    def _serve(self, ready: Callable[[], None], end: ServerEnd) -> None:
        """In the server."""
        handle_ending(do_nothing)
        kept, self._kept = self._kept, None
        if kept is None:
            self._mount.serve_here(ready, end)
            return
        title_over(sys.orig_argv[1:])
        try:
            self._mount.go_on(kept, ready, end)
        except ImageError as error:
            # Nobody waits for this server's first word, so nobody else would tell.
            log_failure(error, f"{self._mount.path}: cannot go on where the last server was killed")
            raise

    def _obey(self) -> None:
        """Have the signals that end a mount reach the server, which ends in order."""
        handle_ending(self._pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)

    def _pass_on(self, number: int, _frame: object) -> None:
        self._told = number
        with suppress(ProcessLookupError):
            os.kill(self._server, number)

    def _watch(self, end: KeeperEnd) -> int:
        """Hold what the server gives, until it has ended: its exit code, or minus the number of the signal."""
        poll = select.poll()
        poll.register(end, select.POLLIN)
        is_open = True
        while is_open:
            poll.poll()
            before = self._kept
            self._kept, is_open = end.take(before)
            if self._kept is not before:
                self._mount.note_kept(self._kept)
        # The server is the only one to have the other end, so it ends.
        end.close()
        _, status = os.waitpid(self._server, 0)
        return os.waitstatus_to_exitcode(status)

    def _end(self, code: int) -> NoReturn:
        """End as the server has."""
        if self._kept is not None:
            self._kept.close()
        if code < 0:
            with suppress(OSError):
                signal.signal(-code, signal.SIG_DFL)
            os.kill(os.getpid(), -code)
        os._exit(code if code >= 0 else 128 - code)

"""The keeper of one block device: starts the process that serves it, and another one when that was killed.

The keeper has no image and no thread; it waits for its child. So users of the device see a pause and no error, whatever
ends the serving process. If the keeper itself is killed, the device goes on being served, and `tapfs resume` starts
another keeper when the serving process has ended, too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from tapfs.errors import ErrorKind, ImageError
from tapfs.serving.log import log
from tapfs.serving.messages import MESSAGE_LIMIT, result_of
from tapfs.serving.processes import EXIT_DONE, EXIT_STOPPED
from tapfs.serving.signals import ENDING
from tapfs.ublk.driver import Driver, block_device
from tapfs.ublk.record import change_record, process_name, remove_files

#: Seconds before a process is started again that has failed, doubled from time to time.
_FIRST_PAUSE, _LAST_PAUSE = 0.1, 30.0
#: A process that has served so many seconds was no failure of its start.
_SOUND_SECONDS = 60.0


class Keeper:
    """What is to be started in the background (`tapfs.serving.background.Start`): the device `number`.

    `fresh`: the device is new, and goes if its image cannot be served.
    """

    def __init__(self, number: int, path: str, *, fresh: bool) -> None:
        self._number = number
        self._path = path
        self._fresh = fresh
        self._ended_by = 0
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def path(self) -> str:
        """What error messages name."""
        return self._path

    def serve(self, ready: Callable[[], None]) -> None:
        """Keep the device served until it is no more, and call `ready` once it can be used. Raises ImageError."""
        with suppress(OSError):
            os.chdir("/")  # a working directory would keep its file system busy
        for number in ENDING:
            signal.signal(number, self._end)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        change_record(self._number, keeper=process_name(os.getpid()))
        pause, told = _FIRST_PAUSE, False
        while not self._is_to_end():
            begun = time.monotonic()
            try:
                self._start()
                if not told:
                    ready()
                    told = True
            except ImageError as error:
                log.error("%s: %s", block_device(self._number), error)
                if not told:
                    self._wait()
                    if self._fresh:
                        self._put_away()
                    raise
            code = self._wait()
            if code == EXIT_DONE:
                break
            if self._is_to_end() and code == EXIT_STOPPED:
                log.info("%s waits for another process: tapfs resume", block_device(self._number))
                return
            log.warning("%s: its process ended with %d; starting another one", block_device(self._number), code)
            if time.monotonic() - begun > _SOUND_SECONDS:
                pause = _FIRST_PAUSE
            time.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)
        if not self._is_to_end():
            self._put_away()

    def let_go(self) -> None:
        """In the parent, after the fork: nothing of its own is the child's."""

    def require_ready(self) -> None:
        """In the parent: the device can be used."""

    def clear_away(self, child: int) -> str | None:
        """In the parent: remove a new device whose keeper was killed."""
        del child
        if self._fresh:
            self._put_away()
        return None

    def _start(self) -> None:
        """Start the process and wait until it serves. Raises the ImageError that it has met."""
        reader, writer = os.pipe()
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "tapfs.ublk.process", str(self._number), str(writer)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(writer,),
            )
        finally:
            os.close(writer)
        with os.fdopen(reader, "rb") as channel:
            if result_of(channel.readline(MESSAGE_LIMIT)) is None:
                raise ImageError(ErrorKind.IO, "its process ended early", path=self._path, op="start")

    def _wait(self) -> int:
        """The exit code of the process, minus the number of the signal that ended it."""
        if self._child is None:
            return EXIT_STOPPED
        return self._child.wait()

    def _is_to_end(self) -> bool:
        """Whether a signal has come."""
        return self._ended_by != 0

    def _end(self, number: int, _frame: object) -> None:
        """On a signal: the serving process ends in order, and the device waits for another one."""
        self._ended_by = number
        if self._child is not None:
            with suppress(ProcessLookupError):
                self._child.send_signal(number)

    def _put_away(self) -> None:
        """Remove the device, whose process has ended, and what belongs to it."""
        try:
            with Driver() as driver:
                if driver.info(self._number) is not None:
                    driver.delete(self._number)
        except ImageError as error:
            log.error("%s", error)
        remove_files(self._number)

"""Worker processes: started as forks of this process where that is safe, else anew; ended without waiting for ever."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import NamedTuple

#: A process that was killed is waited for so long. One that waits for a host that hangs goes when that answers.
_END_SECONDS, _END_STEP_SECONDS = 1.0, 0.01


class WorkerProcess(NamedTuple):
    """A process: what it is told goes to the descriptor `input`, what it says comes from `output`."""

    pid: int
    input: int
    output: int

    def end(self) -> int | None:
        """Kill it and let go of it: its exit code, that of a signal below 0; None if the host still holds it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.input)
        os.close(self.output)
        until = time.monotonic() + _END_SECONDS
        while True:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                return None
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                return None
            time.sleep(_END_STEP_SECONDS)


def start_process(handler: str, memory_bytes: int) -> WorkerProcess:
    """Start a worker (`tapfs.many.worker`). A fork has loaded already what this process has. Raises OSError."""
    to_worker, from_worker = os.pipe(), os.pipe()
    parent = os.getpid()
    try:
        pid = os.fork() if _has_one_thread() else _started_anew(handler, memory_bytes, to_worker[0], from_worker[1])
    except BaseException:
        for descriptor in (*to_worker, *from_worker):
            os.close(descriptor)
        raise
    if pid == 0:
        _serve(handler, memory_bytes, parent, to_worker, from_worker)
    os.close(to_worker[0])
    os.close(from_worker[1])
    return WorkerProcess(pid, to_worker[1], from_worker[0])


def _has_one_thread() -> bool:
    """Whether a fork of this process would have all of it: of several threads it would have one."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


def _serve(
    handler: str, memory_bytes: int, parent: int, to_worker: tuple[int, int], from_worker: tuple[int, int]
) -> None:
    """The life of a fork; it does not return."""
    code = 1
    try:
        os.setsid()
        os.close(to_worker[1])
        os.close(from_worker[0])
        if not os.environ.get("TAPFS_DEBUG"):
            void = os.open(os.devnull, os.O_RDWR)
            for standard in (0, 1, 2):
                os.dup2(void, standard)
        from tapfs.many.worker import serve

        code = serve(handler, memory_bytes, parent, to_worker[0], from_worker[1])
    finally:
        os._exit(code)


def _started_anew(handler: str, memory_bytes: int, source: int, output: int) -> int:
    debug = bool(os.environ.get("TAPFS_DEBUG"))
    words = [sys.executable, "-m", "tapfs.many.worker", handler, str(memory_bytes), str(os.getpid())]
    actions = [(os.POSIX_SPAWN_DUP2, source, 0), (os.POSIX_SPAWN_DUP2, output, 1)]
    if not debug:
        actions.append((os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0))  # type: ignore[arg-type]
    return os.posix_spawn(sys.executable, words, os.environ, file_actions=actions, setsid=True)

"""Run programs and wait for things, always with a limit."""

from __future__ import annotations

import hashlib
import importlib
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

#: Limits are what an idle machine needs and more; a busy one gets so many times that.
PATIENCE = 5
#: What most commands of tapfs load.
LOADED = (
    "tapfs.cli.main",
    "tapfs.cli.guests.attach",
    "tapfs.ublk.attaching",
    "tapfs.xen.toolstack.attach",
    "tapfs.xen.toolstack.block_device",
    "tapfs.xen.xenstore.client",
)


def say(text: str) -> None:
    """A line of the scenario's output, with dom0's uptime."""
    uptime = Path("/proc/uptime").read_text(encoding="ascii").split()[0]
    sys.stdout.write(f"[{uptime}] {text}\n")
    sys.stdout.flush()


def run(*command: str, statuses: Sequence[int] = (0,), limit: float = 60) -> str:
    """Run a program to its end; its output, both streams, without the last line feed."""
    answer = attempt(*command, limit=limit)
    if answer.returncode not in statuses:
        raise AssertionError(f"{' '.join(command)}: status {answer.returncode}: {answer.stdout.strip()}")
    return answer.stdout.strip()


def attempt(*command: str, limit: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a program whatever becomes of it; both streams are in `stdout`."""
    say(f"$ {' '.join(command)}")
    answer = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=limit * PATIENCE,
        check=False,
    )
    if answer.stdout.strip():
        say(answer.stdout.rstrip())
    if answer.returncode:
        say(f"status {answer.returncode}")
    return answer


def tapfs(*words: str, statuses: Sequence[int] = (0,), limit: float = 60) -> str:
    """Run a command of tapfs to its end; its output, both streams, without the last line feed."""
    answer = attempt_tapfs(*words, limit=limit)
    if answer.returncode not in statuses:
        raise AssertionError(f"tapfs {' '.join(words)}: status {answer.returncode}: {answer.stdout.strip()}")
    return answer.stdout.strip()


def attempt_tapfs(*words: str, limit: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a command of tapfs whatever becomes of it.

    In a fork of this process, which has loaded it already: under emulation that takes seconds for each new Python.
    """
    say(f"$ tapfs {' '.join(words)}")
    for module in LOADED:
        importlib.import_module(module)
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        _be_tapfs(words, writing)
    os.close(writing)
    output = b""
    end = time.monotonic() + limit * PATIENCE
    poll = select.poll()
    poll.register(reading, select.POLLIN)
    while poll.poll(max(0, end - time.monotonic()) * 1000) and (data := os.read(reading, 65536)):
        output += data
    os.close(reading)
    if time.monotonic() > end:
        os.kill(process, signal.SIGKILL)
        raise AssertionError(f"tapfs {' '.join(words)} was not done after {limit * PATIENCE:g} s")
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    text = output.decode(errors="replace")
    say(f"{text}status {status}" if status else text.rstrip() or "done")
    return subprocess.CompletedProcess(("tapfs", *words), status, text)


def _be_tapfs(words: Sequence[str], output: int) -> NoReturn:
    """The child of a fork: never returns to the scenario."""
    status: object = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115 - those of the parent are files
        status = importlib.import_module("tapfs.cli.main").main(list(words))
    except SystemExit as end:
        status = end.code
    except BaseException:  # noqa: BLE001 - whatever it is, it must not get out
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def wait_until(what: str, condition: Callable[[], object], limit: float = 30) -> None:
    """Wait until `condition` holds."""
    end = time.monotonic() + limit * PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"waited {limit * PATIENCE:g} s for {what}")
        time.sleep(0.05)


def digest(path: str | Path) -> str:
    """The SHA-256 of a file or of a whole block device."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

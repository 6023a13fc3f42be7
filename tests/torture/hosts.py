"""Commands on other hosts: file systems that lack something, that are full or read-only, and clocks that jump.

Each command of tests/torture/commands.py runs on each host. Where a host lacks what tapfs can do without the command
succeeds. Where it fails there is a message, a documented exit code, a target that is whole or has no name, an image
without corruption, and every byte that was acknowledged.

    python -m tests.torture.hosts --only convert-qcow2 --host no-tmpfile
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import tapfs
from tests.conftest import REPOSITORY
from tests.many_runs import Done, Job, failures
from tests.torture.calls import Ended, finished
from tests.torture.commands import CODES_OF_ERRORS, COMMANDS
from tests.torture.refusing_host import HOSTS

PROGRAM = "python -m tests.torture.hosts"
REFUSING = REPOSITORY / "tests/torture/refusing_host.py"
_PATIENCE_SECONDS = 300
#: Bytes that a full host has left when the command begins; a conversion takes 2 MiB.
_LEFT = tuple(kib << 10 for kib in (0, 4, 16, 64, 200, 500, 1000, 1900, 2100, 4000))
#: The runtime directory of a disk that is served has to be mapped, and its files restricted, wherever the image lies.
_NOT_FOR_SERVERS = frozenset({"no-mmap", "no-owners", "nothing"})
#: What is no refusal of calls.
OTHERS = ("clock-jumps", "read-only", *(f"full-{left >> 10}" for left in _LEFT))


def judge(host: str, name: str, folder: Path) -> Done:
    """Run a command on a host. Raises AssertionError."""
    command, files = COMMANDS[name], folder / "files"
    files.mkdir()
    environment, words = dict(os.environ), list[str]()
    if host == "clock-jumps":
        environment["LD_PRELOAD"] = str(_clock(folder))
    elif host in HOSTS:
        words = [sys.executable, str(REFUSING), host]
    if host.startswith("full-"):
        with _mounted(files, f"size={64 << 20}"):
            command.prepare(files)
            _fill(files, int(host.removeprefix("full-")) << 10)
            ended = _run([*words, *command.words(files)], environment)
            (files / "filling").unlink()
            return _look(host, name, files, ended)
    command.prepare(files)
    if host == "read-only":
        before = _contents(files)
        with _read_only(files):
            ended = _run([*words, *command.words(files)], environment)
        assert ended.status != 0, "a read-only host was written"
        assert _contents(files) == before, "a read-only host has changed"
        return _judged(host, name, ended)
    return _look(host, name, files, _run([*words, *command.words(files)], environment))


def _look(host: str, name: str, files: Path, ended: Ended) -> Done:
    try:
        COMMANDS[name].look(files, ended)
        served = name.startswith(("mount", "serve"))
        if (host in HOSTS or host == "clock-jumps") and not (served and host in _NOT_FOR_SERVERS):
            assert ended.status == 0, "the command can do without what the host lacks"
    except (AssertionError, tapfs.ImageError) as error:
        error.add_note(f"status {ended.status}: {ended.output[-3000:]}")
        raise
    left = {each.name for each in files.iterdir()} - {"source", "target", "image", "over"}
    assert not left, f"the command left {left}"
    return _judged(host, name, ended)


def _judged(host: str, name: str, ended: Ended) -> Done:
    assert "Traceback" not in ended.output, ended.output[-3000:]
    assert ended.status in CODES_OF_ERRORS | COMMANDS[name].codes, f"exit code {ended.status}: {ended.output[-3000:]}"
    assert ended.status in {0} | COMMANDS[name].codes or ended.output.strip(), "an error without a message"
    del host
    return Done(f"status {ended.status}", {"commands on other hosts": 1})


def _run(words: list[str], environment: dict[str, str]) -> Ended:
    done = finished(words, _PATIENCE_SECONDS, environment)
    return Ended(done.returncode, done.stdout, met=True)


def _contents(files: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in files.iterdir()}


@contextmanager
def _mounted(files: Path, options: str) -> Iterator[None]:
    """A file system in memory of its own."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tapfs-torture", files], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", files], check=True)


@contextmanager
def _read_only(files: Path) -> Iterator[None]:
    """The folder as a read-only mount of itself."""
    subprocess.run(["mount", "--bind", files, files], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", files], check=True)
        yield
    finally:
        subprocess.run(["umount", files], check=True)


def _fill(files: Path, left: int) -> None:
    """Leave so many bytes."""
    status = os.statvfs(files)
    with (files / "filling").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_bsize - left))


def _clock(folder: Path) -> Path:
    library = folder / "clock_jumps.so"
    source = REPOSITORY / "tests/torture/clock_jumps.c"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def jobs(hosts: Iterable[str], names: Iterable[str], share: float, choice: random.Random) -> Iterator[Job]:
    """A run of each command on each host, in any order; `share` of them, drawn at random."""
    found = [(host, name) for host in hosts for name in names]
    choice.shuffle(found)
    for host, name in found[: max(1, int(len(found) * share))]:
        yield Job(f"{name} on {host}", f"{PROGRAM} --only {name} --host {host}", partial(judge, host, name))


def main(words: list[str]) -> int:
    """Run commands on hosts, on all or on some of them."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*HOSTS, *OTHERS]
    parser.add_argument("--only", metavar="COMMAND", choices=COMMANDS, nargs="+", default=list(COMMANDS))
    parser.add_argument("--host", metavar="HOST", choices=known, nargs="+", default=known, help=", ".join(known))
    parser.add_argument("--share", metavar="X", type=float, default=1.0, help="of all, drawn at random")
    parser.add_argument("--seed", metavar="N", type=int, default=0)
    parser.add_argument("--processes", metavar="N", type=int, default=1)
    arguments = parser.parse_args(words)
    chosen = jobs(arguments.host, arguments.only, arguments.share, random.Random(arguments.seed))
    return failures(chosen, arguments.processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

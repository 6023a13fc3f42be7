"""`python -m tests.bench.vhost`: `tapfs serve --vhost-user` and qemu-storage-daemon, with the same guest in front.

The guest is vhost_frontend.c. As in `tests.bench.ring` the backend has one processor and the guest another. Beside them
plain_calls.c asks the host for the same pages of a file that was made as the image was, without a guest. That is the
least that a request takes by system calls.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.ring import BACKEND_CPU, Backend, Disk, Job, Result, VhostUser, build, make_disks, run, storage_daemons
from tests.bench.runner import TAPFS


def _tapfs(disk: Disk, socket: str) -> Sequence[str]:
    program = TAPFS
    return [program, "serve", "-f", disk.format_name, "--rw", "--vhost-user", socket, str(disk.image)]


class PlainCalls(Backend):
    """The host's calls alone, on files of its own."""

    def __init__(self, program: Path, disks: Sequence[Disk]) -> None:
        super().__init__("one system call each")
        self._program = program
        self._files = {disk.format_name: disk.image for disk in disks}

    def run(self, job: Job, disk: Disk, seconds: int) -> Result:
        file = self._files[disk.format_name]
        words: list[object] = [self._program, file, *self._workload(job, disk, seconds), os.getpid()]
        command = ["taskset", "-c", str(BACKEND_CPU), *map(str, words)]
        return Result.of(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def backends(work: Path, size_mib: int) -> list[Backend]:
    """Those that this machine has."""
    frontend = build(work, "vhost_frontend")
    plain = work / "plain"
    plain.mkdir()
    calls = PlainCalls(build(work, "plain_calls"), make_disks(plain, size_mib))
    return [VhostUser("tapfs", frontend, _tapfs), *storage_daemons(frontend), calls]


if __name__ == "__main__":
    sys.exit(run("python -m tests.bench.vhost", __doc__, backends))

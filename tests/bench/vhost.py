"""`python -m tests.bench.vhost`: `tapfs serve --vhost-user` and qemu-storage-daemon, with the same guest in front.

The guest is vhost_frontend.c. As in `tests.bench.ring` the backend has one processor and the guest another.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.ring import Backend, Disk, VhostUser, build, run, storage_daemons


def _tapfs(disk: Disk, socket: str) -> Sequence[str]:
    program = str(Path(sys.executable).with_name("tapfs"))
    return [program, "serve", "-f", disk.format_name, "--rw", "--vhost-user", socket, str(disk.image)]


def backends(work: Path, size_mib: int) -> list[Backend]:
    """Those that this machine has."""
    del size_mib
    frontend = build(work, "vhost_frontend")
    return [VhostUser("tapfs", frontend, _tapfs), *storage_daemons(frontend)]


if __name__ == "__main__":
    sys.exit(run("python -m tests.bench.vhost", __doc__, backends))

"""A process that serves an image on a frontend's rings again and again, each time in a child that may be killed.

`python -m tests.unit.xen.xen_ring_process CONFIGURATION`: for each line on standard input, the number of a kind of
grants, a child takes the rings up; "ready PID" is printed. When the child has been killed "ended" is. The children are
forked, which is far quicker than to start anew.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self, cast

from tapfs import ImageError
from tapfs.disk.chain import OpenOptions
from tapfs.disk.image import Image
from tapfs.disk.opening import complete_left, open_image
from tapfs.disk.plan_log import PlanLog
from tapfs.kernel.xen_ring import Grants
from tests.unit.xen.xen_rings import Served
from tests.xen.frontend import Frontend
from tests.xen.machine import PATIENCE, Machine


def open_after_kill(path: str, format_name: str) -> Image:
    """The image as a disk process opens it; its last user's locks may outlive the user a little."""
    plan_log = PlanLog(Path(f"{path}.plan"), "of this test")
    options = OpenOptions(format=format_name, writable=True, request_owner=plan_log.request_owner)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            complete_left(path, options, plan_log)
            return open_image(path, options, plan_log=plan_log)
        except ImageError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)


def _serve(configuration: dict[str, Any], grants: Grants) -> None:
    machine = SimpleNamespace(directory=Path(configuration["machine"]))
    rings = [
        SimpleNamespace(references=references, port=SimpleNamespace(number=port))
        for references, port in configuration["rings"]
    ]
    frontend = SimpleNamespace(
        abi=configuration["abi"], domain=SimpleNamespace(number=configuration["domain"]), rings=rings
    )
    image = open_after_kill(configuration["image"], configuration["format"])
    served = Served(
        cast("Machine", machine), cast("Frontend", frontend), image, grants=grants, journal=configuration["journal"]
    )
    os.write(1, f"ready {os.getpid()}\n".encode())
    ended = select.poll()
    ended.register(served.device.ended_descriptor, select.POLLIN)
    ended.poll()
    sys.exit(f"a ring has ended: {served.device.problem()}")


class Backend:
    """The process, from the test's side. `start` and `kill` as often as you like; between them rings are served."""

    def __init__(
        self, machine: Machine, frontend: Frontend, image: Path, format_name: str, journal: int | None = None
    ) -> None:
        self.journal = os.memfd_create("journal") if journal is None else os.dup(journal)
        configuration = {
            "machine": str(machine.directory),
            "domain": frontend.domain.number,
            "abi": int(frontend.abi),
            "rings": [(ring.references, ring.port.number) for ring in frontend.rings],
            "image": str(image),
            "format": format_name,
            "journal": self.journal,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.unit.xen.xen_ring_process", json.dumps(configuration)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[self.journal],
            cwd=Path(__file__).parents[3],
            # The engine of the process that is killed need not be a sanitized one.
            env={name: value for name, value in os.environ.items() if name != "TAPFS_ENGINE_DIR"},
        )
        self._child: int | None = None

    def _expect(self, word: str) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith(word), line
        return line.removeprefix(word).strip()

    def start(self, grants: Grants) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{grants.value}\n")
        self._process.stdin.flush()
        self._child = int(self._expect("ready "))

    def kill(self) -> None:
        if self._child is not None:
            os.kill(self._child, 9)
            self._child = None
            self._expect("ended")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._process.communicate()
        os.close(self.journal)


def main() -> None:
    configuration = json.loads(sys.argv[1])
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _serve(configuration, Grants(int(line)))
        os.waitpid(child, 0)
        os.write(1, b"ended\n")


if __name__ == "__main__":
    main()

"""A device of the engine's Xen rings in this process: an image behind, a guest in front, threads for what is parked."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from tapfs.disk.image import Image
from tapfs.errors import ImageError
from tapfs.kernel.parked import Queue
from tapfs.kernel.xen_ring import Grants, ParkedRequest, Protocol, Request, XenDevice
from tests.xen.frontend import Frontend
from tests.xen.machine import Machine

DOMAIN = 7


class Served:
    """An image served on the rings of a frontend, as a disk process does it."""

    def __init__(
        self,
        machine: Machine,
        frontend: Frontend,
        image: Image,
        *,
        grants: Grants = Grants.COPY,
        journal: int | None = None,
        discard: bool = True,
        writable: bool = True,
        indirect_segments: int = 256,
        threads: int = 2,
        io_uring: bool = True,
        before: Callable[[ParkedRequest], None] | None = None,
    ) -> None:
        """`before` is called with what is parked before it is served; an ImageError of it is the answer."""
        self.image = image
        self.own_journal = journal is None
        self.journal = os.memfd_create("journal") if journal is None else journal
        self.parked: list[Request] = []
        self.before = before
        self.device = XenDevice(
            image.engine_disk,
            machine=str(machine.directory),
            domain=frontend.domain.number,
            protocol=Protocol(frontend.abi),
            grants=grants,
            journal=self.journal,
            writable=writable and image.writable,
            discard=discard,
            indirect_segments=indirect_segments,
            workers=2,
            io_uring=io_uring,
        )
        self._threads: list[threading.Thread] = []
        try:
            for ring in frontend.rings:
                self.device.add_ring(ring.references, ring.port.number)
            self.device.start()
        except BaseException:
            self.device.close()
            raise
        for queue in Queue:
            for _ in range(threads):
                thread = threading.Thread(target=self._serve, args=(queue,))
                thread.start()
                self._threads.append(thread)

    def _serve(self, queue: Queue) -> None:
        while taken := self.device.next_parked(queue):
            for parked in taken:
                self.parked.append(parked.request)
                try:
                    if self.before is not None:
                        self.before(parked)
                    self._answer(parked)
                except ImageError as error:
                    parked.fail(error.errno)

    def _answer(self, parked: ParkedRequest) -> None:
        if parked.request is Request.SYNC:
            self.image.flush()
            parked.complete()
        elif parked.request is Request.DISCARD:
            self.image.discard(parked.offset, parked.length)
            parked.complete()
        else:
            finished = False
            while not finished:
                outcome = parked.outcome()
                if outcome.needs_reservation:
                    self.image.write(parked.offset, parked.data)
                    parked.complete()
                    return
                self.image.supply_map(outcome)
                finished = parked.resume()

    def replace(self, image: Image) -> None:
        self.device.replace_disk(image.engine_disk, writable=image.writable, discard=True)
        self.image = image

    def stop(self) -> None:
        self.device.stop()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def close(self) -> None:
        self.stop()
        self.device.close()
        if self.own_journal:
            os.close(self.journal)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def new_machine() -> Iterator[Machine]:
    """A machine in a directory of its own, for tests that want more than one or none by a fixture."""
    with tempfile.TemporaryDirectory(prefix="xen-") as name, Machine(Path(name)) as machine:
        yield machine


def pattern(sectors: int, seed: int = 0) -> bytes:
    """Sectors that differ from each other and from seed to seed, and are nowhere zero."""
    pieces = (
        bytes([(seed * 31 + sector * 7 + piece) % 255 + 1]) * 64 for sector in range(sectors) for piece in range(8)
    )
    return b"".join(pieces)

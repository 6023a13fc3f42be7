"""A simulated machine in a directory: what stands in for Xen's grants and event channels (kernel/src/xen/simulated.c).

For each domain D a file of its pages (`domain-D.memory`), its grants (`domain-D.grants`), and two FIFOs for each of its
event channels (`domain-D.port-P.to-backend`, `….to-frontend`). The guest's side of all of it is here.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import select
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.xen.blkif import PAGE

#: Seconds that something may take which happens at once on a machine that has nothing else to do.
PATIENCE = 120.0

_WORD_BYTES = 4
#: Xen keeps the first references for itself.
_FIRST_REFERENCE = 8


class Port:
    """The guest's end of an event channel."""

    def __init__(self, base: Path, number: int) -> None:
        self.number = number
        self._paths = [base.with_name(f"{base.name}.port-{number}.to-{end}") for end in ("backend", "frontend")]
        for path in self._paths:
            os.mkfifo(path)
        # Read and write: a FIFO that one side alone has open would look closed to it.
        self._out, self._in = (os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) for path in self._paths)

    def fileno(self) -> int:
        """Readable when the backend has notified."""
        return self._in

    def notify(self) -> None:
        # Full of notifications that nobody has taken: one is as good as many.
        with contextlib.suppress(BlockingIOError):
            os.write(self._out, b"\1")

    def clear(self) -> None:
        """Take the notifications that have come."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._in, PAGE):
                pass

    def wait(self, seconds: float = PATIENCE) -> bool:
        """Wait for a notification and take it; whether one came in time."""
        poll = select.poll()
        poll.register(self._in, select.POLLIN)
        came = bool(poll.poll(seconds * 1000))
        self.clear()
        return came

    def close(self) -> None:
        """The guest has closed its port: the backend can bind it no more."""
        os.close(self._out)
        os.close(self._in)
        for path in self._paths:
            path.unlink(missing_ok=True)


class Domain:
    """One guest: its pages, which of them are granted to the backend, and its ports. Thread-safe.

    Pages are given out in an order that leaves no two neighbours together, as a guest's machine pages are.
    """

    def __init__(self, folder: Path, number: int, pages: int, references: int) -> None:
        self.number = number
        self._base = folder / f"domain-{number}"
        self._lock = threading.Lock()
        self.memory = self._mapped(".memory", pages * PAGE)
        self._grants = self._mapped(".grants", references * _WORD_BYTES)
        self.words = memoryview(self.memory).cast("I")
        self._entries = memoryview(self._grants).cast("I")
        self._free_pages = [*range(0, pages, 2), *range(1, pages, 2)]
        self._free_references = list(range(references - 1, _FIRST_REFERENCE - 1, -1))
        self._ports: list[Port] = []
        self._port_numbers = itertools.count(1)

    def _mapped(self, suffix: str, size: int) -> mmap.mmap:
        # A new file each time: whoever still has the one of an earlier guest mapped keeps it whole.
        descriptor = os.open(f"{self._base}{suffix}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size)
            return mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)

    def allocate(self, count: int = 1) -> list[int]:
        """The numbers of free pages, which are zero."""
        with self._lock:
            if count > len(self._free_pages):
                raise MemoryError(
                    f"domain {self.number} has {len(self._free_pages)} free pages, {count} were asked for"
                )
            pages, self._free_pages = self._free_pages[:count], self._free_pages[count:]
        for page in pages:
            self.write_page(page, bytes(PAGE))
        return pages

    def free(self, pages: Sequence[int]) -> None:
        with self._lock:
            self._free_pages += pages

    def read_page(self, page: int, offset: int = 0, length: int | None = None) -> bytes:
        """Bytes of a page, to its end unless `length` says less."""
        end = PAGE if length is None else offset + length
        return self.memory[page * PAGE + offset : page * PAGE + end]

    def write_page(self, page: int, data: bytes, offset: int = 0) -> None:
        self.memory[page * PAGE + offset : page * PAGE + offset + len(data)] = data

    @property
    def references(self) -> int:
        """The size of the grant table."""
        return len(self._entries)

    def grant(self, page: int, *, readonly: bool = False) -> int:
        """Let the backend have a page; its reference. The page need not exist: a guest may write anything there."""
        with self._lock:
            reference = self._free_references.pop()
        self.set_grant(reference, page << 2 | readonly << 1 | 1)
        return reference

    def set_grant(self, reference: int, entry: int) -> None:
        """Write an entry of the grant table, whatever it means."""
        self._entries[reference] = entry

    def revoke(self, *references: int) -> None:
        """Take grants back; the references may be used again."""
        for reference in references:
            self._entries[reference] = 0
        with self._lock:
            self._free_references += references

    def port(self) -> Port:
        """A new event channel to the backend."""
        port = Port(self._base, next(self._port_numbers))
        self._ports.append(port)
        return port

    def close_port(self, port: Port) -> None:
        self._ports.remove(port)
        port.close()

    def close(self) -> None:
        """The guest is destroyed."""
        for port in self._ports:
            port.close()
        self._ports.clear()
        self.words.release()
        self._entries.release()
        self.memory.close()
        self._grants.close()
        for suffix in (".memory", ".grants"):
            Path(f"{self._base}{suffix}").unlink(missing_ok=True)


class Machine:
    """The directory, and the domains that this process plays."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._domains: dict[int, Domain] = {}

    def domain(self, number: int, pages: int = 1024, references: int = 2048) -> Domain:
        """The domain of that number, made with so many pages and references if it is not there yet."""
        if number not in self._domains:
            self._domains[number] = Domain(self.directory, number, pages, references)
        return self._domains[number]

    def destroy(self, number: int) -> None:
        """End a domain as a kill does: its memory, grants and ports are gone."""
        self._domains.pop(number).close()

    def close(self) -> None:
        for number in list(self._domains):
            self.destroy(number)

    def __iter__(self) -> Iterator[Domain]:
        return iter(self._domains.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

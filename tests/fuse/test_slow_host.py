"""Mounts of an image on a host that answers when it is told to: reads wait for it side by side, and `ls` does not."""

from __future__ import annotations

import mmap
import os
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from tests.fuse.conftest import Mounts, wait_for
from tests.fuse.slow_host import ENDS, MIB, SIZE, RunningHost, content, slow_host

#: More than a mount has threads that read the connection. The host, a FUSE file system, takes 12 at once.
READS = 10
LENGTH = 4096


def read(descriptor: int, offset: int) -> bytes:
    """Past the page cache, in pages of its own."""
    with mmap.mmap(-1, LENGTH) as page:
        assert os.preadv(descriptor, [page], offset) == LENGTH
        return page[:]


def begin_reads(pool: ThreadPoolExecutor, host: RunningHost, descriptor: int) -> dict[int, Future[bytes]]:
    """Reads that all wait at the host when this returns, by their offsets."""
    offsets = [ENDS + (1 + 3 * number) * MIB for number in range(READS)]
    begun = {offset: pool.submit(read, descriptor, offset) for offset in offsets}
    for _ in offsets:
        host.wait_for_line()
    return begun


def test_reads_wait_side_by_side_and_ls_does_not(mounts: Mounts) -> None:
    with slow_host(mounts.directory()) as host:
        directory = mounts.mount(host.file, "-f", "raw")
        descriptor = os.open(directory / "disk", os.O_RDONLY | os.O_DIRECT)
        with ThreadPoolExecutor(READS) as pool:
            try:
                begun = begin_reads(pool, host, descriptor)
                assert {"disk", "info.json"} <= set(os.listdir(directory))
                assert (directory / "disk").stat().st_size == SIZE
                assert str(SIZE) in (directory / "info.json").read_text()
                assert read(descriptor, 0) == content(0, LENGTH)  # what the host answers at once
                assert not any(future.done() for future in begun.values())
            finally:
                host.release()
            assert {offset: future.result() for offset, future in begun.items()} == {
                offset: content(offset, LENGTH) for offset in begun
            }
        os.close(descriptor)
        mounts.umount(directory)


def test_a_mount_that_is_forced_away_ends_when_the_host_answers(mounts: Mounts) -> None:
    """What waits fails for its readers at once, and the server ends as soon as the host lets it."""
    with slow_host(mounts.directory()) as host:
        directory = mounts.mount(host.file, "-f", "raw")
        (pid,) = mounts.processes()
        descriptor = os.open(directory / "disk", os.O_RDONLY | os.O_DIRECT)
        with ThreadPoolExecutor(READS) as pool:
            try:
                begun = begin_reads(pool, host, descriptor)
                # It stays in use, so this only ends its connection.
                subprocess.run(["umount", "-f", directory], check=False, capture_output=True)
                errors = [future.exception() for future in begun.values()]
                assert mounts.processes() == [pid]
            finally:
                host.release()
        assert all(isinstance(error, OSError) for error in errors)
        with suppress(OSError):
            os.close(descriptor)
        wait_for(lambda: not mounts.processes())
        assert mounts.processes() == []
        mounts.run("umount", directory)

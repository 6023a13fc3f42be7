"""The program that the crash test of live commits runs under strace: it commits an overlay while it writes it.

usage: live_commit.py OVERLAY FORMAT BASE_FORMAT MARKS SEED. MARKS holds in its first byte how many flushes have
returned, and 255 once the base is the whole disk.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator

from tapfs.disk.chain import OpenOptions
from tapfs.disk.opening import open_image
from tapfs.jobs.live_commit import LiveCommit

SIZE = 1 << 20
ROUNDS = 3
COMPLETE = 255


def writes(seed: str) -> Iterator[list[tuple[int, bytes]]]:
    """What the guest writes in each round, before a flush: offsets, and bytes that are zeros now and then."""
    choice = random.Random(seed)
    for _ in range(ROUNDS):
        found: list[tuple[int, bytes]] = []
        for _ in range(12):
            offset = choice.randrange(SIZE // 512) * 512
            length = min(choice.choice([512, 4096, 40960]), SIZE - offset)
            found.append((offset, bytes(length) if choice.random() < 0.3 else choice.randbytes(8) * (length // 8)))
        yield found


def main() -> None:
    path, over_format, base_format, marks_path, seed = sys.argv[1:]
    marks = os.open(marks_path, os.O_WRONLY)

    def mark(value: int) -> None:
        os.pwrite(marks, bytes([value]), 0)
        os.fdatasync(marks)

    options = OpenOptions(format=over_format, writable=True, backing_formats=[base_format])
    image = open_image(path, options)
    commit = LiveCommit()
    served = commit.begin(image)
    image.abandon()
    for number, some in enumerate(writes(seed), start=1):
        for offset, data in some[:6]:
            served.write(offset, data)
        commit.run()
        for offset, data in some[6:]:
            served.write_zeroes(offset, len(data)) if not any(data) else served.write(offset, data)
        if number < ROUNDS:
            served.flush()
            mark(number)
    done = commit.complete()
    mark(COMPLETE)
    done.abandon()
    commit.close()


if __name__ == "__main__":
    main()

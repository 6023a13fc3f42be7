"""`python -m tests.bench.random_reads IMAGE COUNT STEP LAYERS`: reads of 4 KiB, each STEP bytes after the one before.

The offsets wrap at the end of the disk, as those of `qemu-img bench -s 4096 -S STEP` do. A step that has nothing to do
with the size of the disk goes all over it.
"""

from __future__ import annotations

import sys

import tapfs

BLOCK = 4096


def main() -> int:
    """Read, in one thread."""
    image, count, step, layers = sys.argv[1], *map(int, sys.argv[2:5])
    buffer = bytearray(BLOCK)
    with tapfs.open(image, format="qcow", backing_formats=["qcow"] * (layers - 1)) as disk:
        end, offset = disk.size - BLOCK, 0
        for _ in range(count):
            disk.read_into(offset, buffer)
            offset = (offset + step) % end
    return 0


if __name__ == "__main__":
    sys.exit(main())

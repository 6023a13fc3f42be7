"""The program that the crash test runs under strace: seeded writes, zeroes, discards, flushes.

usage: writer.py IMAGE MARKS SEED STEPS FORMAT. Each step is announced in MARKS before it begins
("write OFFSET LENGTH BYTE", "zero …", "discard …", "flush") and "acknowledged" follows a flush.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import tapfs

SECTOR = 512


def main() -> None:
    image, marks, seed, steps, format_name = sys.argv[1:]
    generator = random.Random(int(seed))
    with Path(marks).open("w", buffering=1) as log, tapfs.open(image, format=format_name, writable=True) as disk:
        sectors = disk.size // SECTOR
        for number in range(int(steps)):
            kind = generator.choices(("write", "zero", "discard", "flush"), (12, 2, 2, 3))[0]
            first = generator.randrange(generator.choice((sectors, sectors // 8)))
            count = min(sectors - first, generator.choice((1, 1, 2, 8, 9, 40, 300)))
            where = (first * SECTOR, count * SECTOR)
            byte = 1 + number % 255
            log.write(f"{kind} {where[0]} {where[1]} {byte}\n")
            if kind == "write":
                disk.write(where[0], bytes([byte]) * where[1])
            elif kind == "zero":
                disk.write_zeroes(*where)
            elif kind == "discard":
                disk.discard(*where)
            else:
                disk.flush()
                log.write("acknowledged\n")


if __name__ == "__main__":
    main()

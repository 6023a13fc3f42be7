"""Fragmented qcow images, written by bytes: a few of their clusters, allocated in random order, as guests do it.

Two million clusters take seconds: each table is one write, and data is left as holes of the host file.
"""

from __future__ import annotations

import os
import random
import struct
import sys
from array import array
from collections.abc import Iterable
from pathlib import Path

MAGIC = 0x514649FB
L1_AT = 48


def scattered_qcow(
    path: Path,
    size: int,
    clusters: int | Iterable[int],
    *,
    cluster_bits: int = 12,
    data: bool = False,
    seed: int = 1,
    backing: str = "",
    tables_first: bool = False,
) -> None:
    """A qcow image of `size` bytes with so many clusters, or with these, in the order of their allocation.

    With `data` each allocated cluster begins with `seed` and its own number; without, it is a hole of the host file.
    `backing` names the parent. `tables_first`: the tables lie together, in the order of the disk.
    """
    cluster, l2_bits = 1 << cluster_bits, cluster_bits - 3
    count, per_table = size >> cluster_bits, 1 << l2_bits
    chosen = random.Random(seed).sample(range(count), clusters) if isinstance(clusters, int) else list(clusters)
    l1 = array("Q", bytes(8 * -(-count // per_table)))
    tables: dict[int, array[int]] = {}
    name = os.fsencode(backing)
    name_at = L1_AT + 8 * len(l1)
    end = -(-(name_at + len(name)) // cluster) * cluster
    for index in range(len(l1)) if tables_first else ():
        l1[index], tables[index] = end, array("Q", bytes(8 * per_table))
        end += cluster
    for number in chosen:
        index = number >> l2_bits
        table = tables.get(index)
        if table is None:
            l1[index], tables[index] = end, (table := array("Q", bytes(8 * per_table)))
            end += cluster
        table[number & (per_table - 1)] = end
        end += cluster
    head = struct.pack(
        *(">IIQIIQBBHIQ", MAGIC, 1, name_at if name else 0, len(name), 0, size, cluster_bits, l2_bits, 0, 0, L1_AT)
    )
    with path.open("wb") as file:
        file.truncate(end)
        file.write(head + big_endian(l1) + name)
        for index, entries in tables.items():
            file.seek(l1[index])
            file.write(big_endian(entries))
        filling = bytes(range(1, 256)) * (cluster // 255 + 1)
        for number in chosen if data else ():
            file.seek(tables[number >> l2_bits][number & (per_table - 1)])
            file.write(struct.pack(">QQ", seed, number) + filling[: cluster - 16])


def big_endian(entries: array[int]) -> bytes:
    copy = entries[:]
    if sys.byteorder == "little":
        copy.byteswap()
    return copy.tobytes()

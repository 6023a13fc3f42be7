"""Fragmented qcow2 images, written by bytes: clusters in any order of allocation, with true refcounts.

Millions of clusters take seconds: tables are written by pieces of 4 KiB, and those of zeros stay holes of the file.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable
from pathlib import Path

from tests.scattered_images import big_endian

MAGIC = 0x514649FB
COPIED = 1 << 63
#: Entries of a piece of an L2 table: 4 KiB.
PIECE_BITS = 9


def stepped(count: int, clusters: int) -> Iterable[int]:
    """`count` of so many clusters (a power of two), each once and far from the one before, without a list of them."""
    step = int(clusters * 0.6180339887) | 1
    return (number * step & clusters - 1 for number in range(count))


def scattered_qcow2(
    path: Path, size: int, chosen: Iterable[int], *, cluster_bits: int = 16, data: bool = False
) -> None:
    """A qcow2 image of `size` bytes with these clusters, in the order of their allocation, each with refcount 1.

    The header, the refcount table, its blocks, the L1 table and the L2 tables lie before the data. With `data` each
    cluster begins with its own number; without, it is a hole of the host file.
    """
    cluster, table_bits = 1 << cluster_bits, cluster_bits - 3
    tables = -(-size >> cluster_bits + table_bits)
    pieces: dict[int, array[int]] = {}
    places: list[tuple[int, int]] = []
    order = array("Q", chosen)
    l1_clusters = -(-8 * tables // cluster)
    # Blocks count clusters by 16 bits, themselves too.
    counted = 1 + l1_clusters + tables + len(order)
    per_block = cluster // 2
    blocks = -(-counted // (per_block - 1)) + 1
    table_clusters = -(-8 * blocks // cluster)
    l1_at = (1 + table_clusters + blocks) * cluster
    l2_at = l1_at + l1_clusters * cluster
    data_at = l2_at + tables * cluster
    end = data_at + len(order) * cluster
    for index, number in enumerate(order):
        piece = pieces.get(number >> PIECE_BITS)
        if piece is None:
            piece = pieces[number >> PIECE_BITS] = array("Q", bytes(8 << PIECE_BITS))
        piece[number & (1 << PIECE_BITS) - 1] = data_at + index * cluster | COPIED
        if data:
            places.append((data_at + index * cluster, number))
    header = struct.pack(">IIQIIQIIQQIIQQQQII", MAGIC, 3, 0, 0, cluster_bits, size, 0, tables, l1_at, cluster,
                         table_clusters, 0, 0, 0, 0, 0, 4, 104)  # fmt: skip
    with path.open("wb") as file:
        file.truncate(end)
        file.write(header)
        file.seek(cluster)
        file.write(big_endian(array("Q", ((1 + table_clusters + block) * cluster for block in range(blocks)))))
        file.seek((1 + table_clusters) * cluster)
        file.write(b"\0\1" * (end // cluster))
        file.seek(l1_at)
        file.write(big_endian(array("Q", (l2_at + table * cluster | COPIED for table in range(tables)))))
        for number, piece in pieces.items():
            file.seek(l2_at + (number << PIECE_BITS + 3))
            file.write(big_endian(piece))
        for place, number in places:
            file.seek(place)
            file.write(number.to_bytes(8, "big") + b"scattered " * ((cluster - 8) // 10))

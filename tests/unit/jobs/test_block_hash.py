"""The block hash: a second reading of docs/specs/blkhash.md agrees, whatever the format and the holes."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

import tapfs
from tapfs.jobs.block_hash import BLOCK_BYTES, block_hash

KIB = 1024


def second(data: bytes, algorithm: str = "sha256") -> str:
    """As the construction is written down, without any shortcut."""
    blocks = [data[at : at + 65536] for at in range(0, len(data), 65536)]
    joined = b"".join(hashlib.new(algorithm, block).digest() for block in blocks)
    return hashlib.new(algorithm, joined + len(data).to_bytes(8, "little")).hexdigest()


def test_the_empty_message_and_one_block_by_hand() -> None:
    assert second(b"") == hashlib.sha256(bytes(8)).hexdigest()
    one = hashlib.sha256(hashlib.sha256(b"x").digest() + b"\1" + bytes(7)).hexdigest()
    assert second(b"x") == one


@pytest.mark.parametrize("format_name", ["raw", "qcow2", "vmdk"])
def test_it_agrees_for_data_zeros_and_holes(format_name: str, tmp_path: Path) -> None:
    size = 9 * BLOCK_BYTES * 40 + 5 * KIB  # not a whole number of blocks
    content = bytearray(size)
    choice = random.Random(format_name)
    for _ in range(12):
        at = choice.randrange(size - 1)
        piece = choice.randbytes(choice.choice((1, 700, 3 * BLOCK_BYTES)))[: size - at]
        content[at : at + len(piece)] = piece
    raw, path = tmp_path / "d.raw", tmp_path / f"d.{format_name}.img"
    raw.write_bytes(content)
    tapfs.convert(raw, path, format="raw", target_format=format_name)
    with tapfs.open(path, format=format_name) as disk:
        assert disk.size == size
        assert block_hash(disk) == second(bytes(content))
        assert block_hash(disk, algorithm="blake2b") == second(bytes(content), "blake2b")


def test_a_huge_hole_costs_nothing_but_its_digests(tmp_path: Path) -> None:
    path = tmp_path / "huge.raw"
    with path.open("wb") as file:
        file.write(b"a")
        file.truncate(64 << 30)
    steps: list[int] = []
    with tapfs.open(path, format="raw") as disk:
        found = block_hash(disk, progress=lambda done, _: steps.append(done))
    outer = hashlib.sha256(hashlib.sha256(b"a" + bytes(65535)).digest())
    outer.update(hashlib.sha256(bytes(65536)).digest() * ((64 << 30) // 65536 - 1))
    outer.update((64 << 30).to_bytes(8, "little"))
    assert found == outer.hexdigest()
    assert steps[-1] == 64 << 30

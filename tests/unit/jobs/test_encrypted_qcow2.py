"""Resize, commit, rebase, check and compact of qcow2 images with LUKS inside, over one another."""

from __future__ import annotations

from pathlib import Path

import pytest

import tapfs
from tapfs.errors import ErrorKind, ImageError

MIB = 1 << 20
PASSWORD = b"a password"
FAST = {"encrypt.format": "luks", "encrypt.iter-time": "10"}


def sound(path: Path) -> None:
    report = tapfs.check(path)
    assert (report.corruptions, report.leaks) == (0, 0)


def content(path: Path, **options: object) -> bytes:
    with tapfs.open(path, password=PASSWORD, **options) as disk:  # type: ignore[arg-type]  # by name
        return disk.read(0, disk.size)


def test_edits_of_a_chain(tmp_path: Path) -> None:
    base, top, other = (tmp_path / name for name in ("base.qcow2", "top.qcow2", "other.qcow2"))
    tapfs.create(base, "qcow2", MIB, options=FAST, password=PASSWORD)
    with tapfs.open(base, writable=True, password=PASSWORD) as disk:
        disk.write(0, b"base" * (MIB // 8))
    tapfs.create(top, "qcow2", backing=str(base), backing_format="qcow2", options=FAST, password=PASSWORD)
    with tapfs.open(top, writable=True, password=PASSWORD) as disk:
        disk.write(100_000, b"top!" * 50_000)
    expected = content(top)
    assert expected[:4] == b"base"

    tapfs.resize(top, 250_368, password=PASSWORD, shrink=True)
    tapfs.resize(top, MIB, password=PASSWORD)
    expected = expected[:250_368].ljust(MIB, b"\0")
    assert content(top) == expected
    sound(top)
    with pytest.raises(ImageError) as refused:
        tapfs.resize(top, 2 * MIB, password=PASSWORD, preallocation="metadata")
    assert refused.value.kind is ErrorKind.UNSUPPORTED

    tapfs.convert(base, other, target_format="qcow2", password=PASSWORD)  # not encrypted
    with tapfs.open(other, writable=True) as disk:
        disk.write(500_000, b"other" * 10)
    tapfs.rebase(top, str(other), new_formats=["qcow2"], password=PASSWORD)
    tapfs.rebase(top, str(base), new_formats=["qcow2"], password=PASSWORD)
    assert content(top) == expected
    sound(top)

    with tapfs.open(top, writable=True, password=PASSWORD) as disk:
        disk.discard(131_072, 65_536)
        expected = disk.read(0, disk.size)
    tapfs.compact(top, password=PASSWORD)
    assert content(top) == expected
    tapfs.commit(top, password=PASSWORD)
    assert content(base) == expected
    sound(base)
    sound(top)


def test_a_key_on_which_qemu_aborts_is_refused(tmp_path: Path) -> None:
    """Of 24 bytes the stripes end inside a sector; an assertion of QEMU (7.2 to 11.1) ends it there."""
    options = {**FAST, "encrypt.cipher-alg": "aes-192"}
    with pytest.raises(ImageError, match="QEMU aborts"):
        tapfs.create(
            tmp_path / "a", "qcow2", 1 << 20, password=PASSWORD, options={**options, "encrypt.cipher-mode": "cbc"}
        )
    tapfs.create(tmp_path / "a", "qcow2", 1 << 20, password=PASSWORD, options=options)

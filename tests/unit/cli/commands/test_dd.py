"""`tapfs dd`: a part of a disk becomes an image, counted as dd(1) counts."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as api

Run = Callable[..., Any]
MIB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> bytes:
    """The contents of a.qcow2 in `tmp_path`: data, holes, zeros inside data."""
    content = bytearray(3 * MIB)
    content[:5000] = random.Random(1).randbytes(5000)
    content[MIB : MIB + 200_000] = b"text " * 40_000
    content[-512:] = b"e" * 512
    (tmp_path / "a.raw").write_bytes(content)
    api.convert(tmp_path / "a.raw", tmp_path / "a.qcow2", format="raw", target_format="qcow2")
    return bytes(content)


@pytest.mark.parametrize(
    "words",
    [
        ("count=3",),
        ("bs=1k", "skip=1000"),
        ("bs=4096", "count=40", "skip=250"),
        ("bs=3000", "count=2", "skip=1"),
        ("bs=1M", "count=10", "skip=2"),
        ("skip=6144",),
        ("bs=16", "count=0"),
    ],
)
@pytest.mark.usefixtures("disk")
def test_it_copies_what_dd_copies(words: tuple[str, ...], tapfs: Run, tmp_path: Path) -> None:
    assert tapfs("dd", f"if={tmp_path / 'a.qcow2'}", f"of={tmp_path / 'b'}", *words).code == 0
    command = ["dd", f"if={tmp_path / 'a.raw'}", "status=none", *words]
    wanted = subprocess.run(command, capture_output=True, check=True).stdout
    assert (tmp_path / "b").read_bytes() == wanted


def test_the_input_may_be_cut_and_the_output_longer(disk: bytes, tapfs: Run, tmp_path: Path) -> None:
    words = (f"if={tmp_path / 'a.qcow2'}", f"of={tmp_path / 'b'}", "isize=4096", "skip=1", "osize=8K")
    assert tapfs("dd", "-f", "qcow2", *words).code == 0
    assert (tmp_path / "b").read_bytes() == (disk[512:4096]).ljust(8192, b"\0")


@pytest.mark.parametrize("compressed", [False, True])
def test_a_part_ends_where_it_ends_in_a_cluster_of_the_target(disk: bytes, tmp_path: Path, *, compressed: bool) -> None:
    target = tmp_path / "b.qcow2"
    api.convert(
        *(tmp_path / "a.qcow2", target),
        target_format="qcow2",
        offset=MIB + 100,
        length=70_000,
        compressed=compressed,
    )
    with api.open(target) as image:
        assert image.read(0, image.size) == disk[MIB + 100 : MIB + 70_100].ljust(image.size, b"\0")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("if=a.qcow2",), "if=IMAGE and of=TARGET are needed"),
        (("if=a.qcow2", "of=b", "foo=1"), "'foo=1' is none of"),
        (("if=a.qcow2", "of=b", "count=x"), "must be a number of blocks"),
        (("if=a.qcow2", "of=b", "count=\u00b2"), "must be a number of blocks"),
        (("if=a.qcow2", "of=b", f"skip={'9' * 5000}"), "must be a number of blocks"),
        (("if=a.qcow2", "of=b", "bs=0"), "is no size of a block"),
        (("if=a.qcow2", "if=b", "of=c"), "if= is said twice"),
        (("if=a.qcow2", "of=b", "skip=7000"), "behind the end of the disk"),
        (("if=a.qcow2", "of=a.qcow2"), "is the source"),
    ],
)
@pytest.mark.usefixtures("disk")
def test_what_makes_no_sense_is_refused(
    words: tuple[str, ...], said: str, tapfs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = tapfs("dd", *words)
    assert refused.code in (64, 18)
    assert said in refused.err
    assert not (tmp_path / "b").exists()

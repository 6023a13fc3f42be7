"""VMware's .vmx: keys and values of lines as products and people write them, and lines of a stranger."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tapfs.packages.vmx import read_vmx


def names(line: bytes) -> list[str]:
    return [disk.name for disk in read_vmx(b'config.version = "8"\n' + line + b"\n").disks]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (b'"a b.vmdk"', "a b.vmdk"),
        (b'"a.vmdk" # the disk', "a.vmdk"),
        (b'"a|22b|7C.vmdk"', 'a"b|.vmdk'),
        (b'"a|b.vmdk"', "a|b.vmdk"),
        (b"a b.vmdk  # the disk", "a b.vmdk"),
        (b"disk#1.vmdk", "disk#1.vmdk"),
        (b"disk #1.vmdk", None),
        (b"a|23b.vmdk\t", "a#b.vmdk"),
    ],
)
def test_the_name_of_a_disk_has_quotes_or_none(value: bytes, name: str | None) -> None:
    assert names(b"scsi0:0.fileName = " + value) == ([] if name is None else [name])


@pytest.mark.parametrize("encoding", [b'"windows-1252"', b"windows-1252", b"windows-1252 # of Windows"])
def test_the_encoding_has_quotes_or_none(encoding: bytes) -> None:
    assert names(b".encoding = " + encoding + b'\nscsi0:0.fileName = "\xfc.vmdk"') == ["ü.vmdk"]


@pytest.mark.parametrize(
    "line",
    [
        b'ide0:0.fileName = "' + b"|41" * 20_000,
        b"ide0:0.fileName = " + b"a " * 30_000 + b'"',
        b"ide0:0.fileName = a" + b" " * 60_000 + b'"',
        b"a" * 60_000,
        b"\n" * 300_000,
    ],
    ids=["escapes", "words", "blanks", "key", "lines"],
)
def test_a_line_of_a_stranger_takes_no_time(line: bytes) -> None:
    """Another process reads the line, because nothing but its end ends a regular expression."""
    code = "import sys; from tapfs.packages.vmx import read_vmx; read_vmx(sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-c", code], input=line, check=True, timeout=10)

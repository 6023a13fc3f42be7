"""Copies that are read back: what the host's disk spoils is an error, and a new image that is spoiled has no name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as api
from tests.conftest import Ran

Run = Callable[..., Ran]


def _spoil(at: int) -> Callable[..., None]:
    """A host whose disk has other bytes than were written, which shows once the cache is dropped."""

    def fadvise(descriptor: int, _start: int, _length: int, _advice: int) -> None:
        os.pwrite(descriptor, bytes([os.pread(descriptor, 1, at)[0] ^ 1]), at)

    return fadvise


@pytest.mark.parametrize("options", [("-O", "raw"), ("-O", "qcow2", "-c"), ("-O", "vmdk"), ("-n", "-O", "raw")])
def test_a_verified_copy_that_the_disk_spoils_is_an_error(
    tapfs: Run, tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    target = tmp_path / "target"
    there = "-n" in options
    if there:
        target.write_bytes(bytes(sample.stat().st_size))
    words = ("convert", "--verify", "-f", "raw", *options, sample, target)
    assert tapfs(*words).code == 0
    assert tapfs("compare", "-f", "raw", *(("-F", "raw") if "raw" in options else ()), sample, target).code == 0
    before = target.read_bytes()
    with api.open(target, format=options[options.index("-O") + 1]) as disk:
        at = next(each.host_offset for each in disk.extents() if each.host_offset)
    monkeypatch.setattr(os, "posix_fadvise", _spoil(at))
    ran = tapfs(*words)
    assert ran.code in ({2, 10} if "-c" in options else {10}), ran
    if not there:  # the old one stays
        assert target.read_bytes() == before
        assert list(tmp_path.iterdir()) == [target]


def test_what_is_piped_cannot_be_verified(tapfs: Run, sample: Path) -> None:
    assert tapfs("convert", "--verify", "-f", "raw", sample, "-").code == 64


def test_copies_of_every_kind_are_verified(tmp_path: Path, sample: Path) -> None:
    parent = tmp_path / "parent.raw"
    parent.write_bytes(b"parent" * 100000)
    api.convert(
        sample,
        tmp_path / "over",
        format="raw",
        target_format="qcow2",
        backing=str(parent),
        backing_format="raw",
        verify=True,
    )
    api.convert(sample, tmp_path / "locked", format="raw", target_format="qcow", target_password=b"secret", verify=True)
    api.convert(
        sample,
        tmp_path / "many.vmdk",
        format="raw",
        target_format="vmdk",
        options={"subformat": "monolithicFlat"},
        verify=True,
    )
    api.convert(sample, tmp_path / "many.vmdk", format="raw", target_format="vmdk", create=False, verify=True)
    assert api.compare(sample, tmp_path / "many.vmdk", left_format="raw") is None

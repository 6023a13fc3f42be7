"""Scratch files: what a check of a large image is sorted in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tapfs
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats import claims
from tapfs.formats.qcow import survey
from tapfs.host import scratch
from tapfs.host.scratch import ScratchFile

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image with more claims than a check is allowed to hold, and too large for the quick pass before it."""
    monkeypatch.setattr(survey, "MAX_CLUSTERS", 0)
    path = tmp_path / "a.qcow"
    tapfs.create(str(path), "qcow", 32 * MIB)
    with tapfs.open(path, writable=True) as disk:
        for at in range(0, 32 * MIB, 64 << 10):
            disk.write(at, b"data")
    return path


def test_what_is_put_in_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    file = ScratchFile()
    file.append(b"abc")
    file.append(b"")
    file.append(b"defg")
    assert (file.read(0, 100), file.read(2, 3), file.read(7, 1)) == (b"abcdefg", b"cde", b"")
    assert os.listdir(tmp_path) == []
    file.close()
    file.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_check_of_many_claims(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tapfs.check(image)
    monkeypatch.setattr(claims, "MAX_HELD", 16)
    before = len(os.listdir("/proc/self/fd"))
    assert tapfs.check(image) == whole
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_place_for_it(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere/at/all")
    assert not tapfs.check(image).corruptions, "none is needed"
    monkeypatch.setattr(claims, "MAX_HELD", 16)
    with pytest.raises(ImageError, match=r"^/nowhere/at/all: cannot make a scratch file: No such file") as raised:
        tapfs.check(image)
    assert raised.value.kind is ErrorKind.NOT_FOUND


def test_a_tmpdir_is_taken_at_its_word(tmp_path: Path, sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may name a disk that is encrypted, so no other folder will do; without it any of two will."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    with pytest.raises(ImageError, match=r"missing: cannot make a temporary overlay: .*; TMPDIR names this folder"):
        tapfs.open(sample, format="raw", temporary=True)
    monkeypatch.delenv("TMPDIR")
    monkeypatch.setattr(scratch, "_FOLDERS", (str(tmp_path / "none"), str(tmp_path)))
    tapfs.open(sample, format="raw", temporary=True).close()
    monkeypatch.setattr(scratch, "_FOLDERS", (str(tmp_path / "none"), str(tmp_path / "neither")))
    with pytest.raises(ImageError) as raised:
        tapfs.open(sample, format="raw", temporary=True)
    assert "TMPDIR" not in str(raised.value)


def test_a_full_disk(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "full")

    monkeypatch.setattr(claims, "MAX_HELD", 16)
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(
        ImageError, match="cannot write to a scratch file: No space left on device; set TMPDIR"
    ) as raised:
        tapfs.check(image)
    assert raised.value.kind is ErrorKind.NO_SPACE

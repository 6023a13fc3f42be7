"""Differences: what they say is what a model says, and what is applied is the new disk, or nothing at all."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

import tapfs as api
from tapfs import ErrorKind, ImageError
from tapfs.jobs.apply import apply_in_place
from tapfs.jobs.diff_stream import DiffReader, DiffWriter, Record, RecordKind, StreamHeader, digest_of

Run = Callable[..., Any]
MIB = 1 << 20
UNIT = 4096


def patched(content: bytes, choice: random.Random, changes: int) -> bytes:
    """Bytes with runs of noise, of zeros and of single bytes put over them."""
    result = bytearray(content)
    for _ in range(changes):
        at = choice.randrange(len(result))
        length = choice.choice((1, 512, UNIT, 70000))
        data = choice.choice((choice.randbytes(length), bytes(length)))[: len(result) - at]
        result[at : at + len(data)] = data
    return bytes(result)


def disk_of(size: int, choice: random.Random) -> bytes:
    return patched(bytes(size), choice, 12)


def make(path: Path, content: bytes, format_name: str, **new: Any) -> Path:
    api.create(path, format_name, len(content), **new)
    with api.open(path, format=format_name, writable=True) as image:
        below = image.read(0, image.size)
        for at in range(0, len(content), UNIT):
            if content[at : at + UNIT] != below[at : at + UNIT]:
                image.write(at, content[at : at + UNIT])
    return path


def content_of(path: Path, format_name: str | None = None) -> bytes:
    with api.open(path, format=format_name) as image:
        return image.read(0, image.size)


def model_of(old: bytes, new: bytes) -> list[tuple[int, int, bool]]:
    """The ranges that differ, as changed_extents has them."""
    found: list[tuple[int, int, bool]] = []
    for at in range(0, len(new), UNIT):
        unit = new[at : at + UNIT]
        if unit == old[at : at + len(unit)].ljust(len(unit), b"\0"):
            continue
        zero = not any(unit)
        if found and found[-1][0] + found[-1][1] == at and found[-1][2] == zero:
            found[-1] = (found[-1][0], found[-1][1] + len(unit), zero)
        else:
            found.append((at, len(unit), zero))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_any_two_disks(tmp_path: Path, seed: int) -> None:
    choice = random.Random(seed)
    size = choice.choice((3 * MIB, 5 * MIB + 512, 700))
    old = disk_of(size, choice)
    new = patched(old, choice, 9)
    if choice.random() < 0.5:
        new = (
            new[: choice.randrange(1, len(new))] if choice.random() < 0.5 else new + choice.randbytes(MIB // 512 * 512)
        )
    formats = ["raw", "qcow2", "vmdk" if size % 512 == 0 and len(new) % 512 == 0 else "raw"]
    old_format, new_format, target_format = (
        choice.choice(formats[:2]),
        choice.choice(formats),
        choice.choice(formats[:2]),
    )
    if len(new) % 512 or size % 512:
        old_format = new_format = target_format = "raw"
    a, b = make(tmp_path / "old", old, old_format), make(tmp_path / "new", new, new_format)
    assert list(api.diff(a, b, old_format=old_format, new_format=new_format)) == model_of(old, new)
    for proof in ("none", "sample", "all"):
        kind: Literal["none", "sample", "all"] = proof  # type: ignore[assignment]
        stream = tmp_path / f"{proof}.diff"
        report = api.write_diff(a, b, stream, old_format=old_format, new_format=new_format, proof=kind)
        assert report.stream_bytes == stream.stat().st_size
        # The base need be no file that the difference was made of, only such a disk.
        base = make(tmp_path / f"base.{proof}", old, "raw")
        checked = api.apply(base, stream, format="raw", dry_run=True)
        applied = api.apply(base, stream, tmp_path / f"{proof}.new", format="raw", target_format=target_format)
        assert applied == checked
        assert content_of(tmp_path / f"{proof}.new", target_format) == new
        if proof == "all":
            assert applied.data_bytes + applied.zero_bytes + applied.proved_bytes == max(
                min(len(old), len(new)), sum(length for _, length, _ in model_of(old, new)) + applied.proved_bytes
            )
        if target_format == "qcow2":
            overlay = tmp_path / f"{proof}.overlay"
            api.apply(base, stream, overlay, format="raw", target_format="qcow2", overlay=True)
            assert content_of(overlay) == new
            overlay.unlink()  # or its base is not written
        if len(new) == len(old):
            api.apply(base, stream, format="raw")
            assert content_of(base, "raw") == new
            api.apply(base, stream, format="raw")  # once more: all of it is there already
            assert content_of(base, "raw") == new


def bytes_read(image: api.Image) -> int:
    return image.statistics().bytes_read


def test_what_both_have_from_one_place_is_not_read(tmp_path: Path) -> None:
    choice = random.Random(1)
    old = choice.randbytes(8 * MIB)
    base = make(tmp_path / "base.qcow2", old, "qcow2")
    middle = make(tmp_path / "middle.qcow2", old, "qcow2", backing="base.qcow2", backing_format="qcow2")
    new = bytearray(old)
    new[3 * MIB + 5] ^= 1
    top = make(tmp_path / "top.qcow2", bytes(new), "qcow2", backing="middle.qcow2", backing_format="qcow2")
    changed = [(3 * MIB, UNIT, False)]
    for below in (base, middle):
        for left, right in ((below, top), (top, below)):
            with api.open(left) as a, api.open(right) as b:
                assert list(api.diff(a, b)) == changed
                assert bytes_read(a) + bytes_read(b) == 2 * 65536
    with api.open(base) as a, api.open(middle) as b:
        assert list(api.diff(a, b)) == []
        assert bytes_read(a) + bytes_read(b) == 0


def test_snapshots_inside_an_image(tmp_path: Path) -> None:
    """A snapshot and the current disk are one image and two disks; what they share lies at one place of the file."""
    old = random.Random(2).randbytes(4 * MIB)
    path = make(tmp_path / "disk.qcow2", old, "qcow2")
    subprocess.run(["qemu-img", "snapshot", "-c", "monday", path], check=True)
    with api.open(path, writable=True) as image:
        image.write(MIB, b"changed")
    with api.open(path, snapshot="monday") as a, api.open(path) as b:
        assert list(api.diff(a, b)) == [(MIB, UNIT, False)]
        assert bytes_read(a) + bytes_read(b) == 2 * 65536
    with api.open(path, snapshot="monday") as a, api.open(path, snapshot="monday") as b:
        assert list(api.diff(a, b)) == []
        assert bytes_read(a) == 0


@pytest.fixture
def disks(tmp_path: Path) -> tuple[Path, Path, bytes, bytes]:
    """An old and a new raw disk, and what is in them."""
    choice = random.Random(7)
    old = choice.randbytes(MIB)
    new = bytearray(old)
    new[100:200] = b"n" * 100
    new[500 << 10 : 520 << 10] = bytes(20 << 10)
    new[900000] ^= 7
    (tmp_path / "old").write_bytes(old)
    (tmp_path / "new").write_bytes(new)
    return tmp_path / "old", tmp_path / "new", old, bytes(new)


def stream_of(old: Path, new: Path, proof: Literal["none", "sample", "all"] = "sample") -> bytes:
    file = io.BytesIO()
    api.write_diff(old, new, file, old_format="raw", new_format="raw", proof=proof)
    return file.getvalue()


def test_every_damage_is_refused_before_anything_changes(
    disks: tuple[Path, Path, bytes, bytes], tmp_path: Path
) -> None:
    old, new, content, _ = disks
    stream = stream_of(old, new)
    choice = random.Random(8)
    target = tmp_path / "target"
    cuts = [0, 7, 8, 63, 64, 100, 127, 128, *range(129, len(stream), 997), len(stream) - 1]
    flips = [*range(200), *choice.sample(range(len(stream)), 300), *range(len(stream) - 64, len(stream))]
    damaged = [stream[:at] for at in cuts]
    damaged += [stream[:at] + bytes([stream[at] ^ 1 << choice.randrange(8)]) + stream[at + 1 :] for at in flips]
    damaged += [stream + b"\0", stream + stream, stream[:64] + stream[-64:]]
    for each in damaged:
        with pytest.raises(ImageError) as caught:
            api.apply(old, io.BytesIO(each), format="raw")
        assert caught.value.kind in {ErrorKind.CORRUPT, ErrorKind.INVALID_FORMAT, ErrorKind.UNSUPPORTED}
        assert old.read_bytes() == content
    for each in damaged[:: len(damaged) // 20]:
        with pytest.raises(ImageError):
            api.apply(old, io.BytesIO(each), target, format="raw", target_format="raw")
        assert not target.exists()


def record(kind: RecordKind, offset: int, length: int, payload: bytes = b"") -> Record:
    return Record(kind, offset, length, bytes(16), digest_of(payload) if payload else bytes(16), payload)


@pytest.mark.parametrize(
    "records",
    [
        [record(RecordKind.DATA, MIB - 512, 1024, bytes(1024))],
        [record(RecordKind.DATA, 4096, 512, bytes(512)), record(RecordKind.DATA, 4096, 512, bytes(512))],
        [record(RecordKind.DATA, 8192, 512, bytes(512)), record(RecordKind.ZERO, 0, 512)],
        [record(RecordKind.DATA, 0, 1024, bytes(512))],
        [record(RecordKind.ZERO, 0, 512, bytes(512))],
        [record(RecordKind.ZERO, 0, 0)],
        [record(RecordKind.ZERO, 0, 1 << 63)],
        [record(RecordKind.KEEP, 0, 5 << 20)],
        [record(RecordKind.ZERO, (1 << 64) - 512, 512)],
        [record(7, 0, 512)],  # type: ignore[arg-type]
        [record(0, 0, 512)],  # type: ignore[arg-type]
    ],
)
def test_records_that_cannot_be(records: list[Record]) -> None:
    """Whole and with good checksums: somebody has written them so."""
    file = io.BytesIO()
    writer = DiffWriter(file, StreamHeader(MIB, MIB, UNIT))
    for each in records:
        writer.put(each)
    writer.finish()
    with pytest.raises(ImageError, match="a record is impossible"):
        list(DiffReader(io.BytesIO(file.getvalue()), None).records())


def test_another_base_is_refused(disks: tuple[Path, Path, bytes, bytes], tmp_path: Path) -> None:
    old, new, content, _ = disks
    (tmp_path / "other").write_bytes(random.Random(9).randbytes(MIB))
    changed = bytearray(content)
    changed[700000] ^= 1  # a byte that does not change
    (tmp_path / "almost").write_bytes(changed)
    (tmp_path / "longer").write_bytes(content + content)
    for name, proof in (("other", "sample"), ("almost", "all"), ("longer", "none")):
        kind: Literal["none", "sample", "all"] = proof  # type: ignore[assignment]
        stream = stream_of(old, new, kind)
        base = tmp_path / name
        before = base.read_bytes()
        for target in (None, tmp_path / "target"):
            with pytest.raises(ImageError) as caught:
                api.apply(base, io.BytesIO(stream), target, format="raw", target_format="raw")
            assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
            assert not (tmp_path / "target").exists()
        assert base.read_bytes() == before


class StoppedError(Exception):
    """The copy is cut off here."""


@pytest.mark.parametrize("after", range(4))
def test_a_cut_in_place_may_be_said_again(disks: tuple[Path, Path, bytes, bytes], after: int) -> None:
    old, new, _, wanted = disks
    stream = stream_of(old, new, "all")
    left = [after]

    def stop(_done: int, _total: int) -> None:
        if not left[0]:
            raise StoppedError
        left[0] -= 1

    with api.open(old, format="raw", writable=True) as base, pytest.raises(StoppedError):
        apply_in_place(base, lambda: io.BytesIO(stream), progress=stop)
    api.apply(old, io.BytesIO(stream), format="raw")
    assert old.read_bytes() == wanted


def test_a_torn_range_needs_to_be_resumed(disks: tuple[Path, Path, bytes, bytes], tapfs: Run, tmp_path: Path) -> None:
    old, new, content, wanted = disks
    (tmp_path / "stream").write_bytes(stream_of(old, new, "all"))
    half = bytearray(content)
    at = 500 << 10
    half[at : at + 3000] = wanted[at : at + 3000]
    old.write_bytes(half)
    ran = tapfs("apply", "--in-place", "-f", "raw", old, tmp_path / "stream")
    assert ran.code == 64
    assert "say --resume" in ran.err
    assert old.read_bytes() == half
    assert tapfs("apply", "--in-place", "--resume", "-f", "raw", old, tmp_path / "stream").code == 0
    assert old.read_bytes() == wanted


def test_the_command_line(disks: tuple[Path, Path, bytes, bytes], tapfs: Run, tmp_path: Path) -> None:
    old, new, content, wanted = disks
    ran = tapfs("diff", "-f", "raw", "-F", "raw", old, new)
    assert ran.code == 0
    assert ran.out.splitlines()[1].split() == ["0x0", "0x1000", "data"]
    assert "of zeros differ" in ran.out
    ran = tapfs("diff", "--json", "-f", "raw", "-F", "raw", old, new)
    assert json.loads(ran.out)["extents"][0] == {"offset": 0, "length": UNIT, "zero": False}
    stream = tmp_path / "stream"
    assert tapfs("diff", "--json", "-f", "raw", "-F", "raw", "-o", stream, old, new).code == 0
    ran = tapfs("diff", "-f", "raw", "-F", "raw", "-o", stream, old, new)
    assert ran.code == 18
    assert "--force" in ran.err
    assert tapfs("diff", "-f", "raw", "-F", "raw", "--force", "-o", stream, old, new).code == 0
    ran = tapfs("diff", "-f", "raw", "-F", "raw", "--force", "-o", old, old, new)
    assert ran.code == 18
    assert old.read_bytes() == content
    assert tapfs("apply", "--json", "-n", "-f", "raw", old, stream).code == 0
    assert tapfs("apply", "-f", "raw", "-O", "qcow2", old, stream, tmp_path / "n.qcow2").code == 0
    assert content_of(tmp_path / "n.qcow2") == wanted
    ran = tapfs("apply", "-f", "raw", old, old, tmp_path / "x")
    assert ran.code == 11
    for words in (
        ["-f", "raw", old, stream],
        ["--in-place", "-O", "raw", old, stream],
        ["--in-place", old, stream, "x"],
    ):
        assert tapfs("apply", *words).code == 64
    assert tapfs("apply", "-f", "raw", old, tmp_path / "missing", tmp_path / "x").code == 17
    assert not (tmp_path / "x").exists()


def test_a_pipe(disks: tuple[Path, Path, bytes, bytes], tapfs_command: list[str], tmp_path: Path) -> None:
    old, new, content, wanted = disks
    target = tmp_path / "target"
    writing = [*tapfs_command, "diff", "-f", "raw", "-F", "raw", "-o", "-", old, new]
    applying = [*tapfs_command, "apply", "-q", "-f", "raw", old, "-", target]
    with subprocess.Popen(writing, stdout=subprocess.PIPE) as diff:
        done = subprocess.run(applying, stdin=diff.stdout, check=False, capture_output=True)
    assert done.returncode == diff.returncode == 0, done.stderr
    assert target.read_bytes() == wanted
    with subprocess.Popen(["cat", tmp_path / "target"], stdout=subprocess.PIPE) as piped:
        ran = subprocess.run(
            [*tapfs_command, "apply", "--in-place", "-f", "raw", old, "-"],
            stdin=piped.stdout,
            check=False,
            capture_output=True,
            text=True,
        )
    assert ran.returncode == 12
    assert "read twice" in ran.stderr
    assert old.read_bytes() == content


def test_a_larger_disk_in_place(tmp_path: Path) -> None:
    old = random.Random(4).randbytes(MIB)
    new = old + b"more" * 128
    (tmp_path / "old").write_bytes(old)
    (tmp_path / "new").write_bytes(new)
    stream = stream_of(tmp_path / "old", tmp_path / "new")
    with pytest.raises(ImageError, match="resize it to 1049088 bytes first"):
        api.apply(tmp_path / "old", io.BytesIO(stream), format="raw")
    os.truncate(tmp_path / "old", len(new))
    api.apply(tmp_path / "old", io.BytesIO(stream), format="raw")
    assert (tmp_path / "old").read_bytes() == new

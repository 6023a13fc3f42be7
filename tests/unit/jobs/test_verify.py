"""Verification: what differs is found wherever it is, and damage is told from change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as api
from tests import package_files
from tests.conftest import Ran

Run = Callable[..., Ran]

_SIZE = (3 << 20) + 512


def _keep_time(path: Path, change: Callable[[], object]) -> None:
    """Change a file as decay does: its time stays."""
    status = path.stat()
    change()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0xFF]))


@pytest.fixture
def raw(sample: Path, tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(sample.read_bytes())
    return path


def test_a_disk_is_what_it_was_in_any_format(tapfs: Run, raw: Path, tmp_path: Path) -> None:
    assert tapfs("hash", "-f", "raw", raw).code == 0
    sidecar = tmp_path / "disk.raw.tapfs-hash"
    assert "as it was hashed" in tapfs("verify", "-f", "raw", raw).out
    roots = {json.loads(tapfs("hash", "--json", "--force", "-f", "raw", raw).out)["root"]}
    for name in ("qcow", "qcow2", "vmdk", "vhdx"):
        image = tmp_path / f"disk.{name}"
        api.convert(raw, image, format="raw", target_format=name)
        verified = tapfs("verify", "--json", image, sidecar)
        assert verified.code == 0, verified
        assert json.loads(verified.out)["untouched"] is False
        roots.add(json.loads(tapfs("hash", "--json", image).out)["root"])
    assert len(roots) == 1


@pytest.mark.parametrize("at", [0, 600 << 10, 1 << 20, _SIZE - 1])
def test_a_flipped_bit_is_damage_and_its_leaf_is_named(tapfs: Run, raw: Path, at: int) -> None:
    assert tapfs("hash", "-f", "raw", raw).code == 0
    _keep_time(raw, lambda: _flip(raw, at))
    ran = tapfs("verify", "--json", "-f", "raw", raw)
    found = json.loads(ran.out)
    assert (ran.code, found["verdict"]) == (2, "damaged")
    start = at // 65536 * 65536
    assert found["differing"] == [{"offset": start, "length": min(65536, _SIZE - start)}]
    assert "nobody has written" in tapfs("verify", "-f", "raw", raw).out


def test_data_that_became_a_hole_differs(tapfs: Run, raw: Path) -> None:
    """The map says zeros there, and nothing of it is read."""
    assert tapfs("hash", "-f", "raw", "--leaf", "4K", raw).code == 0

    def punch() -> None:
        data = raw.read_bytes()
        os.truncate(raw, 600 << 10)
        os.truncate(raw, len(data))
        with raw.open("r+b") as file:
            file.seek(620 << 10)
            file.write(data[620 << 10 :])

    _keep_time(raw, punch)
    found = json.loads(tapfs("verify", "--json", "-f", "raw", raw).out)
    assert found["differing"] == [{"offset": 600 << 10, "length": 20 << 10}]


def test_a_write_of_the_guest_is_a_change(tapfs: Run, raw: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    api.convert(raw, image, format="raw", target_format="qcow2")
    assert tapfs("hash", image).code == 0
    with api.open(image, writable=True) as disk:
        disk.write(2 << 20, b"written")
    ran = tapfs("verify", image)
    assert ran.code == 1
    assert "changed since it was hashed" in ran.out


def test_a_change_of_the_parent_is_one_of_the_disk(tapfs: Run, raw: Path, tmp_path: Path) -> None:
    overlay = tmp_path / "overlay.qcow2"
    api.create(overlay, "qcow2", backing=str(raw), backing_format="raw")
    assert tapfs("hash", overlay).code == 0
    _keep_time(raw, lambda: _flip(raw, 0))
    assert tapfs("verify", overlay).code == 2
    os.utime(raw)
    assert tapfs("verify", overlay).code == 1


@pytest.mark.parametrize("size", [_SIZE + 4096, 1 << 20])
def test_a_disk_of_another_size_differs_from_where_it_ends(tapfs: Run, raw: Path, size: int) -> None:
    assert tapfs("hash", "-f", "raw", raw).code == 0
    os.truncate(raw, size)
    ran = tapfs("verify", "--json", "-f", "raw", raw)
    found = json.loads(ran.out)
    assert (ran.code, found["disk_bytes"], found["hashed_disk_bytes"]) == (1, size, _SIZE)
    start = min(size, _SIZE) // 65536 * 65536
    assert found["differing"] == [{"offset": start, "length": max(size, _SIZE) - start}]


def test_what_cannot_be_read_differs_even_where_zeros_were_hashed(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    api.create(image, "qcow2", 4 << 20)
    with api.open(image, writable=True) as disk:
        disk.write(1 << 20, b"data")
    assert tapfs("hash", image).code == 0
    with api.open(image) as disk:
        table = next(extent.host_offset for extent in disk.extents() if not extent.zero) - 65536
    raw_bytes = image.read_bytes()
    entry = raw_bytes.index((0x8000000000000000 | (table + 65536)).to_bytes(8, "big"))

    def damage() -> None:
        with image.open("r+b") as file:
            file.seek(entry + 8)  # the next entry, which had nothing, now points behind the end of the file
            file.write((0x8000000000000000 | 1 << 40).to_bytes(8, "big"))

    _keep_time(image, damage)
    ran = tapfs("verify", "--json", image)
    found = json.loads(ran.out)
    assert ran.code == 2, ran
    assert found["differing"] == [{"offset": (1 << 20) + 65536, "length": 65536}]
    assert found["unreadable"][0]["offset"] == (1 << 20) + 65536


def test_the_root_that_was_noted_proves_the_sidecar(tapfs: Run, raw: Path) -> None:
    root = tapfs("hash", "-f", "raw", raw).out.split()[0]
    assert tapfs("verify", "-f", "raw", "--root", root, raw).code == 0
    _flip(raw, 0)
    assert tapfs("hash", "-f", "raw", "--force", raw).code == 0
    ran = tapfs("verify", "-f", "raw", "--root", root, raw)
    assert ran.code == 2
    assert "another disk" in ran.err


def test_a_sidecar_is_never_replaced_unasked_and_is_no_more_readable_than_its_image(
    tapfs: Run, raw: Path, tmp_path: Path
) -> None:
    raw.chmod(0o600)
    assert tapfs("hash", "-f", "raw", raw).code == 0
    sidecar = tmp_path / "disk.raw.tapfs-hash"
    assert sidecar.stat().st_mode & 0o777 == 0o600
    before = sidecar.read_bytes()
    assert tapfs("hash", "-f", "raw", raw).code == 18
    assert tapfs("hash", "-f", "raw", "-o", raw, "--force", raw).code == 18
    assert sidecar.read_bytes() == before
    assert tapfs("verify", "-f", "raw", raw, raw).code == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.raw", "disk.raw.tapfs-hash"]


def test_an_image_that_changes_while_it_is_hashed_has_no_sidecar(
    tapfs: Run, raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tapfs.disk.leaves import Leaves

    digests = Leaves.digests

    def meddling(*words: object) -> object:
        os.utime(raw)
        return digests(*words)  # type: ignore[arg-type]

    monkeypatch.setattr(Leaves, "digests", meddling)
    assert tapfs("hash", "-f", "raw", raw).code == 15
    assert not (tmp_path / "disk.raw.tapfs-hash").exists()


@pytest.fixture
def kept(raw: Path, tmp_path: Path) -> Path:
    """A qcow2 whose snapshot `a/b` is what the image was before its first leaf changed."""
    path = tmp_path / "disk.qcow2"
    api.convert(raw, path, format="raw", target_format="qcow2")
    api.create_snapshot(path, "a/b")
    with api.open(path, writable=True) as disk:
        disk.write(0, b"\x07" * 65536)
    return path


def test_a_snapshot_has_a_sidecar_of_its_own(tapfs: Run, kept: Path) -> None:
    assert tapfs("hash", kept).code == 0
    assert tapfs("hash", "--snapshot", "a/b", kept).code == 0
    of_snapshot = kept.with_name("disk.qcow2.snapshot-a%2Fb.tapfs-hash")
    assert of_snapshot.exists()
    assert tapfs("verify", kept).code == 0
    assert tapfs("verify", "--snapshot", "a/b", kept).code == 0
    by_id = tapfs("verify", "--json", "--snapshot", "1", kept, of_snapshot)
    assert json.loads(by_id.out)["untouched"] is True
    with api.open(kept, snapshot="a/b") as disk:
        assert api.verify(disk).untouched


def test_what_differs_from_the_sidecar_of_another_disk_in_the_file_is_no_damage(tapfs: Run, kept: Path) -> None:
    assert tapfs("hash", kept).code == 0
    ran = tapfs("verify", "--json", "--snapshot", "a/b", kept, f"{kept}.tapfs-hash")
    assert (ran.code, json.loads(ran.out)["verdict"]) == (1, "changed")


def test_the_stamp_of_a_snapshot_is_that_of_the_one_that_is_read(tapfs: Run, raw: Path, tmp_path: Path) -> None:
    """An id counts before a name, and snapshot 1 is called like the id of the other one here."""
    path, sidecar = tmp_path / "disk.qcow2", tmp_path / "sidecar"
    api.convert(raw, path, format="raw", target_format="qcow2")
    api.create_snapshot(path, "2")
    with api.open(path, writable=True) as disk:
        disk.write(0, b"\x07" * 65536)
    api.create_snapshot(path, "x")
    assert tapfs("hash", "--snapshot", "1", "-o", sidecar, path).code == 0
    other = json.loads(tapfs("verify", "--json", "--snapshot", "2", path, sidecar).out)
    assert other["verdict"] == "changed"
    for words in ("snapshot.id=1", "snapshot.name=2"):
        assert json.loads(tapfs("verify", "--json", "--snapshot", words, path, sidecar).out)["untouched"] is True


def test_another_disk_of_an_archive_is_no_damage(tapfs: Run, tmp_path: Path) -> None:
    """The disks of an .xva lie in chunks all over it, so each of them begins where the archive does."""
    disks = {"Ref:7": b"a" * (1 << 20), "Ref:8": b"b" * (1 << 20)}
    path, sidecar = package_files.xva(tmp_path / "vm.xva", disks), tmp_path / "sidecar"
    assert tapfs("hash", "--disk", "1", "-o", sidecar, path).code == 0
    for disk, verdict in (("1", "same"), ("2", "changed")):
        assert json.loads(tapfs("verify", "--json", "--disk", disk, path, sidecar).out)["verdict"] == verdict

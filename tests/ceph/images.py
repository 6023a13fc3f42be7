"""Images in a real Ceph cluster: converted into it, read from it, written there by a mount. `make test-remote`."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ceph.cluster import Cluster, cluster, unpacked

MIB = 1 << 20
#: Where the packages stay between runs.
PACKAGES = Path(__file__).parents[2] / "build/ceph"
TAPFS = Path(sys.executable).with_name("tapfs")


@pytest.fixture(scope="module")
def ceph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(unpacked(PACKAGES), tmp_path_factory.mktemp("c")) as made:
        yield made


def address(ceph: Cluster, name: str) -> str:
    return f"rbd:rbd/{name}:conf={ceph.configuration}"


def ran(ceph: Cluster, *words: str | Path, code: int = 0) -> str:
    done = subprocess.run(
        [TAPFS, *words],
        check=False,
        env=ceph.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def test_an_image_goes_into_the_cluster_and_back(ceph: Cluster, tmp_path: Path) -> None:
    content = random.Random(1).randbytes(9 * MIB) + bytes(7 * MIB)
    (tmp_path / "disk.raw").write_bytes(content)
    ran(ceph, "convert", "-f", "raw", "-O", "qcow2", tmp_path / "disk.raw", tmp_path / "disk.qcow2")
    ceph.run("rbd", "create", "--size", "16M", "rbd/disk")
    ran(ceph, "convert", "-O", "raw", tmp_path / "disk.qcow2", address(ceph, "disk"))
    ceph.run("rbd", "export", "--no-progress", "rbd/disk", tmp_path / "exported")
    assert (tmp_path / "exported").read_bytes() == content
    ran(ceph, "convert", "-f", "raw", "-O", "qcow2", address(ceph, "disk"), tmp_path / "back.qcow2")
    assert "Images are identical" in ran(ceph, "compare", tmp_path / "disk.qcow2", tmp_path / "back.qcow2")


def test_holes_in_the_cluster_are_holes(ceph: Cluster, tmp_path: Path) -> None:
    """Also those of a clone over a snapshot, whose data is that of both."""
    ceph.run("rbd", "create", "--size", "1G", "rbd/sparse")
    with (tmp_path / "disk").open("wb") as file:
        file.truncate(1 << 30)
        for place in (100, 700):
            file.seek(place * MIB)
            file.write(b"data" * 1000)
    ran(ceph, "convert", "-f", "raw", "-O", "raw", tmp_path / "disk", address(ceph, "sparse"))
    ceph.run("rbd", "snap", "create", "--no-progress", "rbd/sparse@s")
    for name in ("sparse", "sparse@s"):
        extents = json.loads(ran(ceph, "map", "--json", "-f", "raw", address(ceph, name)))
        data = [each for each in extents if each["data"]]
        assert sum(each["length"] for each in data) < 32 * MIB
        for place in (100, 700):
            assert any(each["start"] <= place * MIB < each["start"] + each["length"] for each in data)
        words = ("compare", "-f", "raw", "-F", "raw", tmp_path / "disk", address(ceph, name))
        assert "Images are identical" in ran(ceph, *words)


def test_a_snapshot_stays_and_is_only_read(ceph: Cluster, tmp_path: Path) -> None:
    ceph.run("rbd", "create", "--size", "4M", "rbd/kept")
    (tmp_path / "one").write_bytes(b"one" * 1000 + bytes(4 * MIB - 3000))
    (tmp_path / "two").write_bytes(b"two" * 1000 + bytes(4 * MIB - 3000))
    ran(ceph, "convert", "-f", "raw", "-O", "raw", tmp_path / "one", address(ceph, "kept"))
    ceph.run("rbd", "snap", "create", "--no-progress", "rbd/kept@s")
    ran(ceph, "convert", "-f", "raw", "-O", "raw", tmp_path / "two", address(ceph, "kept"))
    for place, file in (("kept@s", "one"), ("kept", "two")):
        words = ("compare", "-f", "raw", "-F", "raw", tmp_path / file, address(ceph, place))
        assert "Images are identical" in ran(ceph, *words)
    refused = ran(ceph, "convert", "-f", "raw", "-O", "raw", tmp_path / "one", address(ceph, "kept@s"), code=16)
    assert "may only be read" in refused


def test_a_mount_writes_to_it(ceph: Cluster, tmp_path: Path) -> None:
    ceph.run("rbd", "create", "--size", "8M", "rbd/mounted")
    (tmp_path / "m").mkdir()
    ran(ceph, "mount", "-f", "raw", "--rw", address(ceph, "mounted"), tmp_path / "m")
    try:
        disk = os.open(tmp_path / "m/disk", os.O_RDWR)
        os.pwrite(disk, b"written" * 1000, 3 * MIB)
        os.fsync(disk)
        os.close(disk)
    finally:
        ran(ceph, "umount", tmp_path / "m")
    ceph.run("rbd", "export", "--no-progress", "rbd/mounted", tmp_path / "exported")
    assert (tmp_path / "exported").read_bytes()[3 * MIB :][:7000] == b"written" * 1000


def test_what_is_not_there_is_told(ceph: Cluster) -> None:
    assert "is not there" in ran(ceph, "info", address(ceph, "none"), code=17)


def test_a_survey_lists_what_a_pool_has(ceph: Cluster, tmp_path: Path) -> None:
    """Images of a format, and raw ones with a file system; raw ones that show nothing only with --all."""
    with (tmp_path / "files").open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run(["/sbin/mkfs.ext4", "-q", tmp_path / "files"], check=True)
    ran(ceph, "create", "-f", "qcow2", tmp_path / "empty.qcow2", "1G")
    for name, source in (("files", tmp_path / "files"), ("packed", tmp_path / "empty.qcow2")):
        ceph.run("rbd", "create", "--size", "16M", f"rbd/surveyed-{name}")
        ran(ceph, "convert", "-f", "raw", "-O", "raw", source, address(ceph, f"surveyed-{name}"))
    ceph.run("rbd", "create", "--size", "4M", "rbd/surveyed-blank")
    pool = f"rbd:rbd:conf={ceph.configuration}"
    for words, names in (((), ["files", "packed"]), (("--all",), ["blank", "files", "packed"])):
        found = json.loads(ran(ceph, "survey", "--json", *words, pool))["images"]
        rows = {each["path"]: each for each in found if "/surveyed-" in each["path"]}
        assert sorted(rows) == [address(ceph, f"surveyed-{name}") for name in names]
        assert [rows[address(ceph, f"surveyed-{name}")]["format"] for name in ("files", "packed")] == ["raw", "qcow2"]

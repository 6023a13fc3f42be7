"""A survey: every image once, what needs what, and nothing that one bad image does to the rows of others."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tapfs as library
from tapfs.jobs.block_hash import block_hash
from tapfs.many.listing import listing_of
from tests import package_files
from tests.conftest import Ran
from tests.json_documents import require_valid
from tests.web_server import web_server

MIB = 1 << 20
Tapfs = Callable[..., Ran]


@pytest.fixture
def farm(tmp_path: Path) -> Path:
    """Images of several kinds in folders, and files that are none."""
    folder = tmp_path / "farm"
    (folder / "deep/er").mkdir(parents=True)
    subprocess.run(["mkfs.ext4", "-q", "-L", "root", folder / "disk.raw", "2M"], check=True)
    library.convert(folder / "disk.raw", folder / "base.qcow2", format="raw", target_format="qcow2")
    for name, below in (("mid", "base.qcow2"), ("top", "mid.qcow2"), ("other", "base.qcow2")):
        library.create(folder / f"{name}.qcow2", "qcow2", 2 * MIB, backing=below, backing_format="qcow2")
    library.create(folder / "deep/er/x.vmdk", "vmdk", MIB, options={"subformat": "monolithicFlat"})
    (folder / "gone").write_bytes(bytes(MIB))
    library.create(folder / "deep/lost.qcow2", "qcow2", MIB, backing="../gone", backing_format="raw")
    (folder / "gone").unlink()
    (folder / "deep/packed.qcow2.gz").write_bytes(gzip.compress((folder / "base.qcow2").read_bytes()))
    (folder / "deep/log.gz").write_bytes(gzip.compress(b"text\n" * 1000))
    (folder / "bad.qcow2").write_bytes(b"QFI\xfb\0\0\0\3" + b"\xff" * 600)
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff" + os.urandom(5000))
    (folder / "empty").touch()
    (folder / "link.qcow2").symlink_to("base.qcow2")
    (folder / "loop").symlink_to(".")
    os.mkfifo(folder / "fifo")
    return folder


def survey(tapfs: Tapfs, *words: object) -> dict[str, Any]:
    ran = tapfs("survey", "--json", "--jobs", "1", *words)
    document = json.loads(ran.out)
    assert ran.code == int(bool(document["unlisted"]) or any(row["error"] for row in document["images"])), ran.err
    return dict(document)


def by_name(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {os.path.basename(row["path"]): row for row in document["images"]}


def test_each_image_once_with_what_it_is_and_who_needs_it(tapfs: Tapfs, farm: Path) -> None:
    document = survey(tapfs, farm, farm / "base.qcow2", farm / "deep", "--content", "--hash", "--check")
    rows = by_name(document)
    images = "disk.raw base.qcow2 mid.qcow2 top.qcow2 other.qcow2 x.vmdk lost.qcow2 packed.qcow2.gz bad.qcow2"
    assert sorted(rows) == sorted(images.split())
    assert (document["not_images"], document["parts"]) == (3, 1)
    users = {name: [os.path.basename(user) for user in row["used_by"]] for name, row in rows.items()}
    assert users["base.qcow2"] == ["mid.qcow2", "other.qcow2", "top.qcow2"]
    assert users["mid.qcow2"] == ["top.qcow2"]
    assert users["top.qcow2"] == []
    assert [os.path.basename(part["path"]) for part in rows["top.qcow2"]["chain"]] == [
        "top.qcow2",
        "mid.qcow2",
        "base.qcow2",
    ]
    assert (rows["packed.qcow2.gz"]["packed"], rows["packed.qcow2.gz"]["format"]) == ("gzip", "qcow2")
    assert [os.path.basename(file) for file in rows["x.vmdk"]["files"]] == ["x.vmdk", "x-flat.vmdk"]
    with library.open(farm / "disk.raw", format="raw") as disk:
        same = block_hash(disk)
    for name in ("disk.raw", "base.qcow2", "top.qcow2", "packed.qcow2.gz"):
        assert rows[name]["hash"] == same
        assert rows[name]["contents"]["file_system"]["label"] == "root"
    health = {name: row["health"] for name, row in rows.items()}
    assert health == {
        **dict.fromkeys(rows, "clean"),
        "disk.raw": "no check",
        "x.vmdk": health["x.vmdk"],
        "lost.qcow2": "broken chain",
        "bad.qcow2": "unreadable",
    }
    assert rows["bad.qcow2"]["error"]["kind"] == "invalid_format"
    assert rows["lost.qcow2"]["chain"][1]["state"] == "missing"


def test_all_takes_any_file_and_no_backing_opens_no_other(tapfs: Tapfs, farm: Path) -> None:
    rows = by_name(survey(tapfs, farm, "--all", "--no-backing"))
    assert rows["photo.jpg"]["format"] == "raw"
    assert [part["state"] for part in rows["top.qcow2"]["chain"]] == ["open", "not looked at"]
    assert [os.path.basename(user) for user in rows["mid.qcow2"]["used_by"]] == ["top.qcow2"]
    confined = by_name(survey(tapfs, farm, "--backing-root", farm / "deep"))
    assert confined["top.qcow2"]["health"] == "broken chain"


def test_an_image_in_use_is_read_and_not_disturbed(tapfs: Tapfs, farm: Path) -> None:
    with library.open(farm / "top.qcow2", writable=True) as disk:
        row = by_name(survey(tapfs, farm / "top.qcow2", "--check"))["top.qcow2"]
        assert (row["in_use"], row["health"], row["error"]) == (True, "in use", None)
        disk.write(0, b"on")
        disk.flush()
    assert by_name(survey(tapfs, farm / "top.qcow2"))["top.qcow2"]["in_use"] is False


@pytest.fixture
def machines(tmp_path: Path) -> Path:
    """A base with an overlay that a .vmx names, an .ova, an .xva, and archives that are no packages."""
    folder = tmp_path / "machines"
    folder.mkdir()
    library.create(folder / "base.vmdk", "vmdk", MIB)
    library.create(folder / "vm.vmdk", "vmdk", MIB, backing="base.vmdk", backing_format="vmdk")
    (folder / "vm.vmx").write_bytes(package_files.vmx({"scsi0:0.present": "TRUE", "scsi0:0.fileName": "vm.vmdk"}))
    images = {name: (folder / "base.vmdk").read_bytes() for name in ("one.vmdk", "two.vmdk")}
    package_files.ova(folder / "app.ova", images)
    package_files.xva(folder / "old.xva", {"Ref:1": bytes(MIB) + b"x" * MIB})
    package_files.archive(folder / "vm.box.gz", {"metadata.json": b"{}", "box.img": images["one.vmdk"]}, mode="w:gz")
    package_files.archive(folder / "backup.tar", images)
    (folder / "bad.ovf").write_bytes(package_files.ovf(["nothing.vmdk"]))
    return folder


def test_each_disk_of_a_package_is_an_image(tapfs: Tapfs, machines: Path) -> None:
    document = survey(tapfs, machines, "--hash", "--check")
    rows = {(os.path.basename(row["path"]), row["disk"]): row for row in document["images"]}
    assert sorted(rows, key=str) == [
        ("app.ova", 1),
        ("app.ova", 2),
        ("bad.ovf", 1),
        ("base.vmdk", None),
        ("old.xva", 1),
        ("vm.box.gz", 1),
        ("vm.vmdk", None),
        ("vm.vmx", 1),
    ]
    assert document["not_images"] == 1
    whole = rows["base.vmdk", None]
    for key in (("app.ova", 1), ("app.ova", 2), ("vm.box.gz", 1), ("vm.vmdk", None)):
        assert (rows[key]["hash"], rows[key]["health"], rows[key]["error"]) == (whole["hash"], "clean", None), key
    assert (rows["app.ova", 2]["package"], rows["app.ova", 2]["disks"]) == ("ova", 2)
    assert rows["vm.box.gz", 1]["packed"] == "gzip"
    assert rows["old.xva", 1]["virtual_size"] == 2 * MIB
    assert rows["old.xva", 1]["hash"] not in {None, whole["hash"]}
    # A descriptor's disk has its hash in the row of its file.
    assert (rows["vm.vmx", 1]["hash"], rows["vm.vmx", 1]["health"]) == (None, "not checked")
    assert [os.path.basename(each) for each in rows["vm.vmdk", None]["used_by"]] == ["vm.vmx"]
    assert [os.path.basename(each) for each in whole["used_by"]] == ["vm.vmdk", "vm.vmx"]
    assert "nothing.vmdk is missing" in rows["bad.ovf", 1]["error"]["message"]
    require_valid("survey", document)
    shown = tapfs("survey", machines, "--to", "table").out
    assert re.search(r"app.ova --disk 2 +vmdk in ova +1 MiB", shown)


def test_what_a_named_descriptor_names_is_looked_at(tapfs: Tapfs, machines: Path) -> None:
    rows = by_name(survey(tapfs, machines / "vm.vmx", "--hash"))
    assert sorted(rows) == ["vm.vmdk", "vm.vmx"]
    assert rows["vm.vmdk"]["hash"]


def test_a_package_is_taken_over_while_all_of_its_files_are_the_same(tapfs: Tapfs, machines: Path) -> None:
    out = machines.parent / "out.sqlite"
    words = ("survey", machines, "-o", out, "--jobs", "1", "--resume")
    tapfs(*words)
    assert "7 as before" in tapfs(*words).out  # all but the one whose disk is missing
    os.utime(machines / "base.vmdk")
    assert "4 as before" in tapfs(*words).out
    with closing(sqlite3.connect(out)) as connection:
        assert connection.execute("SELECT count(*) FROM images WHERE package = 'ova'").fetchone() == (2,)
        connection.execute("DELETE FROM images WHERE package = 'ova' AND disk = 1")
        connection.commit()
    assert "5 as before" in tapfs(*words).out  # a part of a package is no package


def test_an_encrypted_disk_is_read_with_its_password(tapfs: Tapfs, tmp_path: Path) -> None:
    folder = tmp_path / "secrets"
    folder.mkdir()
    key, other = tmp_path / "key", tmp_path / "other"
    key.write_text("one\n")
    other.write_text("two\n")
    for name, file in (("a", key), ("b", other)):
        words = ("-O", "qcow2", "-o", "encrypt.format=luks,encrypt.iter-time=10", "--target-key-file", file)
        (folder / "plain.raw").write_bytes(b"x" * MIB)
        assert tapfs("convert", "-f", "raw", *words, folder / "plain.raw", folder / f"{name}.qcow2").code == 0
    (folder / "plain.raw").unlink()
    rows = by_name(survey(tapfs, folder, "--hash"))
    assert [(row["hash"], row["error"]) for row in rows.values()] == [(None, None)] * 2
    rows = by_name(survey(tapfs, folder, "--hash", "--key-file", f"{folder}/a.qcow2={key}"))
    assert rows["a.qcow2"]["hash"]
    assert (rows["b.qcow2"]["hash"], rows["b.qcow2"]["error"]) == (None, None)
    rows = by_name(survey(tapfs, folder, "--hash", "--key-file", key, "--key-file", f"{folder}/b.qcow2={other}"))
    assert rows["a.qcow2"]["hash"] == rows["b.qcow2"]["hash"]
    rows = by_name(survey(tapfs, folder, "--check", "--hash", "--key-file", other))
    assert (rows["a.qcow2"]["error"]["kind"], rows["a.qcow2"]["health"]) == ("denied", "clean")
    out = tmp_path / "out.jsonl"
    tapfs("survey", folder, "--hash", "-o", out)
    assert "as before" not in tapfs("survey", folder, "--hash", "-o", out, "--resume", "--key-file", key).out
    assert tapfs("survey", folder, "--hash", "--key-file", tmp_path / "none").code == 17


def test_a_place_that_is_not_there_is_said_and_the_others_are_listed(tapfs: Tapfs, farm: Path) -> None:
    ran = tapfs("survey", "--to", "jsonl", farm / "nowhere", farm / "deep/er")
    assert ran.code == 1
    assert "nowhere: not listed" in ran.err
    assert json.loads(ran.out)["format"] == "vmdk"


@pytest.mark.parametrize("suffix", ["jsonl", "sqlite"])
def test_a_survey_is_resumed_from_its_file_and_its_journal(tapfs: Tapfs, farm: Path, suffix: str) -> None:
    out = farm.parent / f"out.{suffix}"

    def made(*words: object) -> str:
        return tapfs("survey", "--jobs", "1", "-o", out, *words).out

    assert "as before" not in made(farm)
    assert [entry.name for entry in farm.parent.iterdir() if entry.name.startswith("out")] == [out.name]
    assert "7 as before" in made(farm, "--resume")  # all but the bad one and the one without its parent
    os.utime(farm / "mid.qcow2")
    library.create(farm / "new.raw.qcow2", "qcow2", MIB)
    assert "5 as before" in made(farm, "--resume")  # top has mid in its chain
    assert "as before" not in made(farm, "--resume", "--hash")
    # What the journal has is taken over, too, whatever its last line.
    lines = tapfs("survey", farm / "deep/er", "--jobs", "1", "--to", "jsonl").out
    out.unlink()
    (farm.parent / f"out.{suffix}.partial").write_text(lines + lines[:40])
    assert "1 as before" in made(farm / "deep", "--resume")


def test_sqlite_has_columns_and_relations(tapfs: Tapfs, farm: Path) -> None:
    out = farm.parent / "out.db"
    tapfs("survey", farm, "-o", out, "--content")
    with closing(sqlite3.connect(out)) as connection:
        sql = "SELECT count(*) FROM users WHERE image LIKE '%/base.qcow2'"
        assert connection.execute(sql).fetchone() == (3,)
        sql = "SELECT label FROM file_systems WHERE image LIKE '%/top.qcow2' AND partition = 0"
        assert connection.execute(sql).fetchone() == ("root",)
        assert connection.execute("SELECT max(depth) FROM chains").fetchone() == (2,)


def test_parquet(tapfs_process: Tapfs, farm: Path) -> None:
    """In processes of its own: the library has threads, and a process with threads starts its workers anew."""
    out = farm.parent / "out.parquet"
    assert tapfs_process("survey", farm, "-o", out, "--jobs", "1").code == 1
    program = "import json, sys, pyarrow.parquet as p; print(json.dumps(p.read_table(sys.argv[1]).to_pylist()))"
    table = json.loads(subprocess.run([sys.executable, "-c", program, out], capture_output=True, check=True).stdout)
    rows = {os.path.basename(row["path"]): row for row in table}
    assert len(rows["base.qcow2"]["used_by"]) == 3
    assert rows["bad.qcow2"]["error"]
    assert "7 as before" in tapfs_process("survey", farm, "-o", out, "--resume", "--jobs", "1").out


def test_a_file_that_is_no_survey_is_refused_and_kept(tapfs: Tapfs, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.sqlite"):
        path = tmp_path / name
        path.write_text('{"path": "x"}\n')
        ran = tapfs("survey", tmp_path, "-o", path, "--resume", "--jobs", "1")
        assert ran.code == 11, ran.err
        assert name in ran.err
        assert path.read_text() == '{"path": "x"}\n'


def test_what_cannot_be_written_is_an_error_before_any_work(tapfs: Tapfs, tmp_path: Path) -> None:
    ran = tapfs("survey", tmp_path, "-o", tmp_path / "no/such/folder.jsonl")
    assert ran.code == 17
    for words in (["-o", "x.txt"], ["--resume"], ["--to", "sqlite"], ["--to", "table", "-o", "x"], ["--jobs", "0"]):
        assert tapfs("survey", tmp_path, *words).code == 64


def test_names_that_are_no_unicode(tapfs: Tapfs, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff.qcow2"
    library.create(os.fsdecode(name), "qcow2", MIB)
    for word in ("a.jsonl", "a.sqlite"):
        assert tapfs("survey", tmp_path, "-o", tmp_path / word, "--jobs", "1").code == 0
    line = json.loads(tapfs("survey", tmp_path, "--to", "jsonl").out)
    assert "path_base64" in line
    assert tapfs("survey", tmp_path, "--to", "table").out.count("\n") == 3


def test_a_prefix_of_an_object_store(tapfs: Tapfs, farm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with web_server(b"") as server:
        for name, value in {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        for name in ("base", "mid"):
            server.files[f"/bucket/dir/{name}.qcow2"] = (farm / f"{name}.qcow2").read_bytes()
        server.files["/bucket/dir/note.txt"] = b"text"
        document = survey(tapfs, "s3://bucket/dir/", "s3://bucket/dir/mid.qcow2", "--jobs", "1")
        rows = by_name(document)
        assert sorted(rows) == ["base.qcow2", "mid.qcow2"]
        assert document["not_images"] == 1
        assert rows["base.qcow2"]["file_size"] == (farm / "base.qcow2").stat().st_size
        assert rows["mid.qcow2"]["health"] == "broken chain"  # what an image names elsewhere is not opened unasked
        allowed = by_name(survey(tapfs, "s3://bucket/dir/mid.qcow2", "--backing-root", "s3://bucket/"))
        assert allowed["mid.qcow2"]["health"] == "not checked"


def test_pools_of_ceph_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Context(SimpleNamespace):
        def set_namespace(self, name: str) -> None:
            self.space = name

        def close(self) -> None: ...

    class Cluster(SimpleNamespace):
        def connect(self, *, timeout: int) -> None: ...
        def shutdown(self) -> None: ...
        def open_ioctx(self, name: str) -> Context:
            return Context(name=name)

    class Listing:
        def list(self, pool: Context) -> list[str]:
            assert (pool.name, pool.space) == ("pool", "space")
            return ["b", "a:1"]

    modules: dict[str, Any] = {
        "rados": SimpleNamespace(Rados=Cluster, Error=OSError, ObjectNotFound=KeyError),
        "rbd": SimpleNamespace(RBD=Listing, Error=OSError, ImageNotFound=KeyError),
    }
    monkeypatch.setattr(importlib, "import_module", modules.__getitem__)
    found = listing_of("rbd:pool/space/:id=me", named=True)
    assert [file["path"] for file in found["files"]] == ["rbd:pool/space/a\\:1:id=me", "rbd:pool/space/b:id=me"]


def test_a_survey_by_hand_is_a_table(tapfs: Tapfs, farm: Path) -> None:
    shutil.rmtree(farm / "deep")
    out = tapfs("survey", farm, "--to", "table", "--hash", "--content", "--check").out
    assert "base.qcow2" in out
    assert "is corrupt" not in out
    line = next(line for line in out.splitlines() if "/base.qcow2 " in line)
    assert "clean" in line
    assert "ext4" in line
    assert " 3 " in line
    assert out.splitlines()[-1].startswith("6 images")


def test_each_row_of_json_lines_fits_the_schema(tapfs: Tapfs, farm: Path) -> None:
    lines = [json.loads(line) for line in tapfs("survey", farm, "--check", "--content", "--hash").out.splitlines()]
    assert len(lines) == 9
    document = {"version": 1, "images": lines, "not_images": 0, "parts": 0, "reused": 0, "unlisted": []}
    require_valid("survey", document)

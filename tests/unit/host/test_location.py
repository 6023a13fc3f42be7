"""A name means the same everywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.host.location import file_name, locate, locate_parent

MIB = 1 << 20


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("", ErrorKind.INVALID_ARGUMENT),
        ("-", ErrorKind.UNSUPPORTED),
        ("ftp://host/disk.qcow", ErrorKind.UNSUPPORTED),
        ("ram:a/b", ErrorKind.INVALID_ARGUMENT),
        ("RAM:.x", ErrorKind.INVALID_ARGUMENT),
    ],
)
def test_names_that_mean_no_image(
    name: str, kind: ErrorKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    if name:
        (tmp_path / name.replace("//", "/")).parent.mkdir(parents=True, exist_ok=True)
    opened = [
        lambda: tapfs.open(name),
        lambda: tapfs.open(sample, overlay=name),
        lambda: tapfs.create(name, "raw", MIB),
        lambda: tapfs.check(name),
    ]
    for use in opened:
        with pytest.raises(ImageError) as raised:
            use()
        assert raised.value.kind is kind
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_of_such_a_name_is_written_with_a_slash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("-", "ram:x", "RAM:x"):
        assert file_name(name) == f"./{name}"
        tapfs.create(file_name(name), "raw", MIB)
        with tapfs.open(file_name(name)) as disk:
            assert disk.size == MIB
    assert sorted(os.listdir(tmp_path)) == ["-", "RAM:x", "ram:x"]
    assert file_name("a:b") == "a:b"


def test_the_prefix_of_a_ram_disk_may_be_in_capitals(ram_name: str) -> None:
    tapfs.create(ram_name.replace("ram:", "RAM:"), "ram", MIB)
    with tapfs.open(ram_name) as disk:
        assert (disk.size, disk.format_name) == (MIB, "ram")
    assert locate(ram_name.replace("ram:", "Ram:")).name == ram_name


def test_a_missing_ram_disk_is_called_by_its_name() -> None:
    with pytest.raises(ImageError) as raised:
        tapfs.open("ram:nope")
    assert raised.value.kind is ErrorKind.NOT_FOUND
    assert str(raised.value) == "ram:nope: there is no such RAM disk; make it: tapfs create -f ram ram:nope SIZE"


def test_a_header_names_files_only(tmp_path: Path, ram_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same header means the same from every folder, also where its name looks like a RAM disk."""
    tapfs.create(ram_name, "ram", MIB)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ram_name).write_bytes(b"f" * MIB)
    tapfs.create("a.qcow", "qcow", MIB, backing=f"./{ram_name}", backing_format="raw")
    header = bytearray((tmp_path / "a.qcow").read_bytes())
    at = header.index(b"./ram:")
    header[at : at + len(ram_name) + 2] = ram_name.encode() + b"\0\0"
    header[16:20] = len(ram_name).to_bytes(4, "big")
    (tmp_path / "a.qcow").write_bytes(header)
    for path in ("a.qcow", str(tmp_path / "a.qcow")):
        with tapfs.open(path, backing_formats=["raw"]) as disk:
            assert disk.read(0, 1) == b"f"
    assert locate_parent("a.qcow", "ftp://host/x").name == "./ftp://host/x"


def test_who_has_it_open_is_this_process(tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    tapfs.create(str(image), "qcow", MIB)
    with tapfs.open(image, writable=True), pytest.raises(ImageError, match=r"\(this one, which has it open already\)"):
        tapfs.open(image)


def test_file_before_a_path_means_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for QEMU, which has no other way to say that a name with a colon is a file's; here ./ says so, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    tapfs.create("file:sub/base:1", "qcow2", MIB)
    tapfs.create("file:sub/over", "qcow2", backing="file:base:1", backing_format="qcow2")
    assert {each.name for each in (tmp_path / "sub").iterdir()} == {"base:1", "over"}
    with tapfs.open("file:sub/over", writable=True) as disk:
        disk.write(0, b"data")
        assert [layer.path for layer in disk.layers] == ["sub/over", "sub/base:1"]
    with tapfs.open("sub/base:1", overlay="file:scratch") as disk:
        disk.write(0, b"scratch")
    assert (tmp_path / "scratch").exists()
    tapfs.convert(f"file://{tmp_path}/sub/over", "file:copy", target_format="raw")
    assert (tmp_path / "copy").read_bytes()[:4] == b"data"
    (tmp_path / "file:odd").write_bytes(b"odd!" * 128)
    with tapfs.open("./file:odd", format="raw") as disk:
        assert disk.read(0, 4) == b"odd!"
    assert (file_name("file:odd"), file_name("file:file:odd")) == ("./file:odd", "./file:file:odd")
    assert locate("file:file:odd").host_path == "./file:odd"
    assert locate("file:ram:x").host_path == "./ram:x"

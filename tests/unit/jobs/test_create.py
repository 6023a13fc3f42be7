"""New overlays: never in the place of what they are to be read from, and with names that QEMU reads alike."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as api
from tapfs import ErrorKind, ImageError
from tapfs.disk.chain import OpenOptions, files_below

Run = Callable[..., Any]
MIB = 1 << 20


def chain(folder: Path, *names: str) -> list[Path]:
    """Images each over the one before; the first is raw."""
    paths = [folder / name for name in names]
    paths[0].write_bytes(b"b" * MIB)
    for parent, path in itertools.pairwise(paths):
        format_name = "raw" if parent == paths[0] else "qcow"
        api.create(str(path), "qcow", MIB, backing=parent.name, backing_format=format_name)
    return paths


@pytest.mark.parametrize("name", ["base.raw", "a", "b", "c", "link", "hard"])
def test_a_new_image_never_replaces_what_it_is_to_be_read_from(
    tapfs: Run, tmp_path: Path, sample: Path, name: str
) -> None:
    """Also where only a guess tells what a file of the chain is, and by any name of the file."""
    paths = chain(tmp_path, "base.raw", "a", "b", "c")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "hard").hardlink_to(tmp_path / "base.raw")
    before = [path.read_bytes() for path in paths]
    for words in (
        ("create", "-f", "qcow", "--force", "-b", "c", "-F", "qcow", tmp_path / name),
        ("create", "-f", "qcow", "--force", "-b", tmp_path / "c", tmp_path / name),
        ("convert", "-f", "raw", "-O", "qcow", "-b", "c", "-F", "qcow", sample, tmp_path / name),
    ):
        ran = tapfs(*words)
        assert ran.code == 18
        assert "overlay over" in ran.err
    assert [path.read_bytes() for path in paths] == before


def test_others_are_replaced(tapfs: Run, tmp_path: Path) -> None:
    chain(tmp_path, "base.raw", "a", "b")
    assert tapfs("create", "-f", "qcow", "--force", "-b", "a", "-F", "qcow", tmp_path / "b").code == 0
    (tmp_path / "base.raw").unlink()
    assert tapfs("create", "-f", "qcow", "--force", "-b", "a", "-F", "qcow", tmp_path / "b").code == 0


def test_a_chain_is_followed_as_far_as_it_goes(tmp_path: Path) -> None:
    paths = chain(tmp_path, "base.raw", "a", "b")
    options = OpenOptions(format="qcow")
    assert len(files_below(str(paths[-1]), options)) == 3
    paths[0].unlink()
    paths[0].symlink_to("b")
    assert len(files_below(str(paths[-1]), options)) == 2
    paths[0].unlink()
    assert len(files_below(str(paths[-1]), options)) == 2


@pytest.mark.parametrize(
    "name", ["win:dows.raw", "a+b:c", "nbd:x", "json:{}", "plain.raw", "sub/a:b", "file:plain.raw"]
)
def test_a_backing_name_with_a_colon_is_read_by_qemu_too(tmp_path: Path, name: str) -> None:
    path = tmp_path / name.removeprefix("file:")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"p" * MIB)
    api.create(str(tmp_path / "a.qcow"), "qcow", backing=name, backing_format="raw")
    with api.open(tmp_path / "a.qcow", backing_formats=["raw"]) as disk:
        assert disk.read(MIB - 1, 1) == b"p"
    done = subprocess.run(
        ["qemu-img", "info", "--output=json", "--backing-chain", "-f", "qcow", "a.qcow"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert len(json.loads(done.stdout)) == 2


def test_an_overlay_over_a_ram_disk(tmp_path: Path, ram_name: str) -> None:
    api.create(ram_name, "ram", MIB)
    api.create(str(tmp_path / "a.qcow"), "qcow", backing=ram_name)
    with api.open(tmp_path / "a.qcow") as disk, api.open(ram_name, writable=True, write_base=True) as below:
        below.write(0, b"shared")
        assert disk.read(0, 6) == b"shared"
        assert disk.parents == (ram_name,)
    with pytest.raises(ImageError) as raised:
        api.open(tmp_path / "a.qcow", gate=api.Gate.inside(tmp_path))
    assert raised.value.kind is ErrorKind.DENIED


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize(
    ("format_name", "options"),
    [
        ("raw", {}),
        ("qcow2", {}),
        ("qcow2", {"data_file": "data"}),
        ("vdi", {}),
        ("vhd", {"subformat": "fixed"}),
        ("vhdx", {"subformat": "fixed"}),
        ("vmdk", {"subformat": "monolithicFlat"}),
        ("vmdk", {"subformat": "twoGbMaxExtentFlat"}),
        ("luks", {"iter-time": "10"}),
    ],
)
def test_preallocation_takes_the_space_of_the_disk(
    mode: str, format_name: str, options: dict[str, str], tmp_path: Path
) -> None:
    password = b"secret" if format_name == "luks" else None
    api.create(
        str(tmp_path / "disk"), format_name, 3 << 20, options={**options, "preallocation": mode}, password=password
    )
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) >= 3 << 20
    if format_name != "luks":
        with api.open(str(tmp_path / "disk"), format=format_name) as image:
            assert not any(image.read(0, image.size))


@pytest.mark.parametrize(
    ("format_name", "options", "said"),
    [
        ("vmdk", {"preallocation": "full"}, "flat subformats only"),
        ("vhd", {"preallocation": "full"}, "fixed images only"),
        ("raw", {"preallocation": "metadata"}, "must be off, falloc or full"),
    ],
)
def test_preallocation_where_it_makes_no_sense_is_refused(
    format_name: str, options: dict[str, str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match=said):
        api.create(str(tmp_path / "disk"), format_name, 3 << 20, options=options)

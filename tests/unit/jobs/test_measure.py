"""`tapfs measure` is right to the byte: what it says is the length of what `tapfs convert` and `create` then write."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as api
from tapfs import CopyOptions, ErrorKind, ImageError

Run = Callable[..., Any]
MIB = 1 << 20
SIZE = 3 * MIB + 3 * 512
DRAWN = random.Random(11)
KINDS: dict[str, tuple[str, dict[str, str]]] = {
    "raw": ("raw", {}),
    "qcow": ("qcow", {}),
    "qcow2": ("qcow2", {}),
    "qcow2-512": ("qcow2", {"cluster_size": "512", "refcount_bits": "64"}),
    "qcow2-subclusters": ("qcow2", {"extended_l2": "on"}),
    "qcow2-full": ("qcow2", {"preallocation": "full"}),
    "qcow2-data-file": ("qcow2", {"data_file": "disk.data"}),
    "qcow2-luks": ("qcow2", {"encrypt.format": "luks", "encrypt.iter-time": "10"}),
    "vdi": ("vdi", {}),
    "vhd": ("vhd", {}),
    "vhd-fixed": ("vhd", {"subformat": "fixed"}),
    "vhdx": ("vhdx", {}),
    "vmdk": ("vmdk", {}),
    "vmdk-flat": ("vmdk", {"subformat": "monolithicFlat"}),
    "vmdk-split": ("vmdk", {"subformat": "twoGbMaxExtentSparse"}),
    "vmdk-stream": ("vmdk", {"subformat": "streamOptimized"}),
}


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A disk with some data, zeros inside the data, and a last cluster that is not whole; and one that is full."""
    folder = tmp_path_factory.mktemp("disks")
    some = bytearray(SIZE)
    for at, length in ((0, 512), (70_000, 5000), (MIB, 300_000), (3 * MIB + 512, 512)):
        some[at : at + length] = DRAWN.randbytes(length)
    some[MIB + 65_536 : MIB + 131_072] = bytes(65_536)
    for name, content in (("some", bytes(some)), ("full", DRAWN.randbytes(SIZE))):
        (folder / name).write_bytes(content)
    return {name: folder / name for name in ("some", "full")}


def written(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversion_writes_what_was_measured(kind: str, disks: dict[str, Path], tmp_path: Path) -> None:
    format_name, options = KINDS[kind]
    password = b"secret" if "luks" in kind else None
    new = {"format": "raw", "target_format": format_name, "options": options, "target_password": password}
    for name, disk in disks.items():
        folder = tmp_path / name
        folder.mkdir()
        found = api.measure(disk, name=folder / "disk.img", **new)
        api.convert(disk, folder / "disk.img", **new)
        assert found.required == written(folder)
        if name == "full" and kind != "vmdk-stream":  # the end of its last grain is zeros, which shrink
            assert found.fully_allocated == found.required
        assert found.fully_allocated >= found.required


@pytest.mark.parametrize(("format_name", "options"), [("qcow", {}), ("qcow2", {"compression_type": "zstd"})])
def test_a_compressed_image_is_packed_to_be_measured(
    format_name: str, options: dict[str, str], disks: dict[str, Path], tmp_path: Path
) -> None:
    new = {"format": "raw", "target_format": format_name, "options": options, "compressed": True}
    found = api.measure(disks["some"], **new)
    target = tmp_path / "disk.img"
    api.convert(disks["some"], target, **new)
    assert found.required == target.stat().st_size


def test_an_overlay_takes_what_differs_from_its_parent(disks: dict[str, Path], tmp_path: Path) -> None:
    changed = bytearray(disks["some"].read_bytes())
    changed[2 * MIB : 2 * MIB + 100] = b"x" * 100
    changed[:512] = bytes(512)
    (tmp_path / "changed").write_bytes(changed)
    parent = str(disks["some"])
    new = {"format": "raw", "target_format": "qcow2", "backing": parent, "backing_format": "raw"}
    found = api.measure(tmp_path / "changed", **new)
    api.convert(tmp_path / "changed", tmp_path / "over", **new)
    assert found.required == (tmp_path / "over").stat().st_size


def test_several_sources_are_one_disk_and_zeros_may_be_counted(disks: dict[str, Path], tmp_path: Path) -> None:
    both = [disks["some"], disks["some"]]
    found = api.measure(both, target_format="vdi", format="raw", copying=CopyOptions(sparse_bytes=0))
    api.convert(both, tmp_path / "t", format="raw", target_format="vdi", copying=CopyOptions(sparse_bytes=0))
    assert found.required == found.fully_allocated == (tmp_path / "t").stat().st_size


def test_bitmaps_come_on_top(tapfs: Run, disks: dict[str, Path], tmp_path: Path) -> None:
    image, target = tmp_path / "a.qcow2", tmp_path / "b.qcow2"
    api.convert(disks["some"], image, format="raw", target_format="qcow2")
    api.add_bitmap(image, "one")
    with api.open(image, writable=True) as disk:
        disk.write(5, b"marked")
    document = json.loads(tapfs("measure", "-O", "qcow2", "--output", "json", image).out)
    assert tapfs("convert", "--bitmaps", "-O", "qcow2", image, target).code == 0
    assert document["required"] + document["bitmaps"] == target.stat().st_size
    assert "bitmaps" not in json.loads(tapfs("measure", "-O", "raw", "--json", image).out)


@pytest.mark.parametrize("kind", ["qcow2", "vhdx", "vmdk-split"])
def test_a_size_alone_is_an_image_that_was_just_made(kind: str, tapfs: Run, tmp_path: Path) -> None:
    format_name, options = KINDS[kind]
    words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
    said = tapfs("measure", "-O", format_name, *words, "--name", "d", "--size", "300M").out.splitlines()
    assert tapfs("create", "-f", format_name, *words, tmp_path / "d", "300M").code == 0
    assert said[0] == f"required size: {written(tmp_path)}"
    assert said[1].startswith("fully allocated size: ")
    assert int(said[1].split()[-1]) > 300 << 20


def test_what_cannot_be_measured_is_refused_in_words(tapfs: Run, disks: dict[str, Path]) -> None:
    assert "either SOURCE or --size" in tapfs("measure", "-O", "qcow2").err
    assert "either SOURCE or --size" in tapfs("measure", "--size", "1M", disks["some"]).err
    assert "tapfs does not make qed images" in tapfs("measure", "-O", "qed", "--size", "1M").err
    with pytest.raises(ImageError, match="compressed") as caught:
        api.measure(disks["some"], target_format="vhd", compressed=True, format="raw")
    assert caught.value.kind is ErrorKind.UNSUPPORTED

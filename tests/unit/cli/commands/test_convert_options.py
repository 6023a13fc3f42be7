"""The options of `tapfs convert` that qemu-img has, too: several sources, --salvage, -S, -r, -m, --target-is-zero."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tapfs as api
from tapfs.errors import CODES, ErrorKind

Run = Callable[..., Any]
MIB = 1 << 20
DONE = (0, "", "")


def image(path: Path, name: str, *pieces: tuple[int, bytes], size: int = MIB) -> Path:
    api.create(path, name, size)
    with api.open(path, format=name, writable=True) as disk:
        for offset, data in pieces:
            disk.write(offset, data)
    return path


def test_several_sources_are_one_behind_the_other(tapfs: Run, tmp_path: Path) -> None:
    first = image(tmp_path / "a.qcow2", "qcow2", (5, b"first"))
    second = image(tmp_path / "b.vmdk", "vmdk", (MIB - 6, b"second"))
    third = tmp_path / "c.raw"
    third.write_bytes(b"third" * 100)
    target = tmp_path / "all.raw"
    assert tapfs("convert", first, second, third, target) == DONE
    found = target.read_bytes()
    assert (len(found), found[5:10], found[2 * MIB - 6 : 2 * MIB + 5]) == (2 * MIB + 500, b"first", b"secondthird")
    ran = tapfs("convert", "-b", first, "-F", "qcow2", "-O", "qcow2", first, second, target)
    assert ran.code == 64
    ran = tapfs("convert", first, target, target)
    assert ran.code == CODES[ErrorKind.EXISTS].exit_code
    assert target.read_bytes() == found


def test_salvage_names_what_became_zeros(tapfs: Run, tmp_path: Path) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(range(256)) * (4 * MIB // 256))
    packed = tmp_path / "a.qcow2"
    assert tapfs("convert", "-c", "-O", "qcow2", "-f", "raw", raw, packed) == DONE
    with api.open(packed) as disk:
        places = [place.host_offset for place in disk.layers[0].driver.map(0, disk.size)]
    with packed.open("r+b") as file:  # the payloads of two clusters
        for number in (3, 40):
            file.seek(places[number] + 2)
            file.write(b"\xff" * 30)
    target = tmp_path / "b.raw"
    assert tapfs("convert", packed, target).code == CODES[ErrorKind.CORRUPT].exit_code
    assert not target.exists()
    ran = tapfs("convert", "--salvage", packed, target)
    assert ran.code == 1
    lines = ran.err.splitlines()
    assert lines[0].startswith("tapfs: bytes 196608 to 262144 of the disk became zeros: ")
    assert lines[1].startswith("tapfs: bytes 2621440 to 2686976 of the disk became zeros: ")
    assert lines[2:] == ["tapfs: 131072 bytes could not be read"]
    expected = bytearray(raw.read_bytes())
    expected[196608:262144] = expected[2621440:2686976] = bytes(65536)
    assert target.read_bytes() == expected
    raw_copy = tmp_path / "c.raw"
    assert tapfs("convert", "--salvage", "-f", "raw", raw, raw_copy) == DONE
    assert raw_copy.read_bytes() == raw.read_bytes()


@pytest.mark.parametrize(("size", "blocks"), [("0", MIB), ("4k", 8192), ("64K", 65536)])
def test_s_says_how_many_zeros_are_a_hole(tapfs: Run, tmp_path: Path, size: str, blocks: int) -> None:
    raw = tmp_path / "a.raw"
    raw.write_bytes(b"x" + bytes(40959) + b"y" + bytes(MIB - 40961))
    target = tmp_path / "b.raw"
    assert tapfs("convert", "-S", size, "-f", "raw", raw, target) == DONE
    assert target.read_bytes() == raw.read_bytes()
    assert target.stat().st_blocks * 512 == blocks
    image_target = tmp_path / "b.qcow2"
    assert tapfs("convert", "-S", size, "-f", "raw", "-O", "qcow2", raw, image_target) == DONE
    with api.open(image_target) as disk:
        data = sum(extent.length for extent in disk.extents() if extent.data)
    assert data == (MIB if size == "0" else 65536)


def test_an_existing_target_that_is_zero_keeps_its_holes(tapfs: Run, tmp_path: Path) -> None:
    source = image(tmp_path / "a.qcow2", "qcow2", (MIB // 2, b"data" * 1024))
    target = tmp_path / "b.raw"
    with target.open("wb") as file:
        file.truncate(MIB)
    assert tapfs("convert", "-n", "--target-is-zero", "-O", "raw", source, target) == DONE
    assert tapfs("compare", "-s", "-F", "raw", source, target).code == 0
    assert target.stat().st_blocks * 512 == 4096
    target.write_bytes(b"z" * MIB)  # it is not zero, and the option says so: what was there stays
    assert tapfs("convert", "-n", "--target-is-zero", "-O", "raw", source, target) == DONE
    assert target.read_bytes()[:4] == b"zzzz"
    assert tapfs("convert", "--target-is-zero", "-O", "raw", source, target).code == 64


def test_an_existing_target_takes_no_options_of_a_new_one(tapfs: Run, tmp_path: Path) -> None:
    """qemu-img takes -c, and fails in the middle where the target holds data already."""
    for option in ("-c", "-b", "-o", "--encrypt"):
        value = {"-b": ["base.raw"], "-o": ["compat=1.1"]}.get(option, [])
        code, out, err = tapfs("convert", "-n", option, *value, "-O", "qcow2", tmp_path / "a", tmp_path / "b")
        assert (code, out) == (64, "")
        assert f"leave out {option}" in err


def test_letters_that_scripts_bring_along(tapfs: Run, tmp_path: Path) -> None:
    source = image(tmp_path / "a.qcow2", "qcow2", (4000, b"data" * 1024))
    target = tmp_path / "b.qcow2"
    words = ("-W", "-C", "-m", "16", "-t", "none", "-T", "none", "-r", "100M", "-U", "-p", "-q")
    assert tapfs("convert", *words, "-O", "qcow2", source, target) == DONE
    assert tapfs("compare", "-q", "-s", source, target) == DONE
    for letter in ("-b", "-B"):
        over = tmp_path / f"over{letter}.qcow2"
        assert tapfs("convert", letter, source, "-F", "qcow2", "-O", "qcow2", target, over) == DONE
        assert over.stat().st_size < target.stat().st_size
    said = f"backing_file={source},backing_fmt=qcow2,cluster_size=4096"
    assert tapfs("convert", "-o", said, "-O", "qcow2", target, tmp_path / "o.qcow2") == DONE
    with api.open(tmp_path / "o.qcow2") as disk:
        assert (disk.granule, disk.parents) == (4096, (str(source),))
    assert tapfs("create", "-f", "qcow2", "-b", source, "-B", "qcow2", tmp_path / "c.qcow2") == DONE
    assert (
        tapfs("create", "-f", "qcow2", "-o", f"backing_file={source},backing_fmt=qcow2", tmp_path / "d.qcow2") == DONE
    )
    assert tapfs("convert", "-b", source, "-o", said, "-O", "qcow2", target, over).code == 64


@pytest.mark.parametrize(
    "words",
    [
        ("--image-opts",),
        ("--target-image-opts",),
        ("--object", "x"),
        ("-t", "slow"),
        ("-m", "0"),
        ("-S", "x"),
    ],
)
def test_words_that_mean_nothing_here_are_refused(tapfs: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    source = image(tmp_path / "a.qcow2", "qcow2")
    ran = tapfs("convert", *words, source, tmp_path / "b")
    assert (ran.code, ran.out) == (64, "")
    assert words[0] in ran.err
    assert os.listdir(tmp_path) == ["a.qcow2"]

"""`tapfs map --json` agrees with `qemu-img map --output=json`."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.peer.test_convert import MIB, converted_by_qemu, overlay_for_qemu, qemu

Run = Callable[..., Any]

#: QEMU before 8.2 has no "compressed".
KEYS = ("start", "length", "depth", "present", "zero", "data", "offset")


def _reduced(text: str) -> list[dict[str, Any]]:
    return [{key: extent[key] for key in KEYS if key in extent} for extent in json.loads(text)]


def _agree(tapfs: Run, image: Path, qemu_words: tuple[str, ...], *words: object) -> list[dict[str, Any]]:
    ran = tapfs("map", "--json", *words, image)
    assert (ran.code, ran.err) == (0, "")
    ours = _reduced(ran.out)
    assert ours == _reduced(qemu("qemu-img", "map", "--output=json", *qemu_words))
    return ours


@pytest.mark.parametrize("options", [(), ("-c",)])
def test_a_converted_image(tapfs: Run, sample: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    for number, maker in enumerate(("qemu", "tapfs")):
        image = tmp_path / f"{number}.qcow"
        if maker == "qemu":
            converted_by_qemu(sample, image, *options)
        else:
            assert tapfs("convert", *options, "-f", "raw", "-O", "qcow", sample, image).code == 0
        extents = _agree(tapfs, image, ("-f", "qcow", str(image)))
        assert len(extents) > 3
        compressed = [extent["compressed"] for extent in json.loads(tapfs("map", "--json", image).out)]
        assert any(compressed) == bool(options)


def test_scattered_writes(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    qemu("qemu-img", "create", "-f", "qcow", image, 64 * MIB)
    chance = random.Random(3)
    commands = []
    for _ in range(150):
        commands += ["-c", f"write {4096 * chance.randrange(16384 - 4)} {4096 * chance.randrange(1, 4)}"]
    qemu("qemu-io", "-f", "qcow", *commands, image)
    assert len(_agree(tapfs, image, ("-f", "qcow", str(image)))) > 200


def test_an_empty_image(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    qemu("qemu-img", "create", "-f", "qcow", image, "100G")
    assert len(_agree(tapfs, image, ("-f", "qcow", str(image)))) == 1


@pytest.mark.parametrize("parent_format", ["raw", "qcow"])
@pytest.mark.parametrize("size", [2 * MIB, 6 * MIB])
def test_an_overlay(tapfs: Run, sample: Path, tmp_path: Path, parent_format: str, size: int) -> None:
    parent, image = tmp_path / "parent", tmp_path / "a.qcow"
    qemu("qemu-img", "convert", "-f", "raw", "-O", parent_format, sample, parent)
    qemu("qemu-img", "create", "-f", "qcow", "-b", parent, "-F", parent_format, image, size)
    opened = overlay_for_qemu(image, parent, parent_format)
    commands = [word for offset in (0, 5, 9, 1200, 3000) for word in ("-c", f"write {offset * 512} 1024")]
    qemu("qemu-io", "--image-opts", *commands, opened)
    extents = _agree(tapfs, image, ("--image-opts", opened), "--backing-format", parent_format)
    assert {extent["depth"] for extent in extents} == {0, 1}


def test_a_raw_file_with_holes(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "a.raw"
    with image.open("wb") as file:
        for block in (0, 3, 4, 40, 41, 77):
            file.seek(block * 65536)
            file.write(b"x" * 65536)
    os.truncate(image, 8 * MIB)
    assert len(_agree(tapfs, image, ("-f", "raw", str(image)), "-f", "raw")) == 8


def test_an_encrypted_image(tapfs: Run, tmp_path: Path) -> None:
    key, image = tmp_path / "key", tmp_path / "a.qcow"
    key.write_text("pw")
    secret = ("--object", f"secret,id=s,file={key}")
    options = "encrypt.format=aes,encrypt.key-secret=s"
    qemu("qemu-img", "create", "-q", *secret, "-f", "qcow", "-o", options, image, MIB)
    opened = f"driver=qcow,file.filename={image},{options}"
    qemu("qemu-io", *secret, "--image-opts", "-c", "write 64k 64k", opened)
    _agree(tapfs, image, (*secret, "--image-opts", opened))


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("extended_l2=on",),
        ("extended_l2=on", "preallocation=metadata", "short"),
        ("extended_l2=on", "data_file=outside", "short"),
    ],
    ids="-".join,
)
def test_zeros_that_have_a_place(
    tapfs: Run, tmp_path: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run of zeros that are written over data says where that was, apart from zeros beside it that have none."""
    monkeypatch.chdir(tmp_path)
    image = tmp_path / "a.qcow2"
    (tmp_path / "short").write_bytes(b"s" * MIB)
    backing = ("-b", "short", "-F", "raw") if "short" in options else ()
    words = [word for each in options if "=" in each for word in ("-o", each)]
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *words, *backing, image, 2 * MIB + 512)
    wishes = ("write 100k 300k", "write -z 110k 200k", "write 1M 64k", "write -z 1M 64k", "write -z 1100k 400k")
    wishes = (*wishes, "write 1600k 128k", "write -z 1600k 3k", "write 2M 512", "write -z 2M 512")
    qemu("qemu-io", "-f", "qcow2", *(word for wish in wishes for word in ("-c", wish)), image)
    extents = _agree(tapfs, image, ("-f", "qcow2", str(image)))
    assert sum(extent["zero"] and "offset" in extent for extent in extents) >= 3
    if "data_file=outside" in options:
        return  # --no-backing opens no data file
    own = [extent for extent in extents if extent["depth"] == 0 and extent["present"]]
    alone = _reduced(tapfs("map", "--json", "--no-backing", image).out)
    assert [extent for extent in alone if extent["depth"] == 0 and extent["present"]] == own


def test_a_part_of_the_map(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow", sample, image)
    part = ("--start-offset=100K", "--max-length=1M")
    _agree(tapfs, image, ("-f", "qcow", *part, str(image)), "-s", "100K", "-l", "1M")


def test_the_human_table_is_qemus_too(tapfs: Run, sample: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow"
    assert tapfs("convert", "-f", "raw", "-O", "qcow", sample, image).code == 0
    theirs = subprocess.run(["qemu-img", "map", "-f", "qcow", image], capture_output=True, text=True, check=True).stdout
    assert _rows(tapfs("map", image).out) == _rows(theirs)


def _rows(table: str) -> list[tuple[int, int, int, str]]:
    """QEMU prints 0 as "0", not as "0x0"."""
    rows = [line.split() for line in table.splitlines()[1:]]
    return [(int(offset, 16), int(length, 16), int(place, 16), path) for offset, length, place, path in rows]

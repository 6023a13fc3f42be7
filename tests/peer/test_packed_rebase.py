"""`tapfs rebase -c`: what is written into a qcow2 image is packed, clean for QEMU, and the disk is the same."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
MIB = 1 << 20


def qemu(*words: str | Path) -> str:
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    """An overlay with data of its own over old.raw; new.raw differs in data, and in zeros either way."""
    return make_overlay(tmp_path)


def make_overlay(tmp_path: Path, *options: str) -> Path:
    """The overlay, with options of qemu-img."""
    old = bytearray(5 * MIB + 512)
    old[: 2 * MIB] = b"a line of text that shrinks\n" * (2 * MIB // 28) + bytes(2 * MIB % 28)
    old[3 * MIB : 3 * MIB + 300_000] = random.Random(7).randbytes(300_000)
    new = bytearray(old)
    new[:MIB] = bytes(MIB)
    new[3 * MIB : 4 * MIB] = b"x" * MIB
    new[4 * MIB + 70_000 :] = b"y" * (MIB + 512 - 70_000)
    (tmp_path / "old.raw").write_bytes(old)
    (tmp_path / "new.raw").write_bytes(new)
    image = tmp_path / "over.qcow2"
    words = [word for each in options for word in ("-o", each)]
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *words, "-b", "old.raw", "-F", "raw", image)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 9 512k 100k", "-c", "write -z 3500k 128k", image)
    return image


@pytest.mark.parametrize("backing", ["new.raw", ""])
@pytest.mark.usefixtures("each_qemu")
def test_what_is_written_is_packed_and_the_disk_is_the_same(backing: str, overlay: Path, tapfs: Run) -> None:
    wanted = overlay.with_name("wanted.raw")
    qemu("qemu-img", "convert", "-O", "raw", overlay, wanted)
    formats = ["-F", "raw"] if backing else []
    assert tapfs("rebase", "-c", "-b", backing, *formats, overlay).code == 0
    found = json.loads(qemu("qemu-img", "check", "--output=json", overlay))
    assert found["compressed-clusters"] > 10
    assert found.get("leaks", 0) == found.get("corruptions", 0) == 0
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", wanted, overlay)
    assert tapfs("check", overlay).code == 0
    assert tapfs("compare", "-f", "raw", wanted, overlay, "--second-backing-format", "raw").code == 0


@pytest.mark.parametrize("preallocation", ["off", "metadata"])
def test_a_cluster_that_holds_some_of_its_subclusters_is_written_plain(
    preallocation: str, tmp_path: Path, tapfs: Run
) -> None:
    """All others are packed, those too that have a place which none of their subclusters uses.

    QEMU 11.1 ends itself in the first case, on an assertion in img_rebase.
    """
    overlay = make_overlay(tmp_path, "extended_l2=on", f"preallocation={preallocation}")
    wishes = ("write -P 3 130k 2k", "write -z 194k 4k", "write -P 4 4098k 2k", "write -P 5 5119k 1k")
    qemu("qemu-io", "-f", "qcow2", *(word for each in wishes for word in ("-c", each)), overlay)
    wanted = overlay.with_name("wanted.raw")
    qemu("qemu-img", "convert", "-O", "raw", overlay, wanted)
    assert tapfs("rebase", "-c", "-b", "new.raw", "-F", "raw", overlay).code == 0
    found = json.loads(qemu("qemu-img", "check", "--output=json", overlay))
    # Of the first MiB all clusters but those at 128k, 192k, and the two of the fixture's own at 512k and 576k.
    assert found["compressed-clusters"] >= 13
    assert found.get("leaks", 0) == found.get("corruptions", 0) == 0
    assert tapfs("check", overlay).code == 0
    runs = json.loads(qemu("qemu-img", "map", "--output=json", overlay))
    plain = next(run for run in runs if run["start"] <= 131072 < run["start"] + run["length"])
    assert (plain["depth"], plain["data"], "offset" in plain) == (0, True, True)
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", wanted, overlay)
    qemu("qemu-img", "rebase", "-u", "-b", "", overlay)
    alone = json.loads(qemu("qemu-img", "map", "--output=json", overlay))
    shown = [run["start"] for run in alone if not run["present"] and run["start"] < 1 << 20]
    assert not shown, "zeros or data of the first MiB still come from the parent"


@pytest.mark.usefixtures("each_qemu")
def test_a_copy_over_a_parent_is_packed(overlay: Path, tapfs: Run) -> None:
    """What the parent has alike is left to it, zeros hide it, and the source may end before it does."""
    wanted, packed, plain = (overlay.with_name(name) for name in ("wanted.raw", "packed.qcow2", "plain.qcow2"))
    qemu("qemu-img", "convert", "-O", "raw", overlay, wanted)
    over = ("-f", "qcow2", "-O", "qcow2", "-B", "new.raw", "-F", "raw")
    assert tapfs("convert", "-c", *over, "-r", "1G", "-m", "3", overlay, packed) == (0, "", "")
    assert tapfs("convert", *over, overlay, plain) == (0, "", "")
    found = json.loads(qemu("qemu-img", "check", "--output=json", packed))
    assert found["compressed-clusters"] > 10
    assert found.get("leaks", 0) == found.get("corruptions", 0) == 0
    assert packed.stat().st_size < plain.stat().st_size // 2
    extended = overlay.with_name("extended.qcow2")
    assert tapfs("convert", "-c", *over, "-o", "extended_l2=on", overlay, extended) == (0, "", "")
    assert json.loads(qemu("qemu-img", "check", "--output=json", extended))["compressed-clusters"] > 10
    for image in (packed, plain, extended):
        qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", wanted, image)
        assert tapfs("check", image).code == 0
    shorter = overlay.with_name("shorter.raw")
    shorter.write_bytes(wanted.read_bytes()[: 4 * MIB + 512])
    assert tapfs("convert", "-c", "-f", "raw", *over[2:], shorter, packed) == (0, "", "")
    qemu("qemu-img", "compare", "-f", "raw", "-F", "qcow2", shorter, packed)


def test_an_image_that_takes_no_packed_data_stays_as_it_is(tapfs: Run, tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).write_bytes(name.encode() * 30_000)
    for options in (["-f", "qcow2", "-o", "data_file=data"], ["-f", "qcow"]):
        image = tmp_path / "over"
        assert tapfs("create", "--force", *options, "-b", tmp_path / "old", "-F", "raw", image).code == 0
        content = image.read_bytes()
        refused = tapfs("rebase", "-c", "-b", tmp_path / "new", "-F", "raw", "--backing-format", "raw", image)
        assert (refused.code, "takes no compressed data" in refused.err) == (12, True)
        assert image.read_bytes() == content

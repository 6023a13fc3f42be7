"""qcow2 images that QEMU writes, of every kind: tapfs reads the same disk, and its map is QEMU's."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import tapfs as tapfs_package
from tapfs import ErrorKind, ImageError
from tapfs.driver import OpenRequest
from tapfs.formats.qcow2 import FORMAT
from tapfs.testing.model import MemoryFile
from tests.conftest import Ran
from tests.peer.test_convert import MIB, qemu
from tests.peer.test_map import KEYS

Run = Callable[..., Ran]

SIZE = 6 * MIB + 512

#: Options of qemu-img create, and whether there is a backing file.
KINDS: dict[str, tuple[str, bool]] = {
    **{f"v2 {size}": (f"compat=0.10,cluster_size={size}", size != 4096) for size in (512, 4096, 65536, 2 * MIB)},
    **{f"v3 {size}": (f"compat=1.1,cluster_size={size}", size == 4096) for size in (512, 4096, 65536, 2 * MIB)},
    "refcounts of 1 bit": ("refcount_bits=1,cluster_size=4096", False),
    "refcounts of 64 bits": ("refcount_bits=64", True),
    "zstd": ("compression_type=zstd", False),
    "zstd 512": ("compression_type=zstd,cluster_size=512", True),
    "subclusters": ("extended_l2=on", True),
    "subclusters 16K": ("extended_l2=on,cluster_size=16384", True),
    "subclusters 2M": ("extended_l2=on,cluster_size=2097152", False),
    "data file": ("data_file=outside", True),
    "raw data file": ("data_file=outside,data_file_raw=on", False),
    "lazy": ("lazy_refcounts=on", False),
    "preallocated": ("preallocation=falloc", False),
}


def requests(seed: str, size: int, cluster: int, *, packed: bool) -> list[str]:
    """Commands of qemu-io: writes, zeros of both sorts, discards, and compressed clusters where none is yet."""
    choice = random.Random(seed)
    commands: list[str] = []
    for number in range(8 if packed else 0):
        offset = (size // cluster - 1 - 3 * number) * cluster
        if offset >= 0:
            commands.append(f"write -c -P {100 + number} {offset} {cluster}")
    for number in range(40):
        offset = choice.randrange(size // 512) * 512
        length = min(choice.choice([512, 4096, 69632, 300 << 10]), size - offset)
        verb = choice.choice([f"write -P {number + 1}"] * 5 + ["write -z", "write -z -u", "discard"])
        commands.append(f"{verb} {offset} {length}")
    return commands


def written_by_qemu(folder: Path, kind: str, size: int = SIZE) -> Path:
    """An image of a kind that was written to at random."""
    options, has_backing = KINDS[kind]
    image = folder / "image"
    words: list[str] = []
    if has_backing:
        (folder / "base").write_bytes(random.Random(kind).randbytes(size * 3 // 4 // 512 * 512))
        words = ["-b", "base", "-F", "raw"]
    options = options.replace("data_file=outside", f"data_file={folder}/outside")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *words, image, size)
    named = dict(option.split("=") for option in options.split(","))
    cluster = int(named.get("cluster_size", "65536"))
    commands = requests(kind, size, cluster, packed=not {"data_file", "preallocation"} & named.keys())
    qemu("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), image)
    return image


def by_qemu(image: Path, *words: str) -> bytes:
    raw = image.with_suffix(".raw")
    qemu("qemu-img", "convert", *(words or ("-f", "qcow2")), "-O", "raw", image, raw)
    return raw.read_bytes()


def comparable(extents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Extents without the place of zeros, and without what QEMU finds to be holes of the file, merged again."""
    merged: list[dict[str, Any]] = []
    for each in extents:
        zero = each["zero"] and not each["data"]
        extent = {key: each[key] for key in KEYS if key in each and not (key == "offset" and zero)} | {"zero": zero}
        last = merged[-1] if merged else None
        if last is not None and all(last[key] == extent[key] for key in ("depth", "present", "zero", "data")):
            place = last["offset"] + last["length"] if "offset" in last else None
            if extent.get("offset") == place:
                last["length"] += extent["length"]
                continue
        merged.append(extent)
    return merged


@pytest.mark.parametrize("kind", KINDS)
def test_what_qemu_writes_is_read_and_mapped(tapfs: Run, tmp_path: Path, kind: str) -> None:
    image = written_by_qemu(tmp_path, kind)
    expected = by_qemu(image)
    with tapfs_package.open(image, format="qcow2") as disk:
        assert disk.read(0, disk.size) == expected
    # The driver's map, which the engine's decoding must follow, and the map of a writable image.
    for words in ((), ("--backing-format", "raw")):
        ours = json.loads(tapfs("map", "--json", *words, image).out)
        theirs = json.loads(qemu("qemu-img", "map", "-f", "qcow2", "--output=json", image))
        assert comparable(ours) == comparable(theirs)
        assert len(ours) > 1


@pytest.mark.parametrize("options", ["", "compression_type=zstd", "cluster_size=512", "cluster_size=2M"])
def test_what_qemu_compresses_is_read(sample: Path, tmp_path: Path, options: str) -> None:
    image = tmp_path / "image"
    words = ["-o", options] if options else []
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *words, sample, image)
    with tapfs_package.open(image, format="qcow2") as disk:
        content = sample.read_bytes()
        assert disk.read(0, disk.size) == content
        for offset in range(0, len(content) - 700, 77_777):
            assert disk.read(offset, 700) == content[offset : offset + 700]


def test_internal_snapshots(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, 3 * MIB)
    states: dict[str, bytes] = {}
    for number, name in enumerate(("first", "second"), start=1):
        qemu("qemu-io", "-f", "qcow2", "-c", f"write -P {number} {number * 60000} 300000", image)
        qemu("qemu-img", "snapshot", "-c", name, image)
        states[name] = by_qemu(image)
    qemu("qemu-img", "resize", "-q", "-f", "qcow2", image, 4 * MIB)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 4M", image)
    driver = FORMAT.open(MemoryFile(image.read_bytes()), OpenRequest())
    assert list(driver.snapshots()) == ["first", "second"]
    for name, number in (("first", "1"), ("second", "2")):
        for words in (name, number):
            assert tapfs("convert", "--snapshot", words, "-O", "raw", image, tmp_path / "out").code == 0
            assert (tmp_path / "out").read_bytes() == states[name]
    assert tapfs("compare", "--snapshot", "first", image, tmp_path / "image.raw").code == 1
    assert tapfs("info", "--snapshot", "second", image).code == 0
    code, _, err = tapfs("map", "--snapshot", "third", image)
    assert code == 17
    assert "has no snapshot 'third'; there are: first, second" in err
    with pytest.raises(ImageError) as raised:
        tapfs_package.open(image, snapshot="first", writable=True)
    assert raised.value.kind is ErrorKind.READ_ONLY
    listed = json.loads(tapfs("info", "--json", image).out)["details"]["snapshots"]
    assert [(each["name"], each["virtual_size"]) for each in listed] == [("first", 3 * MIB), ("second", 3 * MIB)]


def test_bitmaps_are_listed(tapfs: Run, tmp_path: Path) -> None:
    image = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, 3 * MIB)
    qemu("qemu-img", "bitmap", "-f", "qcow2", "--add", "-g", "65536", image, "followed")
    qemu("qemu-img", "bitmap", "-f", "qcow2", "--add", "--disable", image, "still")
    listed = json.loads(tapfs("info", "--json", image).out)["details"]["bitmaps"]
    assert listed == [
        {"name": "followed", "granularity": 65536, "enabled": True, "consistent": True},
        {"name": "still", "granularity": 65536, "enabled": False, "consistent": True},
    ]


def test_the_old_encryption_is_read(tapfs: Run, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("a password that is longer")
    plain, image = tmp_path / "plain", tmp_path / "image"
    plain.write_bytes(random.Random(5).randbytes(MIB))
    secret = ("--object", f"secret,id=s,file={tmp_path}/key")
    options = "encrypt.format=aes,encrypt.key-secret=s"
    ran = subprocess.run(
        ["qemu-img", "convert", *secret, "-f", "raw", "-O", "qcow2", "-o", options, plain, image],
        capture_output=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    words = ("--key-file", tmp_path / "key")
    assert tapfs("compare", *words, "-F", "raw", image, plain).code == 0
    code, _, err = tapfs("mount", "--rw", *words, image, tmp_path / "nowhere")
    assert code != 0
    assert err


@pytest.mark.parametrize("parent", ["qcow", "qcow2", "raw"])
def test_chains_of_formats(tapfs: Run, sample: Path, tmp_path: Path, parent: str) -> None:
    (tmp_path / "deep").mkdir()
    qemu("qemu-img", "convert", "-f", "raw", "-O", parent, sample, tmp_path / "base")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", tmp_path / "base", "-F", parent, tmp_path / "deep" / "a")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "a", "-F", "qcow2", tmp_path / "deep" / "b")
    for number, name in enumerate("ab"):
        commands = ("-c", f"write -P 7{number} {100 + number * 80}k 90k", "-c", f"write -z {200 + number * 99}k 70k")
        qemu("qemu-io", "-f", "qcow2", *commands, tmp_path / "deep" / name)
    assert tapfs("convert", "-O", "raw", tmp_path / "deep" / "b", tmp_path / "out").code == 0
    assert (tmp_path / "out").read_bytes() == by_qemu(tmp_path / "deep" / "b")

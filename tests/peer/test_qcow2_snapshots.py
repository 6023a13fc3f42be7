"""qcow2 snapshots by tapfs and by QEMU in turns: both read the same disks, and both checks are clean."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tapfs.testing.model import MemoryFile
from tests.conftest import Ran
from tests.crash.test_qcow2_snapshots import Edit, done
from tests.peer.newest_qemu import newest_qemu
from tests.peer.test_convert import qemu

Run = Callable[..., Ran]
SIZE = 3 << 20

KINDS = {
    "default": "compat=1.1",
    "version 2": "compat=0.10,cluster_size=4096",
    "512": "cluster_size=512",
    "2M": "cluster_size=2097152",
    "4 bits": "refcount_bits=4,cluster_size=1024",
    "64 bits": "refcount_bits=64,cluster_size=65536",
    "subclusters": "extended_l2=on,cluster_size=16384",
    "lazy": "lazy_refcounts=on",
    "zstd": "compression_type=zstd",
}


def system_qemu(program: str) -> str:
    return program


class Turns:
    """An image, and what its disk and its snapshots should be."""

    def __init__(self, tapfs: Run, tool: Callable[[str], str], image: Path, seed: str) -> None:
        self.tapfs, self.tool, self.image = tapfs, tool, image
        self.choice = random.Random(seed)
        self.kept: dict[str, bytes] = {}

    def write(self) -> None:
        commands: list[str] = []
        for _ in range(8):
            offset = self.choice.randrange(SIZE // 512 - 200) * 512
            verb = self.choice.choice(["write -P 7", "write -P 9", "write -z", "discard"])
            commands += ["-c", f"{verb} {offset} {self.choice.choice([512, 4096, 90112])}"]
        qemu(self.tool("qemu-io"), "-f", "qcow2", *commands, self.image)

    def edit(self, letter: str, name: str, *, by_tapfs: bool) -> None:
        if by_tapfs:
            ran = self.tapfs("snapshot", letter, name, self.image)
            assert (ran.code, ran.out, ran.err) == (0, "", "")
        else:
            qemu(self.tool("qemu-img"), "snapshot", letter, name, self.image)

    def whole(self, *words: str) -> bytes:
        raw = self.image.with_suffix(".raw")
        qemu(self.tool("qemu-img"), "convert", *words, "-O", "raw", self.image, raw)
        return raw.read_bytes()

    def whole_by_tapfs(self, *words: str) -> bytes:
        raw = self.image.with_suffix(".raw")
        assert self.tapfs("convert", *words, "-O", "raw", self.image, raw).code == 0
        return raw.read_bytes()

    def look(self, current: bytes) -> None:
        qemu(self.tool("qemu-img"), "check", "-q", self.image)
        assert self.tapfs("check", "-q", self.image).code == 0
        assert self.whole() == self.whole_by_tapfs() == current
        for name, disk in self.kept.items():
            assert self.whole("-l", f"snapshot.name={name}") == disk
            assert self.whole_by_tapfs("--snapshot", name) == disk
        listed: list[dict[str, Any]] = json.loads(self.tapfs("snapshot", "--json", self.image).out)["snapshots"]
        shown = json.loads(qemu(self.tool("qemu-img"), "info", "--output=json", self.image)).get("snapshots", [])
        assert [(each["id"], each["name"], each["seconds"]) for each in listed] == [
            (each["id"], each["name"], each["date-sec"]) for each in shown
        ]
        assert [each["name"] for each in listed] == list(self.kept)


@pytest.mark.parametrize("tool", [system_qemu, newest_qemu])
@pytest.mark.parametrize("kind", KINDS)
def test_turns(kind: str, tool: Callable[[str], str], tapfs: Run, tmp_path: Path) -> None:
    turns = Turns(tapfs, tool, tmp_path / "image", kind)
    qemu(tool("qemu-img"), "create", "-q", "-f", "qcow2", "-o", KINDS[kind], turns.image, SIZE)
    for number, by_tapfs in enumerate((True, False, True)):
        turns.write()
        current = turns.whole()
        turns.edit("-c", f"s{number}", by_tapfs=by_tapfs)
        turns.kept[f"s{number}"] = current
    turns.write()
    turns.look(turns.whole())
    for name, by_tapfs in (("s1", True), ("s0", False)):
        turns.edit("-a", name, by_tapfs=by_tapfs)
        turns.look(turns.kept[name])
        turns.write()
    for name, by_tapfs in (("s1", True), ("s0", False), ("s2", True)):
        current = turns.whole()
        turns.edit("-d", name, by_tapfs=by_tapfs)
        del turns.kept[name]
        turns.look(current)
        turns.write()


def test_compressed_clusters_have_several_references_each(tapfs: Run, tmp_path: Path) -> None:
    """Several payloads lie in one cluster of the file: its count rises by one for each of them."""
    raw, image = tmp_path / "raw", tmp_path / "image"
    raw.write_bytes(b"".join(bytes([number % 251]) * 4096 for number in range(SIZE // 4096)))
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, image)
    for word, name in (("-c", "one"), ("-c", "two"), ("-a", "one"), ("-d", "two"), ("-d", "one")):
        assert tapfs("snapshot", word, name, image).code == 0
        qemu("qemu-img", "check", "-q", image)
        qemu("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", raw, image)


def test_qemu_goes_on_after_each_crash_of_an_edit(tapfs: Run, tmp_path: Path) -> None:
    """QEMU repairs an image that says it is dirty when it opens it for writing, and reads the same disk."""
    image = tmp_path / "image"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", image, SIZE)
    turns = Turns(tapfs, system_qemu, image, "crash")
    turns.write()
    current = turns.whole()
    edits: list[Edit] = [lambda each: each.create_snapshot("s", 1), lambda each: each.delete_snapshot("s")]
    for number, edit in enumerate(edits):
        file = MemoryFile(image.read_bytes())
        done(file, edit)
        choice = random.Random(number)
        for epoch in range(len(file.epochs)):
            left = tmp_path / "left"
            left.write_bytes(file.crashed(epoch, choice))
            qemu("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 512", "-c", "flush", left)
            checked = json.loads(qemu_any("qemu-img", "check", "--output=json", left))
            assert "corruptions" not in checked, (number, epoch)
            qemu("qemu-io", "-f", "qcow2", "-c", "read -P 1 0 512", left)
            raw = tmp_path / "raw"
            qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", left, raw)
            assert raw.read_bytes()[512:] == current[512:]
        image.write_bytes(bytes(file.data))


def qemu_any(*words: object) -> str:
    """What one of QEMU's tools prints, whatever its exit code."""
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False).stdout

"""One run of the matrix: an image that tapfs and QEMU change in turns, and that both check and read after each turn."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import tapfs
from tests.peer.qcow2_matrix.kinds import KIB, Kind, drawn
from tests.peer.qcow2_matrix.writers import Expected, Qemu, Snapshot, Tapfs
from tests.peer.test_qcow2_read import comparable
from tests.qcow2_images import audit


class Run:
    """An image in a folder of its own, and what must be true of it."""

    def __init__(
        self, kind: Kind, choice: random.Random, folder: Path, programs: Path | None, *, made_by_tapfs: bool
    ) -> None:
        self.kind, self._choice, self._folder = kind, choice, folder
        self._image = folder / "image"
        self.qemu = Qemu(programs, self._image, kind)
        self.tapfs = Tapfs(self._image, kind)
        self._snapshots: list[Snapshot] = []
        # QEMU measures how fast it derives a key, and gives up where the machine is busy (tests/peer/test_luks.py).
        creator = self.tapfs if made_by_tapfs or kind.encrypted else self.qemu
        self.said = [f"made by {creator.name}"]
        content = self._below()
        creator.create()
        self._expected = Expected(content)
        self._look()

    def _below(self) -> bytes:
        """Make the image below, or the disk that is packed; the bytes of the new image's disk."""
        kind = self.kind
        if kind.packed:
            pieces = [bytes(9000), b"text " * 3000, self._choice.randbytes(20_000)]
            content = b"".join(self._choice.choice(pieces) for _ in range(kind.size // 9000 + 1))[: kind.size]
            (self._folder / "content").write_bytes(content)
            return content
        if kind.parent is None:
            return bytes(kind.size)
        content = self._choice.randbytes(kind.parent_size)
        (self._folder / "raw").write_bytes(content)
        below = self._folder / "below"
        tapfs.convert(self._folder / "raw", below, format="raw", target_format=kind.parent)
        return content[: kind.size].ljust(kind.size, b"\0")

    def turn(self) -> None:
        """One of the two changes the image, or edits it."""
        if self._choice.random() < 0.35:
            self.edit()
        else:
            self.change(self._choice.choice([self.qemu, self.tapfs]), self._choice.choice([5, 25]))

    def change(self, who: Qemu | Tapfs, requests: int) -> None:
        """Random requests by one of the two."""
        self.said.append(f"changed by {who.name}")
        who.change(self._expected, self._choice, requests)
        self._look()

    def edit(self) -> None:
        """A snapshot made, applied or deleted, or another size."""
        self._choice.choice([self._resize, self._snapshot])(self._choice.choice([self.qemu, self.tapfs]))
        self._look()

    def _snapshot(self, who: Qemu | Tapfs) -> None:
        if not self.kind.can_keep_snapshots:
            return
        letter = self._choice.choice(["-c", "-c", "-a", "-d"]) if self._snapshots else "-c"
        if letter == "-c":
            name = f"s{len(self.said)}"
            self._snapshots.append(Snapshot(name, bytes(self._expected.bytes)))
        else:
            name, content = self._choice.choice(self._snapshots)
            if letter == "-a":
                self._expected = Expected(content)
            else:
                self._snapshots = [each for each in self._snapshots if each.name != name]
        self.said.append(f"snapshot {letter} {name} by {who.name}")
        who.snapshot(letter, name)

    def _resize(self, who: Qemu | Tapfs) -> None:
        if self.kind.version_2 and self._snapshots and who is self.tapfs:
            return  # of version 2, which need not say their sizes
        size = len(self._expected.bytes) + self._choice.choice([-700, -64, 512, 900, 4096]) * KIB
        size = max(self.kind.cluster, size) // 512 * 512
        if self.kind.options.get("data_file_raw"):
            size = max(size, len(self._expected.bytes))
        self.said.append(f"resized to {size} by {who.name}")
        end = len(self._expected.bytes)
        if who.resize(size):
            self._expected.resize(size)
            if who is self.qemu and size > end:
                # QEMU shows what the last cluster held behind the old end, before the disk was shrunk to it.
                stale = slice(end, min(size, -(-end // self.kind.cluster) * self.kind.cluster))
                self._expected.bytes[stale] = self.tapfs.read()[stale]

    def _look(self) -> None:
        self._expected.settle(self.qemu.read(), "QEMU")
        self._expected.settle(self.tapfs.read(), "tapfs")
        self.qemu.check()
        self.tapfs.check()
        found = audit(self._image.read_bytes())
        assert (found.corruptions, found.leaks) == ([], []), (found.corruptions[:4], found.leaks[:4])
        for name, content in self._snapshots:
            assert self.tapfs.read_snapshot(name) == content, f"tapfs reads snapshot {name} wrongly"
            # QEMU gives a snapshot the size of the current disk.
            theirs = self.qemu.read_snapshot(name)
            assert theirs[: len(content)] == content[: len(theirs)], f"QEMU reads snapshot {name} wrongly"

    def compare_maps(self) -> None:
        """Both say the same of every extent; a map of tapfs needs no password."""
        words = ("map", "--json", "-f", "qcow2", str(self._image))
        ours = subprocess.run([sys.executable, "-m", "tapfs.cli", *words], capture_output=True, text=True, check=True)
        assert comparable(json.loads(ours.stdout)) == comparable(json.loads(self.qemu.map()))


def run(seed: str, turns: int, programs: Path | None, folder: Path) -> str:
    """One run; the result says what was done. Whatever fails says it, too."""
    choice = random.Random(seed)
    kind = drawn(choice)
    one: Run | None = None
    try:
        one = Run(kind, choice, folder, programs, made_by_tapfs=choice.random() < 0.5)
        for _ in range(turns):
            one.turn()
        one.compare_maps()
    except Exception as error:
        error.add_note(f"{kind}; {', '.join(one.said if one else [])}")
        raise
    return f"{kind}; {', '.join(one.said)}"

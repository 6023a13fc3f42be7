"""The two writers of the matrix: each makes an image, changes it, edits it, and says what it reads as."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path
from typing import NamedTuple

import tapfs
from tapfs.disk.chain import OpenOptions
from tapfs.extent import Kind
from tapfs.jobs.resize import resize_image
from tests.peer.qcow2_matrix import kinds

PASSWORD = b"correct horse"
SECTOR = 512


def _partly_zero(seen: bytes, old: bytes) -> bool:
    return all(new in (was, 0) for new, was in zip(seen, old, strict=True))


class Expected:
    """What the disk must read as. A sector that QEMU has discarded may read as zeros, too, until it was looked at."""

    def __init__(self, content: bytes) -> None:
        self.bytes = bytearray(content)
        self.unsure: set[int] = set()

    def write(self, offset: int, data: bytes) -> None:
        self.bytes[offset : offset + len(data)] = data
        self.unsure.difference_update(range(-(-offset // SECTOR), (offset + len(data)) // SECTOR))

    def may_be_zero(self, offset: int, length: int) -> None:
        self.unsure.update(range(offset // SECTOR, (offset + length) // SECTOR))

    def resize(self, size: int) -> None:
        self.bytes = self.bytes[:size].ljust(size, b"\0")
        self.unsure = {each for each in self.unsure if each < size // SECTOR}

    def settle(self, seen: bytes, who: str) -> None:
        """Compare with what is read; what was unsure is as it was seen from now on."""
        for sector in sorted(self.unsure):
            piece = slice(sector * SECTOR, (sector + 1) * SECTOR)
            assert seen[piece] in (bytes(self.bytes[piece]), bytes(SECTOR)), f"{who} reads sector {sector} wrongly"
            self.bytes[piece] = seen[piece]
        self.unsure.clear()
        if bytearray(seen) != self.bytes:
            at = next((at for at, pair in enumerate(zip(seen, self.bytes, strict=False)) if pair[0] != pair[1]), -1)
            raise AssertionError(f"{who} reads {len(seen)} of {len(self.bytes)} bytes, the first wrong one at {at:#x}")


class Snapshot(NamedTuple):
    """A snapshot that was made, and its disk."""

    name: str
    content: bytes


class Qemu:
    """QEMU's programs in a folder of their own or the system's, which run beside the image."""

    name = "qemu"

    def __init__(self, programs: Path | None, image: Path, kind: kinds.Kind) -> None:
        self._programs, self._image, self._kind = programs, image, kind
        self._secret = ["--object", f"secret,id=s,data={PASSWORD.decode()}"] if kind.encrypted else []
        key = ",encrypt.format=luks,encrypt.key-secret=s" if kind.encrypted else ""
        self._opened = ["--image-opts", f"driver=qcow2,file.filename={image}{key}"]

    def run(self, program: str, *words: object, allowed: str | None = None) -> str:
        """What a program prints. It must end well, or say what is `allowed` to be said."""
        path = program if self._programs is None else self._programs / program
        command = [str(path), *map(str, words)]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=self._image.parent)
        failed = ran.returncode != 0 or "error" in ran.stdout.lower().replace("no errors", "")
        said = ran.stdout + ran.stderr
        assert not failed or (allowed is not None and allowed in said), f"{' '.join(command)}\n{said}"
        return ran.stdout

    def create(self) -> None:
        options = dict(self._kind.options)
        if self._kind.encrypted:
            options["encrypt.key-secret"] = "s"
        words = ["-o", ",".join(f"{name}={value}" for name, value in options.items())] if options else []
        if self._kind.packed:
            self.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", *words, "content", self._image)
            return
        below = ["-b", "below", "-F", self._kind.parent] if self._kind.parent else []
        self.run(
            *("qemu-img", "create", "-q", *self._secret, "-f", "qcow2", *words, *below, self._image, self._kind.size)
        )

    def change(self, expected: Expected, choice: random.Random, requests: int) -> None:
        """Writes, zeros, discards and compressed clusters."""
        size, cluster = len(expected.bytes) // SECTOR * SECTOR, self._kind.cluster
        commands: list[str] = []
        # QEMU packs only what has no place yet; a cluster of which no subcluster is allocated may have one.
        can_pack = self._kind.can_pack and "extended_l2" not in self._kind.options
        free = self._clusters_without_a_place(size) if can_pack else []
        for number in choice.sample(free, min(len(free), choice.choice([0, 1, 4]))):
            pattern = 1 + number % 254
            commands.append(f"write -c -P {pattern} {number * cluster} {cluster}")
            expected.write(number * cluster, bytes([pattern]) * cluster)
        for number in range(requests):
            offset = choice.randrange(size // SECTOR) * SECTOR
            length = min(choice.choice([512, 4096, 69632, 300 << 10]), size - offset)
            pattern = 1 + number % 254
            match choice.choice(["write"] * 5 + ["zeros", "unmapped", "discard", "flush"]):
                case "write":
                    commands.append(f"write -P {pattern} {offset} {length}")
                    expected.write(offset, bytes([pattern]) * length)
                case "zeros":
                    commands.append(f"write -z {offset} {length}")
                    expected.write(offset, bytes(length))
                case "unmapped":
                    commands.append(f"write -z -u {offset} {length}")
                    expected.write(offset, bytes(length))
                case "discard":
                    commands.append(f"discard {offset} {length}")
                    expected.may_be_zero(offset, length)
                case _:
                    commands.append("flush")
        self.run("qemu-io", *self._secret, *self._opened, *(word for each in commands for word in ("-c", each)))

    def _clusters_without_a_place(self, size: int) -> list[int]:
        """The whole clusters of which the image itself has nothing."""
        with tapfs.open(self._image, format="qcow2", metadata_only=True) as disk:
            own = disk.layers[0].driver.map(0, size)
        cluster = self._kind.cluster
        return [
            number
            for each in own
            if each.kind is Kind.UNALLOCATED
            for number in range(-(-each.offset // cluster), min(each.end, size) // cluster)
        ]

    def read(self) -> bytes:
        target = self._image.with_suffix(".by-qemu")
        self.run("qemu-img", "convert", *self._secret, *self._opened, "-O", "raw", target)
        content = target.read_bytes()
        target.unlink()
        return content

    def read_snapshot(self, name: str) -> bytes:
        target = self._image.with_suffix(".by-qemu")
        words = ("-l", f"snapshot.name={name}")
        self.run("qemu-img", "convert", *self._secret, *words, *self._opened, "-O", "raw", target)
        content = target.read_bytes()
        target.unlink()
        return content

    def check(self) -> None:
        self.run("qemu-img", "check", *self._secret, *self._opened)

    def map(self) -> str:
        return self.run("qemu-img", "map", "--output=json", *self._secret, *self._opened)

    def snapshot(self, letter: str, name: str) -> None:
        self.run("qemu-img", "snapshot", *self._secret, letter, name, *self._opened)

    def resize(self, size: int) -> bool:
        """Whether QEMU does it: it does not shrink an image with snapshots, for example."""
        words = ("--shrink", *self._secret, *self._opened, size)
        self.run("qemu-img", "resize", "-q", *words, allowed="")
        with tapfs.open(self._image, format="qcow2", password=self.password) as disk:
            return disk.size == size

    @property
    def password(self) -> bytes | None:
        return PASSWORD if self._kind.encrypted else None


class Tapfs:
    """tapfs in this process."""

    name = "tapfs"

    def __init__(self, image: Path, kind: kinds.Kind) -> None:
        self._image, self._kind = image, kind
        self._password = PASSWORD if kind.encrypted else None

    def create(self) -> None:
        options = {name: value for name, value in self._kind.options.items() if name != "encrypt.format"}
        folder = self._image.parent
        if self._kind.packed:
            tapfs.convert(
                folder / "content", self._image, format="raw", target_format="qcow2", compressed=True, options=options
            )
            return
        parent = self._kind.parent
        backing, backing_format = (None, None) if parent is None else ("below", parent)
        tapfs.create(
            self._image,
            "qcow2",
            self._kind.size,
            backing=backing,
            backing_format=backing_format,
            options=options,
            password=self._password,
        )

    def change(self, expected: Expected, choice: random.Random, requests: int) -> None:
        """Writes, zeros, discards, some of them inside one sector."""
        size = len(expected.bytes)
        with tapfs.open(self._image, format="qcow2", writable=True, password=self._password) as disk:
            for _ in range(requests):
                offset = choice.randrange(size)
                length = min(choice.choice([1, 700, 5000, 90_000, 400_000]), size - offset)
                what = choice.random()
                if what < 0.55:
                    data = choice.randbytes(length)
                    disk.write(offset, data)
                    expected.write(offset, data)
                elif what < 0.75:
                    disk.write_zeroes(offset, length)
                    expected.write(offset, bytes(length))
                elif what < 0.92:
                    disk.discard(offset, length)
                    seen = disk.read(offset, length)
                    for at in range(0, length, SECTOR):
                        old = bytes(expected.bytes[offset + at : offset + min(at + SECTOR, length)])
                        # A cluster may begin inside the piece: a part of it is as it was.
                        piece = seen[at : at + SECTOR]
                        assert piece in (old, bytes(len(old))) or _partly_zero(piece, old), (
                            "a discard shows other bytes"
                        )
                    expected.write(offset, seen)
                else:
                    disk.flush()
            assert disk.read(0, size) == expected.bytes

    def read(self) -> bytes:
        with tapfs.open(self._image, format="qcow2", password=self._password) as disk:
            return disk.read(0, disk.size)

    def read_snapshot(self, name: str) -> bytes:
        with tapfs.open(self._image, format="qcow2", password=self._password, snapshot=name) as disk:
            return disk.read(0, disk.size)

    def check(self) -> None:
        report = tapfs.check(self._image)
        assert (report.corruptions, report.leaks) == (0, 0), report.findings[:4]

    def snapshot(self, letter: str, name: str) -> None:
        edit = {"-c": tapfs.create_snapshot, "-a": tapfs.apply_snapshot, "-d": tapfs.delete_snapshot}[letter]
        edit(self._image, name)

    def resize(self, size: int) -> bool:
        options = OpenOptions(format="qcow2")
        return resize_image(str(self._image), lambda _: size, options, shrink=True, password=self._password) == size

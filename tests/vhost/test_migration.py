"""A guest of QEMU migrates within the host while it reads and writes a disk that tapfs serves by vhost-user.

The guest is a boot sector (migrating_guest.s). The disk writes into its memory, also while QEMU copies that memory. A
page that the server does not note is not sent again, and the guest finds it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

import tapfs
from tests import vhost_front_end as virtio
from tests.vhost.test_serving import connected, serving
from tests.vhost_front_end import FrontEnd, Ring

SIZE = 4 << 20
#: The guest copies slower than it dirties its memory for a while, so it goes on while QEMU copies.
MOVES_PER_SECOND = 24 << 20


class Machine:
    """A virtual machine whose boot disk is a socket of vhost-user, and its monitor."""

    def __init__(self, folder: Path, name: str, disk: Path, *words: str) -> None:
        self._said = folder / f"{name}.said"
        monitor = folder / f"{name}.monitor"
        command = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-accel", "tcg", "-m", "32"]
        command += [
            "-object",
            "memory-backend-memfd,id=memory,size=32M,share=on",
            "-machine",
            "pc,memory-backend=memory",
        ]
        command += ["-chardev", f"socket,id=disk,path={disk},reconnect=1", "-device", "vhost-user-blk-pci,chardev=disk"]
        command += ["-boot", "menu=off", "-debugcon", f"file:{self._said}"]
        command += ["-qmp", f"unix:{monitor},server=on,wait=off", *words]
        self.process = subprocess.Popen(command)
        wait_for(monitor.exists)
        self._monitor = socket.socket(socket.AF_UNIX)
        self._monitor.settimeout(60)
        self._monitor.connect(str(monitor))
        self._lines = self._monitor.makefile("r")
        self._lines.readline()
        self.do("qmp_capabilities")

    def do(self, command: str, **arguments: object) -> Any:
        """Have QEMU do a command; what it returns."""
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self._lines.readline())
            if "event" not in answer:
                assert "return" in answer, answer
                return answer["return"]

    @property
    def said(self) -> str:
        """What the guest has said on this machine."""
        return self._said.read_text() if self._said.exists() else ""

    def end(self) -> None:
        """Kill it."""
        self.process.kill()
        self.process.wait()
        self._lines.close()
        self._monitor.close()


def wait_for(condition: Callable[[], object]) -> None:
    """Return when it holds."""
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def build_guest(folder: Path) -> bytes:
    """The boot sector."""
    source, linked, sector = Path(__file__).with_name("migrating_guest.s"), folder / "guest.o", folder / "guest.bin"
    subprocess.run(["as", "--32", "-o", linked, source], check=True)
    place = ["-m", "elf_i386", "-e", "0x7c00", "-Ttext", "0x7c00", "--oformat", "binary"]
    subprocess.run(["ld", *place, "-o", sector, linked], check=True)
    return sector.read_bytes()


@contextmanager
def machine(folder: Path, name: str, disk: Path, *words: str) -> Generator[Machine]:
    with ExitStack() as ending:
        started = Machine(folder, name, disk, *words)
        ending.callback(started.end)
        yield started


def test_a_guest_migrates_with_its_disk(tapfs_command: list[str], tmp_path: Path) -> None:
    image, disk, way = tmp_path / "disk.qcow2", tmp_path / "disk.sock", tmp_path / "way.sock"
    tapfs.create(image, "qcow2", SIZE)
    with tapfs.open(image, writable=True) as opened:
        opened.write(0, build_guest(tmp_path))
    with serving(tapfs_command, image, "--rw", "--vhost-user", disk) as server, ExitStack() as machines:
        assert server.stdout is not None
        server.stdout.readline()
        here = machines.enter_context(machine(tmp_path, "here", disk))
        wait_for(lambda: len(here.said) > 8)
        there = machines.enter_context(machine(tmp_path, "there", disk, "-incoming", f"unix:{way}"))
        here.do("migrate-set-parameters", **{"max-bandwidth": MOVES_PER_SECOND, "downtime-limit": 300})
        before = len(here.said)
        here.do("migrate", uri=f"unix:{way}")
        wait_for(lambda: here.do("query-migrate")["status"] not in {"setup", "active", "device"})
        assert here.do("query-migrate")["status"] == "completed"
        assert len(here.said) > before
        wait_for(lambda: len(there.said) > 72)
        there.do("stop")
        assert set(here.said + there.said) == {"."}
        turns = len(here.said) + len(there.said)
        # Whose disk has gone is not served any more.
        here.do("cont")
        there.do("cont")
        wait_for(lambda: len(there.said) + len(here.said) > turns)
        there.do("stop")
        turns = len(here.said) + len(there.said)
        machines.close()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    with tapfs.open(image) as opened:
        for number in range(max(0, turns - 200), turns):
            assert struct.unpack("<I", opened.read((64 + number % 256) * 512, 4)) == (number,)


def test_a_front_end_waits_for_the_disk_until_the_guest_moves(tapfs_command: list[str], tmp_path: Path) -> None:
    image, path = tmp_path / "disk.raw", tmp_path / "disk.sock"
    image.write_bytes(bytes(1 << 20))
    with serving(tapfs_command, "-f", "raw", image, "--rw", "--vhost-user", path) as server, ExitStack() as ending:
        assert server.stdout is not None
        server.stdout.readline()
        here = connected(path)
        ending.callback(here.close)
        ring = Ring(here)
        ring.set_up()
        ring.write(0, b"1" * 4096)

        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(path))
        there = FrontEnd(connection)
        ending.callback(there.close)
        features = there.number(1)
        there.send(16, struct.pack("=Q", there.number(15)))
        assert len(there.configuration()) == 60
        call = there.event()
        there.send(13, struct.pack("=Q", 0), [call])
        there.send(2, struct.pack("=Q", features & ~virtio.F_LOG_ALL))
        table = struct.pack("=II", 1, 0) + there.region()
        there.send(5, table, [there.memory_file], flags=9)
        # The rings of the other one go on, and tell its eventfd.
        ring.write(8, b"2" * 4096)
        # A guest that stops without being moved keeps its disk.
        base = ring.stop()
        ring.set_up(base=base)
        ring.write(16, b"3" * 4096)
        log = os.memfd_create("log")
        os.ftruncate(log, 1 << 20)
        here.descriptors.append(log)
        here.send(6, struct.pack("=QQ", 1 << 20, 0), [log])
        assert here.receive()[0] == 6
        assert here.tell(2, struct.pack("=Q", features)) == 0
        ring.write(24, b"4" * 4096)
        assert not select.select([there.connection], [], [], 0)[0], "one guest at a time"
        ring.stop()

        assert there.receive() == (5, struct.pack("=Q", 0), [])
        moved = Ring(there)
        moved.set_up()
        assert moved.read(0, 16384) == b"1" * 4096 + b"2" * 4096 + b"3" * 4096 + b"4" * 4096
        # The machine that the guest has left may still ask about the disk. It does not get it back.
        assert len(here.configuration()) == 60
        here.send(8, struct.pack("=II", 0, 128))
        with pytest.raises(EOFError):
            here.receive()
        moved.write(0, b"5" * 4096)
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    assert image.read_bytes()[:4096] == b"5" * 4096

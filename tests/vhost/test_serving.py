"""`tapfs serve --vhost-user` as a process: killed in the middle of writes, told another size."""

from __future__ import annotations

import os
import random
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tapfs
from tests import vhost_front_end as virtio
from tests.vhost_front_end import FrontEnd, Ring

SIZE = 256 << 20
BLOCKS = SIZE // 4096


@contextmanager
def serving(command: Sequence[str], *words: object) -> Generator[subprocess.Popen[str]]:
    every = [*command, "serve", *map(str, words)]
    with subprocess.Popen(every, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def connected(path: Path, before: FrontEnd | None = None) -> FrontEnd:
    """A front end, with the memory and the in-flight region of the one before."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(path))
    front_end = FrontEnd(connection, memory=None if before is None else before.memory_file)
    if before is not None:
        front_end.inflight = before.inflight
    front_end.negotiate(inflight=True)
    return front_end


def test_a_killed_server_is_a_pause(tapfs_command: list[str], tmp_path: Path) -> None:
    image, path = tmp_path / "disk.qcow2", tmp_path / "disk.sock"
    tapfs.create(image, "qcow2", SIZE)
    words = (image, "--rw", "--vhost-user", path)
    choice = random.Random(5)
    written: dict[int, int] = {}
    under_way: dict[int, tuple[int, int]] = {}
    front_end: FrontEnd | None = None
    ring: Ring | None = None

    def write_one(at: Ring) -> None:
        """A block that nothing else writes now, mostly one that has no place yet."""
        block = choice.choice([number for number in choice.sample(range(BLOCKS), 64) if number not in busy()])
        fill = choice.randrange(1, 256)
        head, _ = at.request(virtio.OUT, block * 8, bytes([fill]) * 4096)
        under_way[head] = block, fill

    def busy() -> set[int]:
        return {block for block, _ in under_way.values()}

    def take(heads: Sequence[int]) -> None:
        for head in heads:
            block, fill = under_way.pop(head)
            written[block] = fill

    for stopped in (False, True):
        with serving(tapfs_command, *words) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == f"{path}\n"
            front_end = connected(path, front_end)
            if ring is None:
                ring = Ring(front_end)
            ring.front_end = front_end
            ring.set_up(base=ring.seen)
            # What the one before had taken, or not even that.
            if under_way:
                take(ring.wait(len(under_way)))
            for turn in range(40):
                take(ring.wait() if turn else [])
                while len(under_way) < 16:
                    write_one(ring)
                ring.kick_it()
            if stopped:
                # Nothing of these is taken any more.
                take(ring.wait(len(under_way)))
                server.send_signal(signal.SIGSTOP)
                while len(under_way) < 16:
                    write_one(ring)
                ring.kick_it()
            server.send_signal(signal.SIGKILL)
            server.wait()
            front_end.close()
            take(ring.ended())
    with serving(tapfs_command, *words) as server:
        assert server.stdout is not None
        server.stdout.readline()
        assert ring is not None
        front_end = connected(path, front_end)
        ring.front_end = front_end
        ring.set_up(base=ring.seen)
        take(ring.wait(len(under_way)))
        for block, fill in written.items():
            assert ring.read(block * 8, 4096) == bytes([fill]) * 4096
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    front_end.close()
    assert subprocess.run([*tapfs_command, "check", image], capture_output=True, check=False).returncode == 0
    with tapfs.open(image) as disk:
        for block, fill in written.items():
            assert disk.read(block * 4096, 4096) == bytes([fill]) * 4096


def test_a_plan_that_may_not_fit_any_more_is_not_executed(tapfs_command: list[str], tmp_path: Path) -> None:
    image, path, runtime = tmp_path / "disk.qcow2", tmp_path / "disk.sock", tmp_path / "run"
    tapfs.create(image, "qcow2", SIZE)
    command = ["env", f"TAPFS_RUNTIME_DIR={runtime}", *tapfs_command]
    with serving(command, image, "--rw", "--vhost-user", path) as server:
        assert server.stdout is not None
        server.stdout.readline()
        ring = Ring(connected(path))
        ring.set_up()
        ring.write(0, b"w" * 4096)
        server.kill()
        server.wait()
        ring.front_end.close()
    (plan,) = runtime.glob("*.plan")
    later = time.time() + 60
    os.utime(image, (later, later))
    with serving(command, image, "--rw", "--vhost-user", path) as server:
        assert server.stderr is not None
        assert f"remove {plan}" in server.stderr.read()
        assert server.wait(30) != 0


def test_a_guest_is_told_another_size(tapfs_command: list[str], tmp_path: Path) -> None:
    image, path = tmp_path / "disk.raw", tmp_path / "disk.sock"
    image.write_bytes(bytes(1 << 20))
    resize = [*tapfs_command, "resize", "-q", "--vhost-user", path]
    with serving(tapfs_command, "-f", "raw", image, "--rw", "--vhost-user", path) as server:
        assert server.stdout is not None
        server.stdout.readline()
        front_end = connected(path)
        ours, theirs = socket.socketpair()
        ours.settimeout(30)
        assert front_end.tell(21, descriptors=[theirs.fileno()]) == 0
        ring = Ring(front_end)
        ring.set_up()
        assert ring.do(virtio.OUT, 2048, b"n" * 512)[0] == virtio.IOERR
        subprocess.run([*resize, "2M"], check=True)
        # The configuration has changed, and this ring goes on.
        assert ours.recv(64) == struct.pack("=III", 2, 1, 0)
        assert struct.unpack_from("<Q", front_end.configuration()) == (4096,)
        ring.write(2048, b"n" * 512)
        assert ring.do(virtio.OUT, 4096, b"n" * 512)[0] == virtio.IOERR
        refused = subprocess.run([*resize, "1M"], capture_output=True, text=True, check=False)
        assert refused.returncode != 0
        assert "would be lost" in refused.stderr
        for one in (ours, theirs):
            one.close()
        front_end.close()
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    assert image.read_bytes() == bytes(1 << 20) + b"n" * 512 + bytes((1 << 20) - 512)
    gone = subprocess.run([*resize, "3M"], capture_output=True, text=True, check=False)
    assert "no server of yours serves it" in gone.stderr


def test_a_guest_waits_while_paused_and_a_kill_after_a_swap_loses_nothing(
    tapfs_command: list[str], tmp_path: Path
) -> None:
    image, path, snapshot = tmp_path / "disk.qcow2", tmp_path / "disk.sock", tmp_path / "monday.qcow2"
    tapfs.create(image, "qcow2", SIZE)

    def ask(*words: object) -> str:
        done = [*tapfs_command, str(words[0]), "--served", str(path), *map(str, words[1:])]
        return subprocess.run(done, capture_output=True, text=True, check=True).stdout

    words = (image, "--rw", "--vhost-user", path)
    with serving(tapfs_command, *words) as server:
        assert server.stdout is not None
        server.stdout.readline()
        front_end = connected(path)
        ring = Ring(front_end)
        ring.set_up()
        ring.write(0, b"1" * 4096)
        ask("pause")
        ring.request(virtio.OUT, 8, b"2" * 4096)
        ring.kick_it()
        # A ring that is set up anew meanwhile waits, too.
        assert ask("stats", "--json").count('"writes": 1') == 1
        ask("resume")
        ring.wait(1)
        ask("swap", snapshot)
        ring.write(16, b"3" * 4096)
        ring.write(0, b"4" * 4096)
        server.send_signal(signal.SIGKILL)
        server.wait()
        front_end.close()
    with serving(tapfs_command, *words) as server:
        assert server.stdout is not None
        server.stdout.readline()
        after = connected(path, front_end)
        ring.front_end = after
        ring.set_up(base=ring.seen)
        assert ring.read(0, 12288) == b"4" * 4096 + b"2" * 4096 + b"3" * 4096
        assert '"clients": 1' in ask("stats", "--json")
        ask("detach", "--force")
        assert server.wait(30) == 0
        after.close()
    with tapfs.open(snapshot) as disk:
        assert disk.read(0, 12288) == b"1" * 4096 + b"2" * 4096 + bytes(4096)

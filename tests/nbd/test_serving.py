"""`tapfs serve` as users run it: a process, clients that others wrote, its end by a signal, a kill or an idle while."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tapfs
from tapfs.errors import CODES, ErrorKind
from tests import nbd_client as nbd
from tests.fuse.conftest import wait_for
from tests.nbd_client import Client
from tests.peer.newest_qemu import newest_qemu

MIB = 1 << 20

Start = Callable[..., "Server"]


class Server:
    """A running `tapfs serve`."""

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self.process = process
        self.path = path
        self._clients: list[Client] = []
        assert process.stdout is not None
        self.uri = process.stdout.readline().strip()

    def connect(self, name: str = "", style: int = nbd.STRUCTURED) -> Client:
        client = Client(socket.socket(socket.AF_UNIX))
        client.connection.settimeout(30)
        client.connection.connect(str(self.path))
        self._clients.append(client)
        client.go(name, style)
        return client

    def close(self) -> None:
        for client in self._clients:
            client.close()
        with self.process:
            self.process.kill()

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def start(tapfs_command: list[str], tmp_path: Path) -> Iterator[Start]:
    started: list[Server] = []

    def run(*words: object) -> Server:
        path = tmp_path / "socket"
        command = [*tapfs_command, "serve", "--socket", str(path), *map(str, words)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(Server(process, path))
        return started[-1]

    yield run
    for server in started:
        server.close()


def run(*words: object) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A raw disk of 8 MiB with data, zeros and holes."""
    path = tmp_path / "disk.raw"
    path.write_bytes(random.Random(13).randbytes(2 * MIB) + bytes(MIB) + b"\xa5" * MIB)
    os.truncate(path, 8 * MIB)
    return path


@pytest.mark.parametrize("kind", ["raw", "qcow2", "vhdx"])
def test_clients_of_others_read_and_write_what_tapfs_serves(
    start: Start, tmp_path: Path, disk: Path, kind: str
) -> None:
    image, copy = tmp_path / f"image.{kind}", tmp_path / "copy.raw"
    tapfs.create(image, kind, 8 * MIB)
    server = start(image, "-f", kind, "--rw")
    assert server.uri == f"nbd+unix:///?socket={server.path}"
    run("nbdcopy", "--flush", disk, server.uri)
    assert run("qemu-img", "compare", "-f", "raw", "-F", "raw", disk, server.uri) == "Images are identical.\n"
    run(
        "qemu-io", "-f", "raw", server.uri, "-c", "write -f -P 7 5M 64k", "-c", "write -z 1M 64k", "-c", "discard 6M 1M"
    )
    run("nbdcopy", server.uri, copy)
    expected = bytearray(disk.read_bytes())
    expected[5 * MIB : 5 * MIB + 65536] = b"\7" * 65536
    expected[MIB : MIB + 65536] = bytes(65536)
    assert copy.read_bytes() == expected
    (told,) = json.loads(run("nbdinfo", "--json", server.uri))["exports"]
    assert told["export-size"] == 8 * MIB
    assert told["contexts"] == ["base:allocation"]
    assert all(
        told[f"can_{what}"] for what in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero")
    )
    runs = json.loads(run("nbdinfo", "--map", "--json", server.uri))
    assert sum(each["length"] for each in runs) == 8 * MIB
    for each in runs:
        if each["type"] & 2:
            assert not any(expected[each["offset"] : each["offset"] + each["length"]])
    assert kind == "vhdx" or any(each["type"] & 2 for each in runs)  # its one block is data
    assert server.end() == 0
    assert not server.path.exists()
    with tapfs.open(image, format=kind) as after:
        assert after.read(0, 8 * MIB) == expected


def test_the_newest_qemu_reads_and_writes_by_extended_headers(start: Start, tmp_path: Path) -> None:
    image, large = tmp_path / "image.qcow2", 6 << 30
    tapfs.create(image, "qcow2", large)
    server = start(image, "--rw")
    words = ["-c", "write -P 7 5G 3M", "-c", "write -P 8 5G 64k", "-c", "write -zun 1G 4G", "-c", "flush"]
    run(newest_qemu("qemu-io"), "-f", "raw", server.uri, *words, "-c", "read -P 7 5242944k 1M", "-c", "read -P 0 1G 1M")
    told = json.loads(run(newest_qemu("qemu-img"), "map", "--output=json", server.uri))
    assert [(each["start"], each["length"], each["data"]) for each in told] == [
        (0, 5 << 30, False),
        (5 << 30, 3 * MIB, True),
        ((5 << 30) + 3 * MIB, large - (5 << 30) - 3 * MIB, False),
    ]
    assert server.end() == 0
    assert tapfs.check(image).corruptions == 0


def test_what_was_flushed_outlives_a_kill_of_the_server(start: Start, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    tapfs.create(image, "qcow2", 8 * MIB)
    server = start(image, "--rw")
    client = server.connect()
    assert client.ask(nbd.WRITE, 0, data=b"f" * MIB).error == 0
    assert client.ask(nbd.FLUSH).error == 0
    assert client.ask(nbd.WRITE, 4 * MIB, data=b"u" * 4096, flags=nbd.FUA).error == 0
    client.send(nbd.WRITE, 2 * MIB, data=b"n" * MIB)
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    client.close()
    with tapfs.open(image) as after:
        assert after.read(0, MIB) == b"f" * MIB
        assert after.read(4 * MIB, 4096) == b"u" * 4096
    assert tapfs.check(image).corruptions == 0
    # The socket that it left is no obstacle.
    server = start(image, "--rw")
    server.connect().close()
    assert server.end() == 0


def test_a_killed_client_loses_nothing_that_was_flushed_and_leaves_nothing(start: Start, tmp_path: Path) -> None:
    """One flushes, and one writes on and on and is killed; others are served before, meanwhile and after."""
    image = tmp_path / "image.qcow2"
    tapfs.create(image, "qcow2", 64 * MIB)
    server = start(image, "--rw")
    other = server.connect()
    descriptors = Path(f"/proc/{server.process.pid}/fd")
    before = len(os.listdir(descriptors))
    run("qemu-io", "-f", "raw", "-c", "write -q -P 7 0 1M", "-c", "flush", server.uri)
    writing = [
        "qemu-img",
        "bench",
        "-w",
        "--pattern=7",
        "-f",
        "raw",
        "-c",
        "9999999",
        "-d",
        "64",
        "-s",
        "65536",
        "-o",
        "8M",
    ]
    with subprocess.Popen([*writing, server.uri], stdout=subprocess.DEVNULL) as client:
        wait_for(lambda: other.ask(nbd.READ, 10 * MIB, 1).whole() == b"\x07")
        client.kill()
    assert other.ask(nbd.READ, 0, MIB).whole() == b"\x07" * MIB
    wait_for(lambda: len(os.listdir(descriptors)) <= before)
    assert other.ask(nbd.WRITE, 5 * MIB, data=b"o" * MIB, flags=nbd.FUA).error == 0
    assert server.end() == 0
    with tapfs.open(image) as after:
        assert after.read(0, MIB) == b"\x07" * MIB
        assert after.read(5 * MIB, MIB) == b"o" * MIB
    assert tapfs.check(image).corruptions == 0


def test_who_only_looks_is_no_news(start: Start, disk: Path) -> None:
    """Health checks connect and go, and a program that lists exports goes without the last answer."""
    server = start(disk, "-f", "raw")
    for words in (b"", b"\0\0\0\3", b"\0\0\0\3IHAVEOPT\0\0\0\2\0\0\0\0"):
        with socket.socket(socket.AF_UNIX) as looking:
            looking.connect(str(server.path))
            looking.sendall(words)
    with socket.socket(socket.AF_UNIX) as nonsense:
        nonsense.connect(str(server.path))
        nonsense.sendall(b"\xff" * 4)
        assert nonsense.recv(18).startswith(b"NBDMAGIC")
    server.connect().close()
    assert server.end() == 0
    assert server.process.stderr is not None
    said = server.process.stderr.read()
    assert said.count("turned away") == said.count("flags that were not offered") == 1


def test_a_signal_under_load_loses_nothing_that_was_answered(start: Start, disk: Path) -> None:
    server = start(disk, "-f", "raw", "--rw")
    clients = [server.connect() for _ in range(4)]
    asked = [
        (client, client.send(nbd.WRITE, at * 65536, data=bytes([at + 1]) * 65536)) for at, client in enumerate(clients)
    ]
    for client, cookie in asked:
        assert client.answer(cookie).error == 0
    for client in clients:
        client.send(nbd.READ, 0, 4 * MIB)  # which nobody takes
    assert server.end() == 0
    for client in clients:
        client.close()
    content = disk.read_bytes()
    for at in range(4):
        assert content[at * 65536 : (at + 1) * 65536] == bytes([at + 1]) * 65536


def test_the_socket_is_the_users_alone_and_one_server_has_it(
    start: Start, disk: Path, tapfs_process: Callable[..., object]
) -> None:
    server = start(disk, "-f", "raw")
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    refused = tapfs_process("serve", disk, "-f", "raw", "--socket", server.path)
    assert "another process listens there" in str(refused)
    taken = server.path.with_name("file")
    taken.write_text("precious")
    refused = tapfs_process("serve", disk, "-f", "raw", "--socket", taken)
    assert "is there already, and no socket" in str(refused)
    assert taken.read_text() == "precious"


def test_it_ends_with_its_last_client_if_it_is_told_to(start: Start, disk: Path) -> None:
    server = start(disk, "-f", "raw", "--exit-when-idle")
    first, second = server.connect(), server.connect()
    first.close()
    assert len(second.ask(nbd.READ, 0, 512).whole()) == 512
    second.close()
    assert server.process.wait(30) == 0
    assert not server.path.exists()


def test_several_images_are_exports_under_their_names(start: Start, disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    tapfs.create(other, "qcow2", MIB)
    server = start(disk, other, "--name", "first one")
    assert server.uri == f"nbd+unix:///first%20one?socket={server.path}"
    exports = json.loads(run("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={server.path}"))["exports"]
    assert [(each["export-name"], each["export-size"]) for each in exports] == [
        ("first one", 8 * MIB),
        ("other.qcow2", MIB),
    ]
    assert server.connect("other.qcow2").size == MIB
    assert server.connect("").size == 8 * MIB


def test_scratch_writes_leave_the_image_alone(start: Start, disk: Path, tmp_path: Path) -> None:
    before = disk.read_bytes()
    for words in (["--temp"], ["--overlay", tmp_path / "overlay.qcow"]):
        server = start(disk, "-f", "raw", *words)
        client = server.connect()
        assert client.ask(nbd.WRITE, MIB, data=b"s" * MIB).error == 0
        assert client.ask(nbd.READ, MIB, MIB).whole() == b"s" * MIB
        client.close()
        assert server.end() == 0
    assert disk.read_bytes() == before
    with tapfs.open(disk, format="raw", overlay=tmp_path / "overlay.qcow") as seen:
        assert seen.read(MIB, MIB) == b"s" * MIB


def test_in_the_background_it_answers_when_the_command_returns(
    tapfs_command: list[str], disk: Path, tmp_path: Path
) -> None:
    path, pid_file = tmp_path / "socket", tmp_path / "pid"
    words = ["serve", disk, "-f", "raw", "--background", "--pid-file", pid_file, "--socket", path]
    uri = run(*tapfs_command, *words).strip()
    try:
        assert json.loads(run("nbdinfo", "--json", uri))["exports"][0]["export-size"] == 8 * MIB
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
    wait_for(lambda: not path.exists() and not pid_file.exists())
    assert not path.exists()
    assert not pid_file.exists()


def test_a_pid_file_takes_the_place_of_nothing_but_a_pid_file(
    disk: Path, tmp_path: Path, tapfs_process: Callable[..., object]
) -> None:
    """Its contents would be lost at once, and the file itself with the server's end."""
    precious = tmp_path / "precious"
    precious.write_text("12 precious bytes")
    refused = tapfs_process("serve", disk, "-f", "raw", "--background", "--pid-file", precious)
    assert "holds no number of a process" in str(refused)
    assert precious.read_text() == "12 precious bytes"


@pytest.mark.parametrize("door", [[], ["--vhost-user", "guest"]])
@pytest.mark.parametrize("background", [[], ["--background"]])
def test_a_server_that_cannot_start_leaves_no_pid_file(
    tmp_path: Path,
    tapfs_process: Callable[..., object],
    door: list[str],
    background: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    tapfs_process("serve", tmp_path / "nothing", "-f", "raw", *door, *background, "--pid-file", tmp_path / "pid")
    assert list(tmp_path.glob("pid*")) == []
    (tmp_path / "pid").write_text("12\n")  # of another server: it stays
    tapfs_process("serve", tmp_path / "nothing", "-f", "raw", *door, *background, "--pid-file", tmp_path / "pid")
    assert (tmp_path / "pid").read_text() == "12\n"


def test_a_pid_file_behind_a_link_of_the_user_goes_with_the_server(
    tapfs_command: list[str], disk: Path, tmp_path: Path
) -> None:
    link, pid_file = tmp_path / "pid", tmp_path / "number"
    pid_file.touch()
    link.symlink_to(pid_file)
    run(*tapfs_command, "serve", disk, "-f", "raw", "--background", "--pid-file", link, "--socket", tmp_path / "socket")
    os.kill(int(link.read_text()), signal.SIGTERM)
    wait_for(lambda: not pid_file.exists())
    assert not pid_file.exists()


def test_a_pid_file_is_nothing_that_another_user_has_put_there(
    disk: Path, tmp_path: Path, sticky: Path, tapfs_process: Callable[..., object]
) -> None:
    """Whatever the host says of links (fs.protected_symlinks): another could choose which file is made or written."""
    victim, of_another = tmp_path / "victim", sticky / "pid"
    of_another.symlink_to(victim)
    os.lchown(of_another, 65534, 65534)
    words = ["serve", disk, "-f", "raw", "--background", "--pid-file", of_another]
    assert "it is not followed" in str(tapfs_process(*words))
    assert not victim.exists()
    of_another.unlink()
    of_another.touch()
    os.chown(of_another, 65534, 65534)
    assert "belongs to user 65534" in str(tapfs_process(*words))
    assert of_another.read_bytes() == b""


def asked(command: list[str], *words: object, error: ErrorKind | None = None) -> str:
    """What a command of an operator prints, or its error."""
    done = subprocess.run([*command, *map(str, words)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == (0 if error is None else CODES[error].exit_code), done.stderr
    return done.stdout if error is None else done.stderr


def test_a_served_disk_is_seen_and_controlled(
    start: Start, tapfs_command: list[str], tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(tmp_path / "runtime"))
    server = start(disk, "-f", "raw", "--rw")
    client = server.connect()
    assert client.ask(nbd.WRITE, 0, data=b"1" * 4096).error == 0
    (told,) = json.loads(asked(tapfs_command, "list", "--json"))["served"]
    assert (told["address"], told["path"], told["clients"], told["size"]) == (server.uri, str(disk), 1, 8 * MIB)
    assert "1 client," in asked(tapfs_command, "list")
    (told,) = json.loads(asked(tapfs_command, "stats", "--json", "--served", server.path))
    assert told["statistics"]["writes"] == 1
    # Paused, it takes requests and answers none.
    asked(tapfs_command, "pause", "--served", server.path)
    waits = client.send(nbd.WRITE, 4096, data=b"2" * 4096)
    (told,) = json.loads(asked(tapfs_command, "list", "--json"))["served"]
    assert told["summary"] == "paused"
    assert told["statistics"]["writes"] == 1
    with disk.open("rb") as file:
        assert file.read(8192)[4096:] != b"2" * 4096
    asked(tapfs_command, "resume", "--served", disk)
    assert client.answer(waits).error == 0
    # It grows beneath the client, and a new one is told.
    assert asked(tapfs_command, "resize", "--served", server.uri, "12M").startswith(f"{12 * MIB} bytes")
    assert client.ask(nbd.WRITE, 11 * MIB, data=b"3" * 4096).error == 0
    assert json.loads(run("nbdinfo", "--json", server.uri))["exports"][0]["export-size"] == 12 * MIB
    assert "would be lost" in asked(
        tapfs_command, "resize", "--served", server.uri, "1M", error=ErrorKind.OUT_OF_BOUNDS
    )
    # A live snapshot: what was written stays under the other name.
    snapshot = tmp_path / "monday.raw"
    asked(tapfs_command, "swap", "--served", server.path, snapshot)
    assert client.ask(nbd.WRITE, 0, data=b"4" * 4096).error == 0
    # A rate: what was asked for has used up an hour, until the limit is taken away.
    asked(tapfs_command, "limit", "--served", server.path, "--bytes", "1")
    assert client.ask(nbd.READ, 0, 4096).whole() == b"4" * 4096
    waits = client.send(nbd.READ, 4096, 4096)
    asked(tapfs_command, "limit", "--served", server.path, "--bytes", "0")
    assert client.answer(waits, 4096, reads=True).whole() == b"2" * 4096
    (told,) = json.loads(asked(tapfs_command, "list", "--json"))["served"]
    assert (told["path"], told["format"]) == (str(disk), "qcow2")
    assert "is in use by 1 client" in asked(tapfs_command, "detach", "--served", server.path, error=ErrorKind.LOCKED)
    asked(tapfs_command, "detach", "--force", "--served", server.path)
    assert server.process.wait(30) == 0
    assert snapshot.read_bytes()[:4096] == b"1" * 4096
    assert snapshot.read_bytes()[11 * MIB :][:4096] == b"3" * 4096
    with tapfs.open(disk) as after:
        assert after.format_name == "qcow2"
        assert after.read(0, 8192) == b"4" * 4096 + b"2" * 4096
    assert "served" not in json.loads(asked(tapfs_command, "list", "--json"))
    assert "no server of yours" in asked(tapfs_command, "pause", "--served", server.path, error=ErrorKind.NOT_FOUND)


def test_each_of_several_exports_is_one_disk_and_a_killed_server_is_none(
    start: Start, tapfs_command: list[str], tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "runtime"
    monkeypatch.setenv("TAPFS_RUNTIME_DIR", str(runtime))
    other = tmp_path / "other.qcow2"
    tapfs.create(other, "qcow2", MIB)
    server = start(disk, other, "--temp", "--tcp", "127.0.0.1:0")
    found = json.loads(asked(tapfs_command, "list", "--json"))["served"]
    assert [(each["path"], each["name"], len(each["addresses"])) for each in found] == [
        (str(disk), "disk.raw", 2),
        (str(other), "other.qcow2", 2),
    ]
    assert "may be several" in asked(tapfs_command, "pause", "--served", server.path, error=ErrorKind.INVALID_ARGUMENT)
    assert "no name" in asked(
        tapfs_command, "swap", "--served", other, tmp_path / "snapshot", error=ErrorKind.UNSUPPORTED
    )
    asked(tapfs_command, "pause", "--served", found[1]["addresses"][1])
    client, waits = server.connect("disk.raw"), server.connect("other.qcow2")
    waits.send(nbd.READ, 0, 512)
    assert client.ask(nbd.READ, 0, 512).error == 0
    server.end(signal.SIGKILL)
    assert "served" not in json.loads(asked(tapfs_command, "list", "--json"))
    assert list((runtime / "served").iterdir()) == []


def test_what_a_killed_server_has_left_goes(tapfs_command: list[str], tmp_path: Path, disk: Path) -> None:
    runtime = tmp_path / "run"
    command = ["env", f"TAPFS_RUNTIME_DIR={runtime}", *tapfs_command]
    serve = [*command, "serve", "-f", "raw", str(disk)]

    def sockets() -> list[Path]:
        return [path for path in runtime.rglob("*") if stat.S_ISSOCK(path.lstat().st_mode)]

    for then in ([*command, "list"], serve):
        with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            address = server.stdout.readline()
            server.kill()
            server.wait()
        before = sockets()
        assert before
        with subprocess.Popen(then, stdout=subprocess.PIPE, text=True) as next_one:
            assert next_one.stdout is not None
            said = next_one.stdout.readline()
            assert not set(sockets()) & set(before)
            assert address.strip() not in said
            next_one.terminate()

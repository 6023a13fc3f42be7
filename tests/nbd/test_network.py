"""`tapfs serve` on TCP, with TLS by shared keys and by certificates, and on a socket of systemd."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests import nbd_client as nbd
from tests.nbd_client import Client
from tests.unit.engine.engine_disks import pattern

MIB = 1 << 20
CONTENT = pattern(3 * MIB)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(CONTENT)
    return path


@contextmanager
def serving(command: Sequence[str], *words: object) -> Generator[tuple[str, subprocess.Popen[str]]]:
    """A server on TCP: its address, and the process."""
    every = [*command, "serve", "-f", "raw", "--tcp", "127.0.0.1:0", *map(str, words)]
    with subprocess.Popen(every, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.terminate()


def copied(uri: str, to: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["nbdcopy", uri, to], capture_output=True, text=True, check=False, timeout=60)


def connected(uri: str) -> Client:
    host, _, port = uri.split("/")[2].rpartition("@")[2].rpartition(":")
    return Client(socket.create_connection((host, int(port)), timeout=30))


def test_clients_come_by_tcp(tapfs_command: list[str], disk: Path, tmp_path: Path) -> None:
    with serving(tapfs_command, disk, "--socket", tmp_path / "too.sock") as (uri, process):
        assert uri.startswith("nbd://127.0.0.1:")
        assert copied(uri, tmp_path / "copy").returncode == 0
        assert (tmp_path / "copy").read_bytes() == CONTENT
        assert process.stdout is not None
        assert process.stdout.readline() == f"nbd+unix:///?socket={tmp_path}/too.sock\n"
        assert copied(f"nbd+unix:///?socket={tmp_path}/too.sock", tmp_path / "copy").returncode == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_shared_key_lets_its_clients_in_and_no_others(tapfs_command: list[str], disk: Path, tmp_path: Path) -> None:
    keys, wrong = tmp_path / "keys.psk", tmp_path / "wrong.psk"
    keys.write_text(f"# of this test\nalice:{bytes(range(32)).hex()}\n")
    wrong.write_text(f"alice:{bytes(32).hex()}\n")
    with serving(tapfs_command, disk, "--rw", "--tls-psk", keys) as (uri, process):
        assert uri.startswith("nbds://127.0.0.1:")
        named = uri.replace("nbds://", "nbds://alice@")
        assert copied(f"{named}?tls-psk-file={keys}", tmp_path / "copy").returncode == 0
        assert (tmp_path / "copy").read_bytes() == CONTENT
        words = ["nbdcopy", "--flush", tmp_path / "copy", f"{named}?tls-psk-file={keys}"]
        assert subprocess.run(words, check=False, timeout=60).returncode == 0
        assert copied(f"{named}?tls-psk-file={wrong}", tmp_path / "no").returncode != 0
        assert copied(f"{named.replace('alice', 'bob')}?tls-psk-file={keys}", tmp_path / "no").returncode != 0
        assert copied(uri.replace("nbds:", "nbd:"), tmp_path / "no").returncode != 0
        # Garbage where the handshake should be ends this client alone.
        client = connected(uri)
        client.greet()
        assert client.option(5) == [(1, b"")]
        client.connection.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        with pytest.raises((EOFError, ConnectionError)):
            client.receive(MIB)
        client.close()
        assert copied(f"{named}?tls-psk-file={keys}", tmp_path / "copy").returncode == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert disk.read_bytes() == CONTENT


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """An authority, and certificates of a server and of a client that it has signed."""
    folder = tmp_path / "pki"
    folder.mkdir()
    run = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    authority = ["-subj", "/CN=authority", "-keyout", "ca-key.pem", "-out", "ca-cert.pem"]
    subprocess.run([*run, *authority], cwd=folder, check=True, capture_output=True)
    for who in ("server", "client"):
        signed = ["-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-subj", f"/CN={who}"]
        names = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]
        files = ["-keyout", f"{who}-key.pem", "-out", f"{who}-cert.pem"]
        subprocess.run([*run, *signed, *names, *files], cwd=folder, check=True, capture_output=True)
    return folder


def test_certificates_prove_the_server_and_the_client(
    tapfs_command: list[str], disk: Path, tmp_path: Path, certificates: Path
) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "ca-cert.pem").write_bytes((certificates / "ca-cert.pem").read_bytes())
    words = ["--tls-certificates", certificates]
    for verified in (False, True):
        with serving(tapfs_command, disk, *words, *["--tls-verify-clients"] * verified) as (uri, process):
            assert copied(f"{uri}?tls-certificates={certificates}", tmp_path / "copy").returncode == 0
            assert (tmp_path / "copy").read_bytes() == CONTENT
            refused = copied(f"{uri}?tls-certificates={stranger}", tmp_path / "copy").returncode != 0
            assert refused == verified
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0


@pytest.mark.parametrize("peer", ["tapfs", "qemu-nbd"])
def test_images_behind_tls_are_read_and_written(
    tapfs_command: list[str], disk: Path, tmp_path: Path, certificates: Path, peer: str
) -> None:
    """Our client, to our server and to another; the server wants a certificate of its clients."""
    if peer == "tapfs":
        words = ["--rw", "--name", "disk", "--tls-certificates", certificates, "--tls-verify-clients"]
        running = serving(tapfs_command, disk, *words)
    else:
        running = serving_by_qemu(disk, certificates)
    with running as (uri, _):
        named = f"{uri}?tls-certificates={certificates}"
        # What is there keeps its length, and the bytes go there and back.
        (tmp_path / "new.raw").write_bytes(CONTENT[::-1])
        for words in (("info", "-f", "raw", named), ("convert", "-f", "raw", "-O", "raw", tmp_path / "new.raw", named)):
            done = subprocess.run([*tapfs_command, *words], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        copy = ["convert", "-f", "raw", "-O", "raw", named, tmp_path / "copy"]
        subprocess.run([*tapfs_command, *copy], check=True, capture_output=True)
        assert (tmp_path / "copy").read_bytes() == CONTENT[::-1]
        for wrong, said in ((uri, "certificate"), (uri.replace("nbds:", "nbd:"), "wants TLS")):
            refused = subprocess.run(
                [*tapfs_command, "info", "-f", "raw", wrong], capture_output=True, text=True, check=False
            )
            assert refused.returncode != 0
            assert said in refused.stderr


@contextmanager
def serving_by_qemu(disk: Path, certificates: Path) -> Generator[tuple[str, subprocess.Popen[bytes]]]:
    """A qemu-nbd on TCP, at a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tls = f"tls-creds-x509,id=tls,endpoint=server,dir={certificates},verify-peer=on"
    words = ["qemu-nbd", "-f", "raw", "-x", "disk", "-t", "-b", "127.0.0.1", "-p", str(port), "-e", "4"]
    with subprocess.Popen([*words, "--object", tls, "--tls-creds", "tls", disk]) as process:
        try:
            for _ in range(3000):
                with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=30):
                    break
                time.sleep(0.01)
            yield f"nbds://127.0.0.1:{port}/disk", process
        finally:
            process.terminate()


def test_a_socket_of_systemd_is_taken(tapfs_command: list[str], disk: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        # As systemd does it: descriptor 3, and the number of the process that exec makes of this one.
        shell = 'exec 3<&0; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
        words = ["sh", "-c", shell, "sh", *tapfs_command, "serve", "-f", "raw", str(disk), "--exit-when-idle"]
        with subprocess.Popen(words, stdin=listener.fileno(), stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            uri = process.stdout.readline().strip()
            assert uri == f"nbd+unix:///?socket={path}"
            assert copied(uri, tmp_path / "copy").returncode == 0
            assert process.wait(30) == 0
    assert path.exists()
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_the_kernel_is_told_to_look_for_clients_that_vanish(tapfs_command: list[str], disk: Path) -> None:
    """A client whose machine is gone says nothing more, so it is asked whether it is there."""
    with serving(tapfs_command, disk) as (uri, _):
        client = connected(uri)
        client.go()
        ours = f"{0x0100007F:08X}:{client.connection.getsockname()[1]:04X}"

        def timer() -> str:
            rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            (found,) = [row[5] for row in rows if row[2] == ours]
            return found[:2]

        # While an answer is on its way another timer runs. Then it is that of keepalive.
        end = time.monotonic() + 30
        while timer() != "02" and time.monotonic() < end:
            time.sleep(0.01)
        assert timer() == "02"
        client.close()


def test_two_hundred_clients_leave_nothing(tapfs_command: list[str], disk: Path) -> None:
    with serving(tapfs_command, disk) as (uri, process):
        descriptors = Path(f"/proc/{process.pid}/fd")
        before = len(os.listdir(descriptors))
        clients = [connected(uri) for _ in range(200)]
        for number, client in enumerate(clients):
            if number % 4:  # the others never say a word
                client.go("", nbd.EXTENDED)
        for number, client in enumerate(clients):
            if number % 4 == 1:
                assert client.ask(nbd.READ, number * 512, 512).whole() == CONTENT[number * 512 : (number + 1) * 512]
            elif number % 4 == 2:
                client.send(nbd.READ, 0, 3 * MIB)  # and does not take it
        for client in clients:
            client.close()
        last = connected(uri)
        last.go()
        assert last.ask(nbd.READ, 0, MIB).whole() == CONTENT[:MIB]
        last.close()
        for _ in range(2000):
            if len(os.listdir(descriptors)) <= before:
                break
            signal.sigtimedwait([], 0.01)
        assert len(os.listdir(descriptors)) <= before
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_json_of_nbdinfo_over_tcp_is_whole(tapfs_command: list[str], disk: Path) -> None:
    with serving(tapfs_command, disk, "--name", "a disk") as (uri, _):
        assert uri.endswith("/a%20disk")
        words = ["nbdinfo", "--json", uri]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
        (told,) = json.loads(done.stdout)["exports"]
        assert (told["export-name"], told["export-size"]) == ("a disk", 3 * MIB)


def test_a_host_without_descriptors_turns_clients_away_and_serves_the_others(
    tapfs_command: list[str], disk: Path
) -> None:
    limited = ["prlimit", "--nofile=64:64", "--", *tapfs_command]
    with serving(limited, disk) as (uri, process):
        first = connected(uri)
        first.go()
        crowd = [connected(uri) for _ in range(80)]
        for _ in range(20):
            assert first.ask(nbd.READ, 0, MIB).whole() == CONTENT[:MIB]
        for client in crowd:
            client.close()
        last = connected(uri)
        last.go()
        assert last.ask(nbd.READ, MIB, 512).whole() == CONTENT[MIB : MIB + 512]
        last.close()
        first.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read().count("further ones like this are not logged") <= 1

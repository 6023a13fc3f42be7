"""A storage provider answers Varlink's clients, and a volume is a descriptor that outlives it."""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tapfs

PROVIDER = "io.systemd.StorageProvider"


def connected(path: Path) -> socket.socket:
    """A connection to a server; its socket has a name a moment before it listens."""
    end = time.monotonic() + 30
    while True:
        made = socket.socket(socket.AF_UNIX)
        try:
            made.connect(str(path))
        except ConnectionRefusedError:
            made.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return made


class Client:
    """A client by bytes."""

    def __init__(self, path: Path) -> None:
        self._socket = connected(path)
        self._socket.settimeout(60)

    def send(self, message: object) -> None:
        self._socket.sendall(json.dumps(message).encode() + b"\0")

    def answers(self) -> tuple[list[dict[str, Any]], list[int]]:
        """All replies to one call, and the descriptors with them; none if the connection has ended."""
        replies: list[dict[str, Any]] = []
        found = array.array("i")
        data = b""
        while not replies or replies[-1].get("continues"):
            more, descriptors, _, _ = socket.recv_fds(self._socket, 65536, 4)
            if not more:
                return [], []
            found.extend(descriptors)
            data += more
            while b"\0" in data:
                message, _, data = data.partition(b"\0")
                replies.append(json.loads(message))
        return replies, list(found)

    def call(self, method: str, *, more: bool = False, **parameters: object) -> tuple[list[dict[str, Any]], list[int]]:
        name = method if "." in method else f"{PROVIDER}.{method}"
        self.send({"method": name, "parameters": parameters, "more": more})
        return self.answers()

    def error(self, method: str, **parameters: object) -> tuple[str, dict[str, Any]]:
        ((reply,), _) = self.call(method, **parameters)
        return reply["error"], reply["parameters"]

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "images"
    path.mkdir()
    tapfs.create(path / "disk.qcow2", "qcow2", 1 << 20)
    (path / "flat.raw").write_bytes(b"QFI\xfb".ljust(4096, b"\0"))
    (path / "note").write_text("no image")
    return path


@pytest.fixture
def provider(folder: Path, tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    path = tmp_path / "socket"
    command = [sys.executable, "-m", "tapfs.cli", "provide", str(folder), "--socket", str(path)]
    process = subprocess.Popen(command)
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.01)
    yield path, process
    process.terminate()
    assert process.wait() == 0
    assert not path.exists()


@pytest.fixture
def client(provider: tuple[Path, subprocess.Popen[bytes]]) -> Iterator[Client]:
    made = Client(provider[0])
    yield made
    made.close()


def test_a_provider_describes_itself_and_lists_images_and_templates(client: Client) -> None:
    ((about,), _) = client.call("org.varlink.service.GetInfo")
    assert about["parameters"]["interfaces"] == ["org.varlink.service", PROVIDER]
    ((told,), _) = client.call("org.varlink.service.GetInterfaceDescription", interface=PROVIDER)
    assert f"interface {PROVIDER}\n" in told["parameters"]["description"]
    replies, _ = client.call("ListVolumes", more=True)
    listed = {each["parameters"].pop("name"): each["parameters"] for each in replies}
    assert sorted(listed) == ["disk.qcow2", "flat.raw"]
    assert (listed["disk.qcow2"]["sizeBytes"], listed["disk.qcow2"]["type"]) == (1 << 20, "reg")
    assert [each.get("continues", False) for each in replies] == [True, False]
    ((one,), _) = client.call("ListVolumes", more=True, matchName="*.raw")
    assert one["parameters"]["sizeBytes"] == 4096
    replies, _ = client.call("ListTemplates", more=True)
    assert {"qcow2", "raw", "vmdk"} <= {each["parameters"]["name"] for each in replies}


def test_a_volume_outlives_the_connection_and_the_provider(
    provider: tuple[Path, subprocess.Popen[bytes]], folder: Path
) -> None:
    client = Client(provider[0])
    ((reply,), (descriptor,)) = client.call("Acquire", name="disk.qcow2")
    assert reply["parameters"] == {"fileDescriptorIndex": 0, "type": "reg", "readOnly": False}
    name, parameters = client.error("Acquire", name="disk.qcow2", readOnly=False)
    assert (name, parameters["errnoName"]) == ("io.systemd.System", "EBUSY")
    client.close()
    provider[1].terminate()
    provider[1].wait()
    assert os.fstat(descriptor).st_size == 1 << 20
    assert os.pwrite(descriptor, b"here" * 1024, 65536) == 4096
    os.close(descriptor)  # no fsync: closing is enough for what is not to survive a crash
    while in_use(folder / "disk.qcow2"):
        time.sleep(0.01)
    with tapfs.open(folder / "disk.qcow2") as disk:
        assert disk.read(65536, 4096) == b"here" * 1024


def in_use(path: Path) -> bool:
    try:
        tapfs.open(path, writable=True).close()
    except tapfs.ImageError as error:
        if error.kind is not tapfs.ErrorKind.LOCKED:
            raise
        return True
    return False


def test_a_raw_volume_is_raw_whatever_it_holds_and_may_be_read_only(client: Client, folder: Path) -> None:
    (folder / "flat.raw").chmod(0o444)
    ((reply,), (descriptor,)) = client.call("Acquire", name="flat.raw", readOnly=True)
    assert reply["parameters"]["readOnly"]
    assert os.pread(descriptor, 4, 0) == b"QFI\xfb"
    os.close(descriptor)


def test_volumes_are_made_when_a_client_says_how_large(client: Client, folder: Path) -> None:
    assert client.error("Acquire", name="new")[0] == f"{PROVIDER}.CreateSizeRequired"
    assert client.error("Acquire", name="new", createMode="open")[0] == f"{PROVIDER}.NoSuchVolume"
    for name, template, made in (("new", None, "qcow2"), ("new.vdi", None, "vdi"), ("other", "vhdx", "vhdx")):
        (_, (descriptor,)) = client.call(
            "Acquire", name=name, createMode="new", createSizeBytes=1 << 20, template=template
        )
        os.close(descriptor)
        assert tapfs.info(folder / name, shared=True)["format"] == made
        assert client.error("Acquire", name=name, createMode="new", createSizeBytes=1)[0].endswith(".VolumeExists")
    assert client.error("Acquire", name="x", createSizeBytes=1, template="zip")[0].endswith(".NoSuchTemplate")


@pytest.mark.parametrize(
    ("parameters", "error"),
    [
        ({}, "InvalidParameter"),
        ({"name": 3}, "InvalidParameter"),
        ({"name": "../images/disk.qcow2"}, "InvalidParameter"),
        ({"name": ".hidden", "createSizeBytes": 4096}, "InvalidParameter"),
        ({"name": "disk.qcow2", "requestAs": "blk"}, "WrongType"),
        ({"name": "disk.qcow2", "requestAs": "sock"}, "InvalidParameter"),
        ({"name": "disk.qcow2", "createMode": 1}, "InvalidParameter"),
        ({"name": "new", "createSizeBytes": True}, "InvalidParameter"),
    ],
)
def test_bad_parameters_are_named_errors(client: Client, parameters: dict[str, object], error: str) -> None:
    assert client.error("Acquire", **parameters)[0].endswith(f".{error}")


def test_unknown_methods_and_calls_that_are_none(client: Client, provider: tuple[Path, object]) -> None:
    assert client.error("Nothing") == ("org.varlink.service.MethodNotFound", {"method": f"{PROVIDER}.Nothing"})
    assert client.error("a.b.C") == ("org.varlink.service.InterfaceNotFound", {"interface": "a.b"})
    assert client.error("ListVolumes")[0] == "org.varlink.service.ExpectedMore"
    for garbage in ([], {"method": 1}, {"method": f"{PROVIDER}.Acquire", "parameters": []}, "x" * (2 << 20)):
        other = Client(provider[0])
        try:
            other.send(garbage)
            assert other.answers() == ([], [])
        except ConnectionError:
            pass  # cut off while it still sent
        other.close()
    assert client.call("org.varlink.service.GetInfo")[0]

"""Images on a web server: the bytes are right or there is an error, whatever the server does."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from obstore import exceptions

import tapfs
from tapfs import ErrorKind, ImageError
from tapfs.disk.chain import OpenOptions
from tapfs.disk.image import Image
from tapfs.disk.opening import open_image
from tapfs.errors import CODES
from tapfs.host.copied import CopiedFile
from tapfs.host.gate import Gate
from tapfs.host.remote.objects import what_failed
from tapfs.host.remote.options import RemoteOptions
from tapfs.jobs.convert import convert_to_new
from tapfs.jobs.create import NewImage
from tests.web_server import FAULTS, WebServer, web_server

MIB = 1 << 20
SIZE = 6 * MIB


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def server(content: bytes) -> Iterator[WebServer]:
    with web_server(content) as server:
        yield server


def opened(server: WebServer, *, tries: int = 6, copy_bytes: int = 8 << 30) -> Image:
    remote = RemoteOptions(tries=tries, pause_seconds=0.001, copy_bytes=copy_bytes)
    return open_image(server.url + "/x", OpenOptions(format="raw", remote=remote))


def test_through_every_fault_the_bytes_are_right(server: WebServer, content: bytes) -> None:
    choice = random.Random(2)
    plan = [*FAULTS * 3, *[None] * 24]
    choice.shuffle(plan)
    server.fault = lambda: plan.pop() if plan else None
    with opened(server, tries=30) as disk:
        for _ in range(40):
            start = choice.randrange(SIZE - 100_000)
            length = choice.choice((1, 100_000))
            assert disk.read(start, length) == content[start : start + length]
        assert disk.read(0, SIZE) == content
    assert not plan


def test_what_fails_for_good_is_an_error_and_works_when_it_is_over(server: WebServer, content: bytes) -> None:
    with opened(server, tries=1) as disk:
        for fault in set(FAULTS) - {"late"}:
            server.fault = lambda fault=fault: fault  # type: ignore[misc]
            with pytest.raises(ImageError) as raised:
                disk.read(0, SIZE)
            assert raised.value.kind is ErrorKind.IO
            assert raised.value.path == server.url + "/x"
        server.fault = lambda: None
        assert disk.read(0, SIZE) == content


@pytest.mark.parametrize("change", ["etag", "size"])
def test_a_file_that_changes_while_it_is_read_is_an_error(server: WebServer, content: bytes, change: str) -> None:
    with opened(server) as disk:
        assert disk.read(0, 10) == content[:10]
        if change == "etag":
            server.etag = '"two"'
        else:
            server.content = content + b"more"
        with pytest.raises(ImageError, match="has changed since it was opened"):
            disk.read(SIZE // 2, 10)


def test_what_cannot_be_opened_is_told_in_words(server: WebServer) -> None:
    server.ranges = False
    with pytest.raises(ImageError, match="no range requests") as raised:
        opened(server)
    assert raised.value.kind is ErrorKind.UNSUPPORTED
    with pytest.raises(ImageError) as raised:
        tapfs.open(server.url + "/x", format="raw", writable=True)
    assert raised.value.kind is ErrorKind.READ_ONLY
    with pytest.raises(ImageError) as raised:
        tapfs.create(server.url + "/x", "raw", MIB)
    assert raised.value.kind is ErrorKind.READ_ONLY
    server.ranges, server.content = True, b""
    with opened(server) as disk:
        assert disk.size == 0


def test_a_bounded_copy_is_read_again_and_takes_no_more_space(server: WebServer, content: bytes) -> None:
    with opened(server, copy_bytes=MIB) as disk:
        for _ in range(2):
            for start in range(0, SIZE, 300_000):
                assert disk.read(start, 1000) == content[start : start + 1000]
        file = disk.layers[0].file
        assert (Path("/proc/self/fd") / str(file.descriptor)).stat().st_blocks * 512 <= 2 * MIB


def test_chains_are_followed_only_where_the_user_allows_it(server: WebServer, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "base.raw").write_bytes(content)
    with tapfs.open(tmp_path / "base.raw", format="raw") as disk:
        convert_to_new(disk, str(tmp_path / "base.qcow2"), NewImage("qcow2", SIZE))
    tapfs.create(tmp_path / "over.qcow2", "qcow2", SIZE, backing="base.qcow2", backing_format="qcow2")
    with tapfs.open(tmp_path / "over.qcow2", writable=True) as disk:
        disk.write(MIB, b"over")
    server.files = {f"/a/{name}": (tmp_path / name).read_bytes() for name in ("base.qcow2", "over.qcow2")}
    wanted = content[:MIB] + b"over" + content[MIB + 4 :]
    here = tmp_path / "here.qcow2"
    base = f"{server.url}/a/over.qcow2"
    tapfs.create(here, "qcow2", SIZE, backing=f"{server.url}/a/base.qcow2", backing_format="qcow2")
    before = len(server.asked)
    for path, gate in ((str(here), Gate()), (str(here), Gate.inside(tmp_path, f"{server.url}/ab")), (base, Gate())):
        with pytest.raises(ImageError) as raised:
            tapfs.open(path, gate=gate)
        assert raised.value.kind is ErrorKind.DENIED
        assert f"backing_root={server.url}/a/" in str(raised.value)
    assert all(stop <= 64 << 10 or start for start, stop in server.asked[before:])
    with tapfs.open(base, gate=Gate.inside(f"{server.url}/a")) as disk:
        assert disk.read(0, SIZE) == wanted
        assert disk.parents == (f"{server.url}/a/base.qcow2",)


def test_an_object_of_a_store(server: WebServer, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """As S3 is asked where its endpoint is given: by a path, in which the key is escaped."""
    for name, value in {
        "AWS_ENDPOINT_URL": server.url,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    server.files["/bucket/dir/a%20disk.raw"], server.content = content, b"another"
    with tapfs.open("s3://bucket/dir/a%20disk.raw", format="raw") as disk:
        assert disk.read(MIB, 10) == content[MIB : MIB + 10]


def test_no_image_is_made_at_a_web_server(tapfs: Callable[..., Any], sample: Path) -> None:
    for words in (
        ("create", "-f", "raw", "https://host/new", "1M"),
        ("convert", "-O", "raw", sample, "s3://bucket/new"),
    ):
        ran = tapfs(*words)
        assert ran.code == CODES[ErrorKind.READ_ONLY].exit_code
        assert "make it on this host, then upload it" in ran.err


@pytest.mark.parametrize(
    ("scheme", "variable"),
    [("s3", "AWS_ACCESS_KEY_ID"), ("gs", "GOOGLE_APPLICATION_CREDENTIALS"), ("az", "AZURE_STORAGE_ACCOUNT_NAME")],
)
def test_a_store_without_keys_names_them(scheme: str, variable: str) -> None:
    """The library asks the cloud whose machine it is on, at an address that is no other's."""
    asked = "Generic error: Error performing PUT http://169.254.169.254/latest/api/token in 8 ms - refused"
    kind, message, remedy = what_failed(exceptions.GenericError(asked), scheme)
    assert (kind, variable in (remedy or "")) == (ErrorKind.DENIED, True)
    assert "no keys" in message
    account = exceptions.GenericError("Generic MicrosoftAzure error: Account must be specified")
    assert what_failed(account, scheme)[0] is (ErrorKind.DENIED if scheme == "az" else ErrorKind.IO)


def kill_fetching(disk: Image) -> None:
    """Kill the process that fetches, and not the one that waits for it."""
    file = disk.layers[0].file
    assert isinstance(file, CopiedFile)
    waiting = file._copy.held.origin._fetching._process.number  # type: ignore[attr-defined]

    def working() -> list[str]:
        with suppress(OSError):
            return Path(f"/proc/{waiting}/task/{waiting}/children").read_text().split()
        return []

    while not (killed := working()):
        os.sched_yield()  # the next one is on its way
    os.kill(int(killed[0]), signal.SIGKILL)
    while killed == working():
        os.sched_yield()


def test_a_killed_fetching_process_is_followed_by_another(server: WebServer, content: bytes) -> None:
    with opened(server) as disk:
        assert disk.read(0, 100) == content[:100]
        kill_fetching(disk)
        assert disk.read(SIZE - 100, 100) == content[-100:]
        # One that is killed while it fetches: what it had in hand is asked for again.
        asked, killed = len(server.asked), list[int]()

        def die_once() -> None:
            if not killed:
                killed.append(1)
                kill_fetching(disk)

        server.fault = die_once
        assert disk.read(MIB, 3 * MIB) == content[MIB : 4 * MIB]
        assert killed
        assert len(server.asked) > asked
        assert disk.read(0, SIZE) == content


def test_the_follower_of_a_killed_process_reads_the_same_object_or_nothing(server: WebServer, content: bytes) -> None:
    with opened(server) as disk:
        assert disk.read(0, 100) == content[:100]
        server.etag, server.content = '"two"', content[::-1]
        kill_fetching(disk)
        with pytest.raises(ImageError, match="has changed since it was opened"):
            disk.read(SIZE - 100, 100)
        server.etag, server.content = '"one"', content
    with opened(server) as disk:
        assert disk.read(SIZE - 100, 100) == content[-100:]


def test_processes_that_are_killed_again_and_again_are_given_up(server: WebServer, content: bytes) -> None:
    with opened(server) as disk:
        assert disk.read(0, 100) == content[:100]
        for _ in range(5):
            kill_fetching(disk)
        for _ in range(2):  # later reads are told, too, and none waits for ever
            with pytest.raises(ImageError, match="has ended") as raised:
                disk.read(SIZE - 100, 100)
            assert raised.value.kind is ErrorKind.IO
            assert "open the image again" in str(raised.value)
        assert disk.read(50, 100) == content[50:150]  # what is here is read
        with opened(server) as again:
            assert again.read(SIZE - 100, 100) == content[-100:]


def test_a_signal_ends_a_command_while_the_server_is_silent(
    server: WebServer, tapfs_command: list[str], tmp_path: Path
) -> None:
    """Threads wait for what is fetched then, and the main thread for them."""
    silent, over = threading.Event(), threading.Event()

    def fault() -> None:
        if len(server.asked) > 2:
            silent.set()
            over.wait(900)

    server.fault = fault
    words = [*tapfs_command, "convert", "-f", "raw", "-O", "raw", server.url + "/x", str(tmp_path / "out")]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
        try:
            assert silent.wait(300)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=300)
            assert process.returncode == 128 + signal.SIGTERM, (process.returncode, said)
        finally:
            over.set()
            process.kill()
    assert not (tmp_path / "out").exists()
